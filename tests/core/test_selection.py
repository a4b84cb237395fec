import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import selection
from plumbing.options import BadInput
from plumbing.run_folder import Kept
from selection import select, spread
from videoqa import world
from videoqa.answers import Question, Reward, task
from videoqa.questions import load_questions

ROOT = Path(__file__).parents[2]


def discrete(*values):
    return [Reward(float(v), None, 1.0) for v in values]


def continuous(*values):
    return [Reward(None, v, 1.0) for v in values]


def test_the_spread_of_worked_cases():  # worked by hand
    assert spread(discrete(1, 1, 1, 0, 0, 0, 0, 0)) == {"right": 3, "variance": 0.234375, "iou_std": None}
    ious = spread(continuous(0.1, 0.8, 0.4, 0.6, 0.2, 0.7, 0.5, 0.3))
    assert ious["right"] is None and ious["iou_std"] == pytest.approx(0.229129, abs=1e-6)
    assert spread(continuous(*[0.3] * 8))["iou_std"] == 0


def test_questions_whose_answers_or_overlaps_disagree_are_kept():
    rows = [discrete(1, 0), discrete(1, 1), discrete(0, 0)]
    rows += [continuous(0.0, 1.0), continuous(0.4, 0.5), continuous(0.5, 0.5)]
    rows += [[Reward(1.0, x, 1.0) for x in (0.0, 0.8)], [Reward(0.0, 0.2, 1.0)] * 2]
    tasks = ["qa"] * 3 + ["grounding"] * 3 + ["grounded"] * 2
    assert select([spread(row) for row in rows], tasks, k=2) == [
        "kept: answers disagree", "dropped: all right", "dropped: all wrong",
        "kept: overlaps disagree", "kept: overlaps disagree", "dropped: all overlaps equal",
        "kept: overlaps disagree", "dropped: all wrong",
    ]  # fmt: skip


def test_a_share_of_all_that_was_asked_is_kept_task_by_task_those_that_disagree_most_first():
    rows = [discrete(1, 1, 1, c, 0, 0, 0, 0) for c in (0, 1)]  # 3 and 4 of 8 right
    rows += [discrete(1, *[0] * 7), discrete(*[1] * 7, 0), discrete(*[0] * 8), discrete(*[1] * 8)]
    rows += [continuous(*pair * 4) for pair in ((0.4, 0.5), (0.0, 1.0), (0.3, 0.5))]
    grounded = [(1, 1, 0.5, 0.5), (1, 0, 0.5, 0.5), (1, 0, 0.4, 0.5), (1, 1, 0.1, 0.9)]
    rows += [[Reward(float(a), x, 1.0), Reward(float(b), y, 1.0)] * 4 for a, b, x, y in grounded]
    tasks = ["qa"] * 6 + ["grounding"] * 3 + ["grounded"] * 4
    spreads = [spread(row) for row in rows]

    def kept(share, seed=0):
        return {i for i, why in enumerate(select(spreads, tasks, 8, share, seed)) if why.startswith("kept")}

    for seed in range(9):  # 2 of 6, 1 of 3, 1 of 4: .5 + .05 is more than .5 + 0 and 0 + .4
        assert kept(1 / 3, seed) == {0, 1, 7, 11}
    reasons = select(spreads, tasks, 8, 1 / 3)
    assert [reasons[i] for i in (2, 6, 10)] == ["dropped: beyond the share, others disagree more"] * 3
    assert [reasons[i] for i in (4, 5, 9)] == ["dropped: all wrong", *["dropped: all right"] * 2]
    assert {frozenset(kept(1 / 2, seed) & {2, 3}) for seed in range(9)} == {frozenset({2}), frozenset({3})}
    assert kept(1 / 2, 4) == kept(1 / 2, 4)
    assert kept(1.0) == kept(0.9) == {0, 1, 2, 3, 6, 7, 8, 10, 11, 12}  # nothing that agrees fills a share up


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    world.make_world(folder, range(1_000_000, 1_000_002))
    return folder


