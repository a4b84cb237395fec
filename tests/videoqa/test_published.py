"""Published figures from published prediction files (REAL_CLIPS/predictions), through convert and score."""

import gzip
import json
import os

import pytest

from videoqa.answers import Question
from videoqa.datasets import convert
from videoqa.published import is_right_published, read_published
from videoqa.scores import score_file

PREDICTIONS = os.path.join(os.environ.get("REAL_CLIPS", ""), "predictions")
needs_predictions = pytest.mark.skipif(not os.path.isdir(PREDICTIONS), reason="REAL_CLIPS names no folder")
CUP = Question(
    "0",
    "a.mp4",
    "What does he hold?",
    "a green cup",
    options=("a red ball", "a green cup", "a blue box", "None of the above"),
    answer_index=1,
)


def unzipped(*names):
    with gzip.open(os.path.join(PREDICTIONS, *names), "rt", encoding="utf-8") as file:
        return json.load(file)


def scored(tmp_path, name, file, annotations, predictions):
    """Metrics and rows of converted annotations and predictions by id."""
    source, said = tmp_path / file, tmp_path / "said.jsonl"
    source.write_text(json.dumps(annotations))
    convert(name, [str(source)], str(tmp_path), str(tmp_path / "data.jsonl"))
    said.write_text("".join(json.dumps({"id": k, "prediction": v}) + "\n" for k, v in predictions.items()))
    out = score_file(str(tmp_path / "data.jsonl"), str(said), rows_path=str(tmp_path / "rows.jsonl"))
    return out["metrics"], [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


@needs_predictions
def test_msvd_qa_gives_hqgas_published_exact_match(tmp_path):
    folder = "msvdqa_hqga_test"
    with open(os.path.join(PREDICTIONS, folder, "ans_word.json")) as file:
        words = json.load(file)
    predicted = unzipped(folder, "HQGA-msvd-test.json.gz")  # 0: outside of the vocabulary
    said = {k: words[v["prediction"] - 1] if v["prediction"] else "" for k, v in predicted.items()}
    metrics, rows = scored(tmp_path, "msvd", "test_qa.json", unzipped(folder, "test_qa.json.gz"), said)
    open_ended = metrics["open_ended"]
    assert round(open_ended["exact_match"], 2) == round(open_ended["published"]["accuracy"], 2) == 41.15
    by_kind = {k: round(v["accuracy"], 2) for k, v in open_ended["published"]["by_task_type"].items()}
    assert by_kind == {"who": 57.16, "what": 30.40, "how": 76.22, "when": 75.86, "where": 32.14}
    assert round(open_ended["accuracy"], 2) == 41.32  # normalised: a bike is a bicycle
    assert len(rows) == 13157 and sum(row["exact_match"] for row in rows) == 5414


@needs_predictions
@pytest.mark.parametrize(
    ("model", "part", "percent"),
    [
        ("video-llava", "yes_no", 56.4),
        ("video-llava", "caption_matching", 63.3),
        ("video-llava", "multi-choice", 45.6),
        ("reka-core-20240501", "yes_no", 65.1),
        ("reka-core-20240501", "caption_matching", 41.3),
        ("reka-core-20240501", "multi-choice", 41.4),
    ],
)
def test_tempcompass_is_rated_as_published_row_by_row(tmp_path, model, part, percent):
    videos = unzipped("tempcompass", "predictions", model, f"{part}.json.gz")
    rated = unzipped("tempcompass", "auto_eval_results", model, f"{part}.json.gz")
    said, expected = {}, {}
    for video, aspects in videos.items():
        for aspect, rows in aspects.items():
            for i, (row, rating) in enumerate(zip(rows, rated[video][aspect], strict=True)):
                key = f"{video}_{part}_{aspect}_{i}"
                said[key] = row["prediction"]
                expected[key] = bool(rating["match_success"] and rating["rating"])  # by rule alone
    metrics, rows = scored(tmp_path, "tempcompass", f"{part}.json", videos, said)
    kind = metrics["open_ended" if part == "yes_no" else "multiple_choice"]
    assert round(kind["published"]["accuracy"], 1) == percent
    assert {row["id"]: row["published"]["right"] for row in rows} == expected


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Option 2", 1),
        ("the second option", 1),
        ("Caption B matches best", 1),
        ("（ｂ）", 1),
        ("答案是B", 1),
        ("A is a ball and C a box. So the final answer is (D).", 3),
        ("Is it A? Or B? The correct answer is: a green cup", 1),
        ("B. A green cup. Options (A) and (C) do not fit.", None),
        ("(A) is not right, so B.", 1),
        ("A or B", None),
        ("The answer is A or B", None),
        ("I cannot tell", None),
        ("A man walks", None),
    ],
)
def test_the_last_statement_counts_where_no_rule_is_published(text, index):
    assert read_published(text, CUP) == index


def test_the_first_word_decides_yes_or_no_and_a_refusal_is_neither():
    moves = Question("0", "a.mp4", "Does it move up?", "no", benchmark="tempcompass yes_no")
    said = ("No, it moves down, yes.", "Yes, there is no doubt.", "No idea.", "I'm not sure", "It does not.")
    assert [read_published(text, moves) for text in said] == ["no", "yes", None, None, None]
    assert is_right_published(said[0], moves)


def test_video_mme_and_mvbench_read_by_their_own_rules():
    mme = Question(**CUP.__dict__ | {"benchmark": "video_mme"})
    assert read_published("The best answer is B.", mme) == 1
    assert read_published("The cup. A or B", mme) == 0  # the first capital, whatever comes later
    bench = Question(**CUP.__dict__ | {"benchmark": "mvbench"})
    assert [read_published(t, bench) for t in ("(b) a cup", "B. x", "the answer is B")] == [1, 1, None]


def test_a_published_rule_that_names_whole_options_takes_letters_where_a_question_has_no_marks():
    captions = Question(
        "q", "v.mp4", "Which one?", "a dog runs", options=("a cat sits", "a dog runs"), answer_index=1,
        benchmark="tempcompass caption_matching",
    )  # fmt: skip
    right = [is_right_published(text, captions) for text in ("B", "a dog runs", "A")]
    assert right == [True, True, False]
