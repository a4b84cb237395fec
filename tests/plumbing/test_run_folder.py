"""The life of a run folder: what it may not overwrite, what a resume needs, and what a kill may cost."""

import importlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import train
from checkpoints.policies import data_of
from oracles import choose
from plumbing.options import BadInput, EndedEarly
from plumbing.run_folder import Kept, RunFolder, RunOptions, check_folder, fingerprint, stored_options
from videoqa.answers import Question


@dataclass
class Small(RunOptions):
    """A run of few options"""

    seed: int = 0
    num_steps: int = 2


class Nothing:
    """What learns, in a run that does not."""

    def tensors(self):
        return {"x": torch.ones(1)}

    def restore(self, tensors):
        pass


def folder_of(out, **options):
    saved = []
    run = RunFolder(
        Small(str(out), **options), Nothing(), saved.append, torch.device("cpu"), {"the data": "a"}
    )
    run.saved = saved
    return run


def trained(out, steps=2, **options):
    """A run that has taken its steps, and let go of its folder."""
    run = folder_of(out, **options)
    run.progress |= {"before": {}, "before_values": {}}
    for run.step in range(steps):
        run.append("metrics.jsonl", [{}])
    run.step = steps
    run.save()
    run.lock_file.close()
    return run


def test_a_run_never_begins_in_a_folder_of_something_else(tmp_path):
    model, file, link = tmp_path / "model", tmp_path / "file", tmp_path / "link"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    file.write_text("text")
    link.symlink_to(tmp_path / "nowhere")
    trained(tmp_path / "run")
    for out in (model, file, link, tmp_path / "run", "", " "):
        with pytest.raises(BadInput, match="--out"):
            check_folder(Small(str(out)))
    assert (model / "config.json").read_text() == '{"model_type": "llama"}'
    (tmp_path / "empty").mkdir()
    for out in ("empty", "new"):
        check_folder(Small(str(tmp_path / out)))
        folder_of(tmp_path / out)