def test_a_killed_selection_goes_on_to_the_same_bytes_and_says_what_it_kept(clips, script):
    command = ["selection.py", clips / "questions.jsonl", "--videos", clips, "--policy", ROOT / "weights"]
    command += ["--batch", 8, "--out", clips / "selected.jsonl"]
    out, samples = clips / "selected.jsonl", clips / "selected.jsonl.samples"
    done = script(selection.main, *command)
    assert done.returncode == 0, done.stderr
    whole, lines = out.read_bytes(), samples.read_text().splitlines(keepends=True)
    out.unlink()
    samples.write_text("".join(lines[:11]) + lines[11][:5])  # killed in a write: 11 rows, a torn one
    assert script(selection.main, *command).returncode == 0
    assert out.read_bytes() == whole and samples.read_text() == "".join(lines)
    questions = load_questions(str(clips / "questions.jsonl"), "")
    report, kept = json.loads(whole.split(b"\n")[0])["selection"], load_questions(str(out), "")
    assert sum(report["counts"].values()) == len(questions) == report["questions"]
    assert len(kept) == sum(n for why, n in report["counts"].items() if why.startswith("kept"))
    assert set(kept) <= set(questions) and report["k"] == 8 and report["seed"] == 0
    told = f"{out}: {len(kept)} of {len(questions)} questions, each answered 8 times"
    counts = {f"{n:8} {why}" for why, n in report["counts"].items()}
    assert done.stdout.splitlines()[-len(counts) - 1] == told and set(done.stdout.splitlines()) >= counts
    assert sum(report["histograms"]["right"]) + sum(report["histograms"]["iou_std"]) == len(questions)
    # Of the answers that are there: none is drawn again
    third = script(selection.main, *command, "--share", 0.3333)
    assert third.returncode == 0 and samples.read_text() == "".join(lines)
    report, fewer = json.loads(out.read_text().split("\n")[0])["selection"], load_questions(str(out), "")
    assert report["share"] == 0.3333 and report["counts"]["dropped: beyond the share, others disagree more"]
    assert set(fewer) < set(kept)
    for name in {task(q) for q in questions}:
        asked = sum(task(q) == name for q in questions)
        assert sum(task(q) == name for q in fewer) == round(0.3333 * asked) > 0
    other = script(selection.main, *command, "--seed", 1)
    assert other.returncode == 2 and "selected.jsonl.samples: made of other files or options" in other.stderr


def test_answers_about_other_videos_or_other_questions_are_not_continued(tmp_path):
    world.make_world(tmp_path, range(1_000_000, 1_000_002), workers=1)
    data, (clip, other) = tmp_path / "questions.jsonl", sorted(tmp_path.glob("*.mp4"))
    cfg = selection.Config(videos=str(tmp_path), out="out.jsonl", policy=str(ROOT / "weights"))

    def settings(dtype=torch.float32):
        return selection.settings_of(cfg, load_questions(str(data), str(tmp_path)), dtype)

    found = [settings(), settings(torch.bfloat16)]
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    found.append(settings())
    clip.write_bytes(other.read_bytes())
    found.append(settings())
    assert len({str(one) for one in found}) == 4


@pytest.mark.parametrize("think", [False, True])
def test_the_policy_is_told_to_think_or_not(clips, monkeypatch, think):
    def load_policy(options, device):
        raise BadInput(f"{options.policy}: {options.think}, {options.adapter}")

    command = ["selection.py", str(clips / "questions.jsonl"), "--videos", str(clips), "--out", "none.jsonl"]
    monkeypatch.setattr(sys, "argv", [*command, "--adapter", "mine", *["--think"] * think])
    monkeypatch.setattr(selection, "load_policy", load_policy)
    with pytest.raises(BadInput, match=f"weights: {think}, mine"):
        selection.main()


@pytest.mark.parametrize("option", ["--k 1", "--share 0", "--share 1.1", "--share nan"])
def test_bad_options_are_one_line_and_nothing_is_written(clips, monkeypatch, option):
    command = ["selection.py", "q.jsonl", "--videos", "v", "--out", str(clips / "none.jsonl")]
    monkeypatch.setattr(sys, "argv", [*command, *option.split()])
    with pytest.raises(BadInput, match=rf"^{option}(\.0)?: give a.* number"):
        selection.main()
    assert not list(clips.glob("none*"))


