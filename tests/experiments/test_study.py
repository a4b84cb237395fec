import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import selection
import train
from experiments import rivals, study
from oracle import RuleOracle
from oracles.choose import choose_oracle
from plumbing.options import BadInput, parse_args
from plumbing.run_folder import fingerprint
from videoqa import world

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_study_is_a_configuration_of_train_py(monkeypatch):
    for faults in study.STUDY.values():
        monkeypatch.setattr(sys, "argv", ["train.py", *faults.split()])
        cfg = parse_args(train.Config, train.PRESETS)
        make = choose_oracle(cfg, torch.Generator(), torch.device("cpu"))
        assert isinstance(make, RuleOracle) == (faults == "")
    asked = " ".join(study.STUDY.values())
    for part in ("swap_prob 0.1", "swap_prob 0.5", "position_bias", "permutations 3", "permutations 5"):
        assert part in asked
    assert "--oracle_agreement scale" in asked and "--anchor" in asked


def test_the_study_trains_each_line_once_goes_on_where_it_was_and_writes_its_table(tmp_path, monkeypatch):
    """With train.py in this process, on clips of a small world."""
    world.make_world(tmp_path / "world" / "train6", range(1_000_000, 1_000_006))
    world.make_world(tmp_path / "world" / "eval3", range(2_000_000, 2_000_003))
    options = ["--world_dir", str(tmp_path / "world"), "--policy", str(ROOT / "weights"), "--lora_r", "4"]
    options += "--num_train_clips 6 --num_eval_clips 3 --eval_samples 1 --num_steps 2".split()
    options += "--batch_prompts 8 --dtype float32".split()
    commands, break_off = [], [False, True, False, False]

    def run(command):
        commands.append(command[2:])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            status = train.main()
        if break_off.pop(0):  # as if it had died before its end
            Path(command[3], "results.json").unlink()
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=status)

    lines = {"no noise": "", "bias 0.6, k = 3": study.STUDY["bias 0.6, k = 3"]}
    monkeypatch.setattr(study, "STUDY", lines)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- oracle_study -->\nold\n<!-- /oracle_study -->\nafter\n")
    where = str(tmp_path / "study"), 1, options, str(page)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(BadInput, match=r"bias_0\.6_k_=_3_0: training ended with status 1"):
            study.oracle_study(*where)
        assert "| no noise | 1 | " in page.read_text() and "bias" not in page.read_text()
        found = study.oracle_study(*where)
        report = tmp_path / "study" / "no_noise_0" / "report.html"
        report.unlink()  # as if it had been killed behind results.json
        assert found == study.oracle_study(*where) and report.exists()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [command[2] for command in commands] == ["--seed", "--seed", "--resume"]  # and then never again
    rows = found.splitlines()
    assert len(rows) == 4 and rows[3].startswith("| bias 0.6, k = 3 | 1 | ") and rows[2].endswith(" |  |")
    assert 0 < float(rows[3].split("|")[-2]) <= 1  # Kendall's W of its permutations
    assert page.read_text() == f"before\n<!-- oracle_study -->\n{found}\n<!-- /oracle_study -->\nafter\n"
    with pytest.raises(BadInput, match=r"options\.json: the runs there have options"):
        study.oracle_study(where[0], 1, [], str(page))
    page.write_text("no place for it")
    with pytest.raises(BadInput, match="page.md: not such a page"):
        study.oracle_study(*where)
    assert study.oracle_study(*where[:3], "") == found  # no page: into the study's own folder alone
    assert (tmp_path / "study" / "table.md").read_text() == f"{found}\n"
    assert page.read_text() == "no place for it"


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the scripts that a study starts in this process."""
    rooms = {"train.py": train.main, "selection.py": selection.main}

    def run(command):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            return SimpleNamespace(returncode=rooms[Path(command[1]).name]() or 0)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run))
    monkeypatch.chdir(ROOT)  # of the default --policy
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


TINY = "--eval_samples 1 --batch_prompts 8 --lora_r 4 --dtype float32 --num_steps 2".split()


def first_cells(table):
    return [row.split(" | ")[0][2:] for row in table.splitlines()[2:]]


def test_the_reward_study_trains_with_the_dual_reward_and_with_a_part_of_it(
    tmp_path, monkeypatch, in_this_process
):
    page = tmp_path / "page.md"
    page.write_text("<!-- reward_study -->\n<!-- /reward_study -->\n")
    found = study.reward_study(str(tmp_path / "study"), 1, TINY, str(page), clips=(6, 3))
    assert first_cells(found) == ["nothing yet: the start", *study.REWARDS] and found in page.read_text()
    configs = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("*_0/config.json")]
    assert sorted((c["objective"], c["oracle"], c["continuous_coef"]) for c in configs) == [
        ("grpo", "rule", 0.0), ("grpo", "rule", 1.0), ("grpo_rank", "sum", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], 100), (["--num_steps", "8"], 8), (["--num_steps=6"], 6), (["--preset", "smoke"], 3)]
    + [(["--preset", "smoke", "--num_steps", "4"], 4)],
)
def test_a_study_knows_how_many_steps_train_py_takes_also_where_its_options_do_not_say(options, steps):
    assert study.settings(options)["num_steps"] == steps


def test_options_of_a_study_that_train_py_does_not_know_are_told_before_the_hours_of_training(tmp_path):
    for job, options, words in (
        (
            study.selection_study,
            ["--num_stepz", "4"],
            "--num_stepz: no such option; did you mean --num_steps",
        ),
        (study.selection_study, ["--num_steps", "1"], "selection: .*--num_steps.* at least 2"),
        (rivals.fill_study, ["--num_steps", "abc"], "--num_steps.*abc"),
        (rivals.fill_study, ["--num_steps=6", "--eval_every=3"], "fill: .*--eval_every.*third"),
        (rivals.fill_study, ["--eval_every", "3", "--batch_prompts", "3"], "fill: .*--batch_prompts.* 4"),
        (rivals.rivals_study, ["--num_steps", "2", "--eval_every", "5"], "--eval_every.* to --num_steps .2"),
        (rivals.rivals_study, ["--eval_every", "0"], "--eval_every.* from 1"),
        (study.oracle_study, ["--seed=1"], "--seed: the study gives each run its own"),
        (rivals.rivals_study, ["--eval_every", "1", "--lr", "1"], "--lr: the study gives each run its own"),
        (rivals.rivals_study, ["--eval_every=1"], "none.md"),  # is given: the page is what is missing
    ):
        page = "none.md" if words == "none.md" else str(ROOT / "RESULTS.md")
        with pytest.raises(BadInput, match=words):
            job(str(tmp_path / "study"), 1, options, page)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("warm_up", [0, 1])
def test_the_selection_study_learns_from_selected_questions_and_is_measured_on_the_held_out_ones(
    tmp_path, in_this_process, warm_up
):
    page, folder = tmp_path / "page.md", tmp_path / "a study"
    page.write_text("<!-- selection_study -->\n<!-- /selection_study -->\n")
    options = [*TINY, "--num_frames", "7"]
    found = study.selection_study(str(folder), 2 - warm_up, options, str(page), clips=(6, 3), warm_up=warm_up)
    assert first_cells(found) == ["nothing yet: the start", *study.SELECTED] and found in page.read_text()
    paths = [path for path in sorted(folder.glob("*_0/results.json")) if "start" not in str(path)]
    runs = [json.loads(path.read_text()) for path in paths]
    assert len(runs) == 4 and all(run["before"] == runs[0]["before"] for run in runs)  # the same held out
    assert sorted(run["steps"] for run in runs) == [1, 1, 1, 2]  # of the halves
    starts = {json.loads((path.parent / "config.json").read_text())["adapter"] for path in paths}
    assert starts == ({f"{folder}/start_0/adapter"} if warm_up else {""})
    report, *kept = map(json.loads, (folder / "selected_0.jsonl").read_text().splitlines())
    policy = fingerprint("weights", "", starts.pop())
    assert report["selection"]["policy"] == policy  # selected by the policy that goes on
    assert report["selection"]["num_frames"] == 7
    drawn = [json.loads(line) for line in (folder / "random_0.jsonl").read_text().splitlines()]
    assert report["selection"]["share"] == 0.3333 and len(kept) <= report["selection"]["questions"] / 3 + 1
    assert len(drawn) == len(kept) > 0 and drawn != kept
    for name, rows in (("selected", kept), ("random", drawn)):
        path = next(folder.glob(f"{name}_third*_0/rollouts.jsonl"))
        asked = {json.loads(line)["id"] for line in path.read_text().splitlines()}
        assert asked <= {row["id"] for row in rows}


def test_runs_of_other_options_are_never_taken_for_those_asked_for(tmp_path, monkeypatch):
    """Neither by the whole study, whatever decides its runs, nor by one run that was begun by hand."""
    page, out = tmp_path / "page.md", tmp_path / "run"
    page.write_text("".join(f"<!-- {x}_study -->\n<!-- /{x}_study -->\n" for x in ("rivals", "selection")))
    looked = ["--eval_every", "1"]
    monkeypatch.setattr(rivals, "train_lines", lambda *_: "")
    monkeypatch.setattr(rivals, "curves", lambda *_: "")
    rivals.rivals_study(str(tmp_path / "r"), 1, looked, str(page), [1e-3])
    with pytest.raises(BadInput, match=r"options\.json.*0\.003.*another --out"):
        rivals.rivals_study(str(tmp_path / "r"), 1, looked, str(page), [3e-3])
    monkeypatch.setattr(study, "world_options", lambda *_: ([], "train", "held"))
    study.selection_study(str(tmp_path / "s"), 0, looked, str(page), warm_up=1)
    with pytest.raises(BadInput, match=r"options\.json.*--warm_up.*another --out"):
        study.selection_study(str(tmp_path / "s"), 0, looked, str(page), warm_up=3)
    out.mkdir()
    for name in ("results.json", "report.html"):
        (out / name).touch()
    (out / "config.json").write_text('{"lr": 0.001, "dtype": "float32", "num_steps": 100}')
    study.train_run(str(out), ["--lr", "1e-3"])
    with pytest.raises(BadInput, match=r"run: has --lr 0\.001, not 0\.003; remove its folder"):
        study.train_run(str(out), ["--lr", "3e-3"])


def test_a_run_that_may_still_be_under_way_is_left_to_train_py_which_holds_its_lock(tmp_path, monkeypatch):
    """As behind a study that was killed alone: train.py refuses the folder, or begins anew in it."""
    commands = []
    monkeypatch.setattr(study, "started", lambda *given: commands.append(given))
    (tmp_path / "config.json").write_text('{"made": {}}')
    study.train_run(str(tmp_path), ["--seed", "0"])
    assert commands == [("training", str(tmp_path), ["train.py", "--out", str(tmp_path), "--seed", "0"])]
    assert (tmp_path / "config.json").exists()


def test_a_page_keeps_its_line_ends_and_without_each_mark_once_and_in_order_it_is_one_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(b"a\r\n<!-- x -->\r\nold\r\n<!-- /x -->\r\nb\n")
    assert study.between(str(page), "x", "1\n2") == "a\r\n<!-- x -->\r\n1\r\n2\r\n<!-- /x -->\r\nb\n"
    first, last = b"<!-- x -->\n", b"<!-- /x -->\n"
    for content in (
        last + first,
        first + first + last,
        first + last + last,
        first,
        b"caf\xe9" + first + last,
        None,
    ):
        page.unlink() if content is None else page.write_bytes(content)
        with pytest.raises(BadInput, match="page.md: .*name a page with the lines"):
            study.between(str(page), "x", "new")