def test_a_machine_without_git_trains_and_names_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    trained(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["made"]["commit"] == ""


def test_a_folders_name_is_taken_without_detours(tmp_path):
    run = trained(f"{tmp_path}/missing/../run/")
    assert run.out == str(tmp_path / "run") and (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_ended_there_while_this_one_loaded_is_not_overwritten(tmp_path):
    trained(tmp_path / "run", seed=5)
    with pytest.raises(BadInput, match="exists already; add --resume"):
        folder_of(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 5


def test_a_folder_that_cannot_be_named_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder_of(tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_a_resume_that_is_refused_stores_none_of_its_options(tmp_path):
    out = tmp_path / "run"
    trained(out)
    stored = (out / "config.json").read_bytes()
    (out / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="checkpoint.safetensors: .*start the run anew"):
        folder_of(out, resume=True, num_steps=30)
    assert (out / "config.json").read_bytes() == stored


def test_the_printed_command_goes_on_with_what_a_resume_changed(tmp_path):
    out = tmp_path / "a run"
    trained(out)
    run = folder_of(out, resume=True, num_steps=30)
    assert run.go_on().endswith(f"python train.py --out '{out}' --resume")
    stored = stored_options({"out": str(out), "resume": True}, Small)
    assert stored["num_steps"] == 30 and json.loads((out / "config.json").read_text())["resume"] is False


def test_nohup_protects_a_run_and_else_a_closed_terminal_saves_it(tmp_path):
    for before, caught in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
        signal.signal(signal.SIGHUP, before)
        run = folder_of(tmp_path / before.name)
        os.kill(os.getpid(), signal.SIGHUP) if not caught else run.catch(signal.SIGHUP, None)
        assert run.interrupted() == caught
        assert (signal.getsignal(signal.SIGHUP) == run.catch) == caught


@pytest.mark.parametrize("steps", [[], [0], [0, 0, 1], [1], [0, 2]])
def test_a_resume_needs_a_row_of_metrics_for_each_step(tmp_path, steps):
    out = tmp_path / "run"
    trained(out)
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in steps))
    with pytest.raises(
        BadInput, match=r"metrics.jsonl: not a row for each of the 2 steps.*start the run anew"
    ):
        folder_of(out, resume=True)


def test_the_best_adapter_is_written_from_the_checkpoint_that_names_its_step(tmp_path):
    """So a kill between the two is mended by the resume: both name the same step."""
    out, accuracies = tmp_path / "run", iter([0.3, 0.5, 0.4])
    run = trained(out, eval_every=1, keep="best", num_steps=4)
    run = folder_of(out, resume=True, eval_every=1, keep="best", num_steps=4)
    run.bar = SimpleNamespace(say=lambda line: None)

    def evaluate(subset):
        accuracy = next(accuracies)
        return {"greedy": {"accuracy": accuracy, "n": 1, "by_category": {}}}, {}

    run.evaluate, folders = evaluate, []
    for run.step in (2, 3, 4):
        run.append("metrics.jsonl", [{}]) if run.step > 2 else None
        run.saved.clear()
        run.look()
        folders.append([os.path.basename(folder) for folder in run.saved])
    assert folders == [["adapter", "best"], ["adapter", "best"], []]
    run.lock_file.close()
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(4)))
    run = folder_of(out, resume=True, eval_every=1, keep="best", num_steps=4)
    assert run.step == run.progress["best"]["step"] == 3
    assert [os.path.basename(folder) for folder in run.saved] == ["adapter", "best"]
    rows = [json.loads(line)["step"] for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert rows == [2, 3]


def test_a_run_of_an_earlier_version_is_refused_with_that_reason(tmp_path):
    trained(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["made"]["from"] = {"an old name": "a"}
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="of an earlier version; start it anew"):
        folder_of(tmp_path / "run", resume=True)


@pytest.mark.parametrize("place", [0, 5000, 99_999])
@pytest.mark.parametrize("limits", [{}, {"whole": 1000, "block": 2000}])
def test_a_file_that_differs_anywhere_has_another_fingerprint(tmp_path, place, limits):
    """Of a large file in any of 64 blocks, here so large that they meet."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(100_000))
    before = fingerprint(str(path), **limits)
    path.write_bytes(bytes(place) + b"x" + bytes(100_000 - place - 1))
    assert fingerprint(str(path), **limits) != before


def test_a_resume_to_fewer_steps_than_were_taken_is_refused_and_stores_nothing(tmp_path):
    trained(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(BadInput, match="--num_steps 1: the run has taken 2 already"):
        folder_of(tmp_path / "run", resume=True, num_steps=1)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_ctrl_c_in_an_evaluation_ends_the_run_behind_the_batch_whose_answers_are_kept(tmp_path):
    run, row = folder_of(tmp_path / "run"), {"greedy": "a", "sampled": ["a"]}

    def evaluation(subset, kept):
        kept.add([{"id": "1"} | row])
        signal.raise_signal(signal.SIGINT)
        kept.add([{"id": "2"} | row])
        raise AssertionError("it went on")

    run.evaluation = evaluation
    with pytest.raises(EndedEarly, match="stopped in an evaluation; its answers are kept; .*--resume"):
        run.evaluate()
    run.lock_file.close()
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("changed", ["clip.mp4", "ranker", "replay.jsonl", "own_oracle.py"])
def test_everything_that_a_run_reads_is_in_its_fingerprints(tmp_path, monkeypatch, changed):
    for name in ("clip.mp4", "replay.jsonl", "own_oracle.py"):
        (tmp_path / name).write_text("# as it was")
    (tmp_path / "ranker").mkdir()
    (tmp_path / "ranker" / "ranker.safetensors").write_text("as it was")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_oracle", raising=False)
    importlib.import_module("own_oracle")
    sets = [SimpleNamespace(questions=[Question("a", str(tmp_path / "clip.mp4"), "what", "blue")])]
    kinds = {"ranker": "trained", "replay.jsonl": "replay", "own_oracle.py": "own_oracle:judge"}
    cfg = SimpleNamespace(
        policy="", clip="", adapter="", ranker=str(tmp_path / "ranker"), oracle=kinds.get(changed, "rule"),
        oracle_cache=str(tmp_path / "replay.jsonl"),
    )  # fmt: skip
    before = train.made_from(cfg, *sets)
    assert data_of(sets[0].questions).items() <= before.items()  # as eval.py run compares them
    path = tmp_path / changed
    (path / "ranker.safetensors" if path.is_dir() else path).write_text("# another")
    after = train.made_from(cfg, *sets)
    assert [name for name in before if before[name] != after[name]] == [
        "a video" if changed == "clip.mp4" else "--oracle"
    ]
    assert choose.made_from(cfg).keys() == {"--oracle"}


def test_two_jobs_never_write_the_same_kept_rows(tmp_path):
    first = Kept(str(tmp_path / "out.jsonl"), {}, settings={"k": 1})
    with pytest.raises(BadInput, match="out.jsonl: another process is writing it; wait"):
        Kept(str(tmp_path / "out.jsonl"), {}, settings={"k": 1})
    first.add([{"id": "a"}])
    first.beside.close()
    assert Kept(str(tmp_path / "out.jsonl"), {}, settings={"k": 1}).of == {"a": {"id": "a"}}
