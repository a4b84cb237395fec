import json
import os

import pytest

from plumbing.options import BadInput, read_jsonl
from videoqa import scores
from videoqa.answers import Question, parse_span
from videoqa.scores import score_file

ANNOTATIONS = os.path.join(os.environ.get("REAL_CLIPS", ""), "annotations")
needs_excerpts = pytest.mark.skipif(not os.path.isdir(ANNOTATIONS), reason="REAL_CLIPS names no folder")


def near(expected):
    return pytest.approx(expected, abs=1e-4)


def moment(i, *spans, options=()):
    answer_index = 0 if options else None
    return Question(str(i), "a.mp4", "When?", options[0] if options else "", "", options, answer_index, spans)


def test_grounding_of_the_worked_case():  # worked by hand
    questions = [moment(i, gold) for i, gold in enumerate([(10, 20), (0, 8), (3, 15), (0, 5)])]
    out = scores.score(questions, ["5 to 15", "from 0 to 10 seconds", "3-9 s", "20 to 30"])
    expected = {"mIoU": near(40.8333), "R@1, IoU=0.3": 75, "R@1, IoU=0.5": 50, "R@1, IoU=0.7": 25}
    assert out == {"n": 4, "parse_failures": 0, "grounding": expected}


def test_thresholds_are_inclusive():
    out = scores.grounding([0.3, 0.5, 0.7, 0.29999])
    assert [out[f"R@1, IoU={m}"] for m in (0.3, 0.5, 0.7)] == [75, 50, 25]


def test_grounded_answers_of_the_worked_case():  # five questions
    gold = [((12.1, 17.1), (20, 23.5), (29.7, 33.2)), ((1.2, 5.8),), ((0, 10),), ((5, 9),), ((5, 9),)]
    questions = [moment(i, *spans, options=("red", "blue")) for i, spans in enumerate(gold)]
    said = ["A, 19 to 24", "A, 0 to 10", "B, 2 to 4", "A, 7 to 7", "A, 20 to 25"]
    expected = {"Acc@QA": 80, "Acc@GQA": 40, "mIoP": 63.2, "IoP@0.3": 80, "IoP@0.5": 60}
    expected |= {"mIoU": 27.2, "IoU@0.3": 40, "IoU@0.5": 20}
    assert scores.score(questions, said)["grounded_qa"] == {k: near(v) for k, v in expected.items()}


def test_an_unreadable_or_absent_prediction_is_counted_and_wrong():
    questions = [moment(0, (0, 5)), moment(1, (0, 5)), moment(2, (0, 5), options=("red", "blue"))]
    out = scores.score(questions, ["nan to 5", "", "red"])
    assert out["parse_failures"] == 3 and out["grounding"]["mIoU"] == 0
    assert out["grounded_qa"]["Acc@QA"] == 100 and out["grounded_qa"]["mIoU"] == 0


def test_choices_are_counted_by_task_type_and_duration_from_text_letter_or_index():
    options = ("red", "blue", "green")
    rows = [("Color", "short", None), ("Color", "", 300.0), ("Count", "long", 5.0), ("Count", "", None)]
    questions = [
        Question(str(i), "a.mp4", "?", "blue", kind, options, 1, (), length, name)
        for i, (kind, name, length) in enumerate(rows)
    ]
    said = [scores.prediction_text(p, questions[0]) for p in ("blue", "(B) blue", 1, 3)]
    assert said[2:] == ["B", ""] and scores.prediction_text(None, questions[0]) == ""
    out = scores.score(questions, said)
    assert out["parse_failures"] == 1
    published = out["multiple_choice"].pop("published")
    assert (published["rule"], published["accuracy"]) == ("last statement", 75)
    assert out["multiple_choice"] == {
        "accuracy": 75,
        "n": 4,
        "by_task_type": {"Color": {"accuracy": 100, "n": 2}, "Count": {"accuracy": 50, "n": 2}},
        "by_duration": {c: {"accuracy": 100, "n": 1} for c in ("long", "medium", "short")},
    }


@pytest.mark.parametrize(
    "rule", ["", "video_mme", "tempcompass multi-choice", "tempcompass caption_matching"]
)
@pytest.mark.parametrize("marks", [(), ("Caption A", "Caption B"), ("Option 1", "Option 2")])
def test_an_index_names_its_option_by_both_rules(rule, marks):
    options = ("red", "blue")
    of = dict(options=options, benchmark=rule, marks=marks)
    questions = [Question("0", "a.mp4", "?", options[i], answer_index=i, **of) for i in (0, 1)]
    said = [scores.prediction_text(i, question) for i, question in enumerate(questions)]
    out = scores.score(questions, said)["multiple_choice"]
    assert out["accuracy"] == out["published"]["accuracy"] == 100


