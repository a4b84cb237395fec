import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import lora
from checkpoints.policies import data_of
from data import DataOptions, load_sets
from eval import evaluate_run, gains, main, table
from plumbing.options import BadInput
from plumbing.progress import compare
from rollout import Sampling
from videoqa import questions
from videoqa.answers import Question, summarize

ROOT = Path(__file__).parents[2]


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
    row = {"seed": 3, "steps": 9, "wall_s": 61.2, "before": before, "after": after, "gain": gain}
    (tmp_path / "results.json").write_text(json.dumps(row))
    assert compare([str(tmp_path)]).splitlines()[2].endswith("| +25.0 [+20.0, +30.0] | When -10.0 | 61 |")


def score(script, tmp_path, predictions):
    rows = [{"id": f"q{i}", "video": "a.mp4", "question": "color?", "answer": "red"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pred.jsonl").write_text(predictions)
    command = ["eval.py", "score", "--data", tmp_path / "data.jsonl"]
    command += ["--predictions", tmp_path / "pred.jsonl", "--json", tmp_path / "out.json"]
    return script(main, *command)


def test_scoring_counts_a_question_without_prediction_as_wrong(script, tmp_path):
    done = score(script, tmp_path, '{"id": "q0", "prediction": "red"}\n{"id": "q1", "prediction": "blue"}\n')
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["accuracy"] == pytest.approx(1 / 3) and out["n"] == 3 and out["missing"] == 1


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        ('{"id": "q0"}', ["pred.jsonl, line 1", "prediction"]),
        ('{"id": "zz", "prediction": "x"}', ["zz", "data.jsonl"]),
    ],
)
def test_bad_predictions_are_one_line_and_status_2(script, tmp_path, predictions, words):
    done = score(script, tmp_path, predictions)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words) and not (tmp_path / "out.json").exists()