def answering(tmp_path, monkeypatch):
    """A selection of 4 questions, two a batch, whose policy always says red and blue, and its file."""
    cfg = selection.Config(videos="v", out=str(tmp_path / "out.jsonl"), k=2, batch=2)
    questions, asked = [Question(str(i), "v.mp4", "what?", "red") for i in range(4)], []

    def sample(policy, tokenizer, batch, first, cfg):
        asked.append([question.id for question in batch])
        return [["red", "blue"]] * len(batch)

    def answers():
        kept = Kept(f"{cfg.out}.samples", {"answers": list[str]}, settings={"k": 2})
        return selection.answers_of(None, None, questions, kept, cfg)

    monkeypatch.setattr(selection, "sample", sample)
    return answers, tmp_path / "out.jsonl.samples", asked


def test_a_batch_that_a_kill_cut_in_two_is_answered_whole_again_and_no_row_stands_twice(
    tmp_path, monkeypatch
):
    answers, path, asked = answering(tmp_path, monkeypatch)
    assert answers() == 4 * [["red", "blue"]]
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert answers() == 4 * [["red", "blue"]] and path.read_text() == whole
    assert asked == [["0", "1"], ["2", "3"], ["2", "3"]]
    path.write_text(whole.replace('["red", "blue"]', '["red"]', 1))  # no longer k answers: asked anew
    assert answers() == 4 * [["red", "blue"]] and asked[3:] == [["0", "1"]]


def test_a_full_disk_names_the_file_of_answers(tmp_path, monkeypatch):
    answers, path, _ = answering(tmp_path, monkeypatch)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 100):  # the settings have 8 bytes, two rows 84
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large.*out.jsonl.samples"):
                answers()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answers() == 4 * [["red", "blue"]] and len(path.read_text().splitlines()) == 4


def test_no_video_is_written_over(clips, script):
    path = next(clips.glob("*.mp4"))
    before = path.read_bytes()
    command = ["selection.py", clips / "questions.jsonl", "--videos", clips, "--out", path]
    done = script(selection.main, *command)
    assert done.returncode == 2 and "would be written over" in done.stderr
    assert path.read_bytes() == before and not path.with_name(f"{path.name}.samples").exists()


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.samples"])
def test_the_questions_are_not_overwritten(tmp_path, script, name):
    (tmp_path / name).write_text("{}\n")
    command = ["selection.py", tmp_path / name, "--videos", tmp_path, "--out", tmp_path / "questions.jsonl"]
    done = script(selection.main, *command)
    assert done.returncode == 2 and f"{tmp_path / name}; name another file" in done.stderr
    assert (tmp_path / name).read_text() == "{}\n" and len(list(tmp_path.iterdir())) == 1


def test_rounding_noise_of_overlaps_is_no_disagreement():
    noise = [spread(continuous(0.3, 0.3 + 1e-9))]
    assert noise[0]["iou_std"] > 0 and select(noise, ["grounding"], 2) == ["dropped: all overlaps equal"]


def test_histograms_are_of_right_answers_and_of_stds_in_bins_of_a_twentieth():
    spreads = [spread(discrete(1, 0)), spread(discrete(1, 1))]
    spreads += [spread(continuous(*pair)) for pair in ((0.0, 1.0), (0.0, 0.14), (0.5, 0.5))]
    assert selection.histogram(spreads, 2) == {"right": [0, 1, 1], "iou_std": [1, 1, *[0] * 7, 1]}


def test_a_question_draws_by_the_seed_and_its_number_alone(monkeypatch):
    drawn = {}

    def answer(policy, prompts, rows, k, sampling, uniforms):
        assert sampling.temperature == 1 and uniforms.shape == (len(rows), 2, 3)
        drawn[len(drawn)] = uniforms
        return None, [["x"] * k for _ in rows]

    asked = SimpleNamespace(video_embeds=torch.zeros(1))
    monkeypatch.setattr(selection, "answer", answer)
    monkeypatch.setattr(selection, "PromptSet", lambda *given: asked)
    monkeypatch.setattr(
        selection.Sampling, "of", lambda *x, **given: selection.Sampling(3, torch.tensor([1]))
    )
    for seed, first, n in ((0, 0, 4), (0, 2, 2), (1, 0, 4)):
        cfg = selection.Config(videos="v", out="o", k=2, max_new_tokens=3, seed=seed)
        selection.sample(None, None, [None] * n, first, cfg)
    assert drawn[0][2:].equal(drawn[1]) and len(torch.cat([drawn[0], drawn[2]]).unique()) == 2 * 4 * 2 * 3