def test_an_index_beyond_the_letters_names_its_option_by_its_mark():
    options, marks = (tuple(f"{word} {i}" for i in range(30)) for word in ("thing", "Option"))
    question = Question("0", "a.mp4", "?", options[29], "", options, 29, marks=marks)
    assert scores.prediction_text(29, question) == "Option 29"
    assert scores.score([question], ["Option 29"])["multiple_choice"]["accuracy"] == 100


def test_a_small_or_large_bound_of_a_predicted_span_is_read_as_it_is():
    for span in ([1e-05, 12.3], [0, 1e16], [5, 12.0]):
        text = scores.prediction_text(span, moment(0, (0, 5)))
        assert parse_span(text) == tuple(span) and "e" not in text


def test_the_rows_of_a_span_without_end_are_plain_json(tmp_path):
    row = {"id": "0", "video": "a.mp4", "question": "when?", "answer": "from 0 to 5 seconds", "span": [0, 5]}
    said = {"id": "0", "prediction": f"from 0 to {'9' * 400} seconds"}
    for name, content in (("data", row), ("said", said)):
        (tmp_path / name).write_text(json.dumps(content))
    score_file(*(str(tmp_path / name) for name in ("data", "said")), rows_path=str(tmp_path / "rows"))
    assert [row["span"] for _, row in read_jsonl(str(tmp_path / "rows"), "")] == [[0, None]]


@needs_excerpts
@pytest.mark.parametrize(
    ("name", "num_known"),
    [("videochat-r1_think_answer_glue", 60), ("qwen2.5-vl-7b_answer_random_frames", 300)],
)
def test_published_predictions_get_their_published_figures(name, num_known):
    with open(os.path.join(ANNOTATIONS, "nextgqa_answers", f"{name}.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    differing = 0
    for row in rows:
        gold = row["gt"]
        letter, spans = gold["answer"][1], tuple(map(tuple, gold["glue"]))
        question = Question("0", "a.mp4", "?", letter, "", tuple("ABCDE"), "ABCDE".index(letter), spans)
        reading = scores.read(row["pred"], question)
        in_tags = "<answer>" in row["pred"]  # the published rule reads nothing outside of the tags
        differing += in_tags and float(reading.option == question.answer_index) != row["acc"]
        if "<glue>" in row["pred"] and row["pred"].count("), (") == 0 and len(gold["glue"]) == 1:
            assert reading.overlaps(question)[0] == near(row["iou"])  # theirs joins several spans, one is one
    assert len(rows) == num_known and differing == 0


def test_the_score_command_counts_and_refuses_by_line(tmp_path):
    data, said = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    row = {"id": "a", "video": "v.mp4", "question": "Which?", "answer": "red"}
    more = {"options": ["red", "blue"], "answer_index": 0}
    data.write_text("".join(json.dumps(r) + "\n" for r in (row | more, row | {"id": "b"}, row | {"id": "c"})))
    said.write_text('{"id": "a", "prediction": 0}\n{"id": "b", "prediction": null}\n')
    out = score_file(str(data), str(said))
    assert out["accuracy"] == pytest.approx(1 / 3) and out["missing"] == 1
    assert out["metrics"]["parse_failures"] == 2
    assert out["metrics"]["multiple_choice"]["accuracy"] == 100
    for line, cause in (
        ('{"id": "z", "prediction": "A"}', ", line 1: id 'z' is not in"),
        ('{"id": "a"}', ", line 1: field 'prediction' is missing"),
        (
            '{"id": "a", "prediction": 0}\n{"id": "a", "prediction": 1}',
            ", line 2: id 'a' was predicted before",
        ),
        ("[", ", line 1: not JSON"),
    ):
        said.write_text(line)
        with pytest.raises(BadInput, match=cause):
            score_file(str(data), str(said))


def test_bounds_are_inclusive_half_a_prediction_inside_is_grounded_and_two_minutes_are_short():
    assert scores.grounded_qa([True, True], [(0.3, 0.5), (0.2, 0.49)])["Acc@GQA"] == 50
    question = lambda seconds: Question("0", "v", "q", "a", duration=seconds)  # noqa: E731
    found = [scores.duration_class(question(x)) for x in (120.0, 120.5, 900.0, 901.0, None)]
    assert found == ["short", "medium", "medium", "long", ""]


def test_a_number_that_is_no_option_s_index_is_unread_or_unclear():
    quiz = Question("0", "v", "q", "red", options=("red", "blue"), answer_index=0)
    texts = [scores.prediction_text(x, quiz) for x in (0, 1.0, -1, 2, 0.5, True)]
    assert texts == ["A", "B", "", "", None, None]
    span = Question("0", "v", "q", "a", spans=((0.0, 9.0),))
    assert scores.prediction_text([[5, 12, 0.9]], span) == "[5, 12]"
    assert scores.prediction_text([5, 12, 0.9], span) is None