def test_the_score_command_prints_a_table_and_writes_a_row_a_question(script, tmp_path):
    rows = [{"id": f"q{i}", "video": "a.mp4", "question": "color?", "answer": "red"} for i in range(2)]
    rows.append(
        {"id": "q2", "video": "a.mp4", "question": "when?", "answer": "from 5 to 12 s", "span": [5, 12]}
    )
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = [{"id": "q0", "prediction": "A red one."}, {"id": "q2", "prediction": [[5, 12]]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, said)))
    command = ["eval.py", "score", "--data", tmp_path / "d.jsonl", "--predictions", tmp_path / "p.jsonl"]
    done = script(main, *command, "--rows", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "open_ended: published, exact match" in done.stdout.partition("{")[0]
    out = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in out] == ["q0", "q1", "q2"] and out[2]["iou"] == 1
    assert (out[0]["strict"]["right"], out[0]["published"]["right"]) == (True, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "data.jsonl"], "would be written over"),
        (["--json", "link.jsonl"], "link.jsonl: would be written over"),
        (["--rows", "new", "--json", "new"], "new: would be written over"),
        (["--judge_body", "{}"], "--judge_url and --judge_model: one without the other"),
        (["--judge_cache", "new"], "--judge_url and --judge_model: one without the other"),
    ],
)
def test_the_score_command_writes_over_nothing_that_it_reads_and_ignores_no_option(
    script, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    sound = '{"id": "q0", "prediction": "red"}\n'
    assert score(script, tmp_path, sound).returncode == 0
    (tmp_path / "link.jsonl").symlink_to("pred.jsonl")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    given = ["--data", "data.jsonl", "--predictions", tmp_path / "pred.jsonl", *options]
    done = script(main, "eval.py", "score", *given)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    nowhere = ["--rows", "/dev/null", "--json", "/dev/null"]
    assert script(main, "eval.py", "score", *given[:4], *nowhere).returncode == 0


def test_predictions_that_all_say_nothing_are_bad_input(script, tmp_path):
    done = score(script, tmp_path, '{"id": "q0", "prediction": null}\n{"id": "q1", "prediction": " "}\n')
    assert done.returncode == 2 and "not one of its 2 predictions can be read" in done.stderr
    done = score(script, tmp_path, '{"id": "q0", "prediction": {"label": "red"}}\n')
    assert done.returncode == 2 and 'line 1: prediction {"label": "red"} is unclear' in done.stderr


def test_a_runs_own_questions_and_videos_must_be_those_that_it_was_made_with(tmp_path, monkeypatch):
    data, video = tmp_path / "data.jsonl", tmp_path / "a.mp4"
    row = {"id": "q0", "question": "color?", "answer": "red"}
    rows = [json.dumps(row | {"id": name, "video": f"{name}.mp4"}) for name in "ab"]
    data.write_text("\n".join(rows))
    options = DataOptions(data=str(data), videos=str(tmp_path))
    config = asdict(options) | {"seed": 0, "dtype": "float32", "max_new_tokens": 5, "eval_samples": 1}
    config["made"] = {"from": data_of(*load_sets(options, 0))}
    policy = SimpleNamespace(decoder=SimpleNamespace(head=SimpleNamespace(device="cpu")))
    monkeypatch.setattr(evaluation, "set_up", lambda *given: None)
    monkeypatch.setattr(evaluation, "load_run", lambda *given: (policy, None, config))
    monkeypatch.setattr(evaluation, "PromptSet", lambda *given: pytest.fail("its questions are asked"))
    with pytest.raises(BadInput, match="--data and --videos go together"):
        evaluate_run("run", "", str(tmp_path))
    video.write_bytes(b"another")
    with pytest.raises(BadInput, match="config.json: a video changed since .* put it back, or"):
        evaluate_run("run", "", "")
    video.unlink()
    data.write_text("\n".join(rows).replace("red", "blue"))
    with pytest.raises(BadInput, match="config.json: the data changed since .* give --data and --videos"):
        evaluate_run("run", "", "")


@pytest.mark.parametrize(
    ("made", "wanted"), [({"sample_prompts": 3}, 3), ({"sample_prompts": 0}, 0), ({}, 0)]
)
def test_a_run_is_evaluated_with_as_many_prompts_at_once_as_it_sampled(made, wanted, monkeypatch):
    """The memory plan of a large model's run counts on it."""
    config = made | {"dtype": "float32", "max_new_tokens": 5, "eval_samples": 1, "seed": 0}
    decoder = SimpleNamespace(head=SimpleNamespace(device="cpu"), named_modules=lambda: [])
    asked, given = [], (SimpleNamespace(decoder=decoder), None, config)
    sampling = SimpleNamespace(of=lambda *policy, **options: options)
    stubs = dict(
        load_run=lambda *x: given, set_up=lambda *x: None, PromptSet=lambda *x: None, Sampling=sampling
    )
    for name, stub in stubs.items():
        monkeypatch.setattr(evaluation, name, stub)
    monkeypatch.setattr(questions, "load_questions", lambda *x: [])
    monkeypatch.setattr(evaluation, "evaluate", lambda *x, **options: asked.append(x[2]) or (None, None))
    monkeypatch.setattr(evaluation, "table", lambda *x: "")
    evaluate_run("run", "a.jsonl", ".")
    assert [options["prompts_at_once"] for options in asked] == [wanted, wanted]


def test_intervals_of_a_gain_resample_videos():
    questions = [question(i, f"{i % 2}.mp4", "Color") for i in range(40)]
    gain = gains(questions, {"greedy": [0.0] * 40}, {"greedy": [float(i % 2) for i in range(40)]})
    assert gain["greedy"] == {"accuracy": 0.5, "ci95": [0.0, 1.0]}  # about 0.35 to 0.65 by question


def evaluated(monkeypatch, tmp_path, data=""):
    """What evaluate_run asks for, of a run with a seed, dtype and length of its own."""
    rows = [{"id": str(i), "video": f"{i}.mp4", "question": "q", "answer": "red"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(data=str(tmp_path / "d.jsonl"), videos=str(tmp_path))
    config = asdict(options) | {"seed": 5, "dtype": "bfloat16", "max_new_tokens": 7, "eval_samples": 3}
    held = load_sets(options, 5)
    config["made"] = data_of(*held)
    linear = lora.LoRALinear(torch.nn.Linear(2, 2), 1, 1.0)
    decoder, seen = torch.nn.Sequential(linear), []
    decoder.head = linear.lora_A
    monkeypatch.setattr(evaluation, "load_run", lambda *x: (SimpleNamespace(decoder=decoder), None, config))
    monkeypatch.setattr(evaluation, "set_up", lambda decoder, options: seen.append(options.dtype))
    monkeypatch.setattr(evaluation, "PromptSet", lambda policy, tokenizer, questions: questions)
    monkeypatch.setattr(evaluation, "Sampling", SimpleNamespace(of=lambda *x, **options: options))
    monkeypatch.setattr(evaluation, "refuse_changed", lambda *x: None)

    def evaluate(policy, questions, sampling, **options):
        seen.append((linear.use, questions, sampling["max_new_tokens"], options))
        return linear.use, None

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "table", lambda before, after: (before, after))
    return evaluate_run("run", "", ""), seen, held[1]


def test_a_run_is_evaluated_on_its_held_out_questions_with_its_own_settings_before_and_after(
    monkeypatch, tmp_path
):
    table, (dtype, *asked), held = evaluated(monkeypatch, tmp_path)
    assert table == ("off", "policy") and dtype == "bfloat16"
    assert asked == [(use, held, 7, {"samples": 3, "seed": 5}) for use in ("off", "policy")]


def test_an_evaluation_is_at_temperature_1_over_all_ids_greedy_first_whatever_the_trainings(monkeypatch):
    asked = []

    def answer(policy, questions, rows, G, sampling, uniforms):
        asked.append((rows.tolist(), sampling.temperature, sampling.top_p, G, uniforms))
        return None, [["red"] + ["blue"] * (G - 1) for _ in rows]

    class Set:
        questions = [question(i, "a.mp4", "Color") for i in range(6)]

        def __len__(self):
            return 6

    monkeypatch.setattr(evaluation, "answer", answer)
    sampling = Sampling(3, torch.tensor([1]), temperature=0.2, top_p=0.5, prompts_at_once=4)
    results, values = evaluation.evaluate(None, Set(), sampling, samples=2, seed=1)
    assert [row[:4] for row in asked] == [([0, 1, 2, 3], 1.0, 1.0, 3), ([4, 5], 1.0, 1.0, 3)]
    uniforms = torch.cat([row[4] for row in asked])
    assert uniforms[:, 0].isnan().all() and len(uniforms[:, 1:].unique()) == 6 * 2 * 3
    assert results["greedy"]["accuracy"] == 1 and results["sampled"]["accuracy"] == 0
    evaluation.evaluate(None, Set(), sampling, samples=2, seed=2)
    assert not torch.cat([row[4] for row in asked[2:]])[:, 1:].equal(uniforms[:, 1:])
    evaluation.evaluate(None, Set(), sampling, samples=2, seed=1, subset=3)
    assert asked[-1][0] == sorted(asked[-1][0]) and asked[-1][4].nan_to_num().equal(
        uniforms[asked[-1][0]].nan_to_num()
    )
