import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import world
from answers import Reward
from data import load_questions
from selection import select, spread

ROOT = Path(__file__).parent.parent


def discrete(*values):
    return [Reward(float(v), None, 1.0) for v in values]


def continuous(*values):
    return [Reward(None, v, 1.0) for v in values]


def test_the_spread_of_worked_cases():  # math.md 4
    assert spread(discrete(1, 1, 1, 0, 0, 0, 0, 0)) == {"right": 3, "variance": 0.234375, "iou_std": None}
    ious = spread(continuous(0.1, 0.8, 0.4, 0.6, 0.2, 0.7, 0.5, 0.3))
    assert ious["right"] is None and ious["iou_std"] == pytest.approx(0.229129, abs=1e-6)
    assert spread(continuous(*[0.3] * 8))["iou_std"] == 0


def test_answers_that_disagree_are_kept_and_spans_by_their_std():
    rows = [discrete(1, 0), discrete(1, 1), discrete(0, 0)]
    rows += [continuous(0.0, 1.0), continuous(0.4, 0.5), continuous(0.5, 0.5)]
    rows += [[Reward(1.0, x, 1.0) for x in (0.0, 0.8)], [Reward(0.0, 0.2, 1.0)] * 2]
    tasks = ["qa"] * 3 + ["grounding"] * 3 + ["grounded"] * 2
    reasons = select([spread(row) for row in rows], tasks, k=2, share=1 / 3)
    assert [why.startswith("kept") for why in reasons] == [*(1, 0, 0), *(1, 0, 0), *(1, 0)]
    assert reasons[1:3] == ["dropped: all right", "dropped: all wrong"]
    assert reasons[4:6] == ["dropped: overlaps disagree too little", "dropped: all overlaps equal"]
    assert select([spread(row) for row in rows], tasks, k=2, share=1.0)[5:] == [
        "dropped: all overlaps equal", "kept: overlaps disagree", "dropped: all wrong",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    world.make_world(folder, range(1_000_000, 1_000_002))
    return folder


def run(clips, out, *options):
    command = [ROOT / "selection.py", clips / "questions.jsonl", "--videos", clips, "--out", out]
    command += ["--policy", ROOT / "weights", "--batch", 8, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = [sys.executable, *map(str, command)]
    return subprocess.run(done, capture_output=True, text=True, env=environment)


def test_a_killed_selection_goes_on_to_the_same_bytes_and_says_what_it_kept(clips):
    out, samples = clips / "selected.jsonl", clips / "selected.jsonl.samples"
    done = run(clips, out)
    assert done.returncode == 0, done.stderr
    whole, lines = out.read_bytes(), samples.read_text().splitlines(keepends=True)
    out.unlink()
    samples.write_text("".join(lines[:12]) + lines[12][:5])  # killed in a write: header, 11 rows, a torn one
    assert run(clips, out).returncode == 0
    assert out.read_bytes() == whole and samples.read_text() == "".join(lines)
    questions = load_questions(str(clips / "questions.jsonl"), "")
    report, kept = json.loads(whole.split(b"\n")[0])["selection"], load_questions(str(out), "")
    assert sum(report["counts"].values()) == len(questions) == report["questions"]
    assert len(kept) == sum(n for why, n in report["counts"].items() if why.startswith("kept"))
    assert set(kept) <= set(questions) and report["k"] == 8 and report["seed"] == 0
    assert sum(report["histograms"]["right"]) + sum(report["histograms"]["iou_std"]) == len(questions)
    other = run(clips, out, "--seed", 1)
    assert other.returncode == 2 and "begun with other settings" in other.stderr


def test_bad_options_are_one_line_and_status_2(clips):
    done = run(clips, clips / "none.jsonl", "--k", "1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--k 1" in done.stderr
    assert not list(clips.glob("none*"))
