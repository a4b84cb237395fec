import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as eval_room
import selection
import train
import world
from answers import Question
from cli import BadInput, parse_args
from eval import compare, gains, summarize, table
from oracle import RuleOracle

ROOT = Path(__file__).parent.parent


def question(i, video, category, spans=()):
    return Question(f"q{i}", video, "what?", "" if spans else "red", category, spans=spans)


QUESTIONS = [
    question(0, "a.mp4", "Color"),
    question(1, "a.mp4", "Color"),
    question(2, "b.mp4", "When", ((0.0, 1.0),)),
    question(3, "c.mp4", "When", ((0.0, 1.0),)),
]


def test_accuracy_is_over_questions_and_mean_iou_over_span_questions_alone():
    result = summarize(QUESTIONS, [1.0, 0.0, 0.5, 1.0], [1.0, 0.0, 0.4, 0.8])
    assert result["accuracy"] == pytest.approx(2.5 / 4) and result["n"] == 4
    assert result["by_category"] == {"Color": {"accuracy": 0.5, "n": 2}, "When": {"accuracy": 0.75, "n": 2}}
    assert result["mean_iou"] == pytest.approx(0.6)
    assert summarize(QUESTIONS[:2], [1.0, 0.0], [1.0, 0.0])["mean_iou"] is None


def test_intervals_resample_videos_not_questions():
    """Forty questions of two videos, one all right, one all wrong: resampled by video the interval is 0 to 1;
    resampled by question it would be about 0.35 to 0.65."""
    questions = [question(i, f"{i % 2}.mp4", "Color") for i in range(40)]
    low, high = summarize(questions, [float(i % 2) for i in range(40)], [0.0] * 40)["ci95"]
    assert (low, high) == (0.0, 1.0)


def test_gain_is_paired_question_by_question():
    before = {"greedy": [0.0, 1.0, 0.0, 0.0], "sampled": [0.5] * 4}
    after = {"greedy": [1.0, 1.0, 1.0, 0.0], "sampled": [0.75] * 4}
    gain = gains(QUESTIONS, before, after)
    assert gain["greedy"]["accuracy"] == pytest.approx(0.5)
    assert gain["sampled"] == {"accuracy": 0.25, "ci95": [0.25, 0.25]}  # the same for all: no spread


def result(share):
    part = summarize(QUESTIONS, [share] * 4, [share] * 4)
    return {"greedy": part, "sampled": part}


def test_the_table_has_a_row_a_category_before_and_after_side_by_side():
    rows = table(result(0.25), result(0.75)).splitlines()
    assert [len(row.split("|")) for row in rows] == [8] * 6
    assert rows[2] == "| Color | 2 | 25.0 | 75.0 | 25.0 | 75.0 |"
    assert rows[4].startswith("| **all** | 4 | 25.0 [25.0, 25.0] | 75.0 [75.0, 75.0]")


def test_compare_names_the_category_that_lost_most(tmp_path):
    before, after = result(0.5), result(0.75)
    after["greedy"]["by_category"]["When"]["accuracy"] = 0.4
    gain = {mode: {"accuracy": 0.25, "ci95": [0.2, 0.3]} for mode in ("greedy", "sampled")}
    row = {"seed": 3, "wall_s": 61.2, "before": before, "after": after, "gain": gain}
    (tmp_path / "results.json").write_text(json.dumps(row))
    assert compare([str(tmp_path)]).splitlines()[2].endswith("| +25.0 [+20.0, +30.0] | When -10.0 | 61 |")


# ---- the study of faulty oracles


def test_every_line_of_the_study_is_a_configuration_of_train_py(monkeypatch):
    for faults in eval_room.STUDY.values():
        monkeypatch.setattr(sys, "argv", ["train.py", *faults.split()])
        cfg = parse_args(train.Config, train.PRESETS)
        make = train.make_oracle(cfg, torch.Generator(), torch.device("cpu"))
        assert isinstance(make, RuleOracle) == (faults == "")
    asked = " ".join(eval_room.STUDY.values())
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

    lines = {"no noise": "", "bias 0.6, k = 3": eval_room.STUDY["bias 0.6, k = 3"]}
    monkeypatch.setattr(eval_room, "STUDY", lines)
    monkeypatch.setattr(eval_room.subprocess, "run", run)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- oracle_study -->\nold\n<!-- /oracle_study -->\nafter\n")
    study = str(tmp_path / "study"), 1, options, str(page)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(BadInput, match=r"bias_0\.6_k_=_3_0: training ended with status 1"):
            eval_room.oracle_study(*study)
        assert "| no noise | 1 | " in page.read_text() and "bias" not in page.read_text()
        found = eval_room.oracle_study(*study)
        assert found == eval_room.oracle_study(*study)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [command[2] for command in commands] == ["--seed", "--seed", "--resume"]  # and then never again
    rows = found.splitlines()
    assert len(rows) == 4 and rows[3].startswith("| bias 0.6, k = 3 | 1 | ") and rows[2].endswith(" |  |")
    assert 0 < float(rows[3].split("|")[-2]) <= 1  # Kendall's W of its permutations
    assert page.read_text() == f"before\n<!-- oracle_study -->\n{found}\n<!-- /oracle_study -->\nafter\n"
    with pytest.raises(BadInput, match=r"options\.json: the runs there have options"):
        eval_room.oracle_study(study[0], 1, [], str(page))
    page.write_text("no place for it")
    with pytest.raises(BadInput, match="page.md: has no lines"):
        eval_room.oracle_study(*study)


def test_the_reward_study_learns_from_selected_questions_and_is_measured_on_the_held_out_ones(
    tmp_path, monkeypatch
):
    rooms = {"train.py": train.main, "selection.py": selection.main}

    def run(command):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            return SimpleNamespace(returncode=rooms[Path(command[1]).name]() or 0)

    monkeypatch.setattr(eval_room.subprocess, "run", run)
    monkeypatch.chdir(ROOT)  # of the default --policy
    page, folder = tmp_path / "page.md", tmp_path / "study"
    page.write_text("<!-- reward_study -->\n<!-- /reward_study -->\n")
    options = "--eval_samples 1 --batch_prompts 8 --lora_r 4 --dtype float32".split()
    handler = signal.getsignal(signal.SIGINT)
    names = list(eval_room.REWARDS)
    monkeypatch.setattr(eval_room, "REWARDS", {
        names[0]: eval_room.REWARDS[names[0]] + " --num_steps 1",
        names[-1]: eval_room.REWARDS[names[-1]].replace("steps 20", "steps 1"),
    })  # fmt: skip
    try:
        found = eval_room.reward_study(str(folder), 1, options, str(page), clips=(6, 3))
    finally:
        signal.signal(signal.SIGINT, handler)
    rows = [row.split(" | ") for row in found.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {x}" for x in ("nothing yet: the supervised start", *names[::4])]
    assert found in page.read_text()
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*_0/results.json"))]
    assert len(runs) == 2 and runs[0]["before"] == runs[1]["before"]  # the same held-out questions
    kept = [json.loads(line) for line in (folder / "selected_0.jsonl").read_text().splitlines()[1:]]
    asked = {
        json.loads(x)["id"] for x in next(folder.glob("*selected*_0/rollouts.jsonl")).read_text().splitlines()
    }
    assert asked <= {row["id"] for row in kept} and 0 < len(kept) < 60


def score(tmp_path, predictions):
    rows = [{"id": f"q{i}", "video": "a.mp4", "question": "color?", "answer": "red"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pred.jsonl").write_text(predictions)
    command = [sys.executable, ROOT / "eval.py", "score", "--data", tmp_path / "data.jsonl"]
    command += ["--predictions", tmp_path / "pred.jsonl", "--json", tmp_path / "out.json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_scoring_counts_a_question_without_prediction_as_wrong(tmp_path):
    done = score(tmp_path, '{"id": "q0", "prediction": "red"}\n{"id": "q1", "prediction": "blue"}\n')
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["accuracy"] == pytest.approx(1 / 3) and out["n"] == 3 and out["missing"] == 1


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        ('{"id": "q0"}', ["pred.jsonl:1", "prediction"]),
        ('{"id": "zz", "prediction": "x"}', ["zz", "data.jsonl"]),
    ],
)
def test_bad_predictions_are_one_line_and_status_2(tmp_path, predictions, words):
    done = score(tmp_path, predictions)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words) and not (tmp_path / "out.json").exists()
