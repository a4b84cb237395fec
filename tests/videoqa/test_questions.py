"""Rows of JSON lines become questions, or one line that names the field."""

import json
import os

import pytest

from plumbing.options import BadInput
from videoqa.answers import Question
from videoqa.questions import load_questions

GOOD = {"id": "a", "video": "v/a.mp4", "question": "What?", "answer": "red"}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_questions_are_read_with_every_field(tmp_path):
    rows = [
        GOOD | {"options": ["red", "blue"], "answer_index": 0, "category": "Attribute Perception"},
        GOOD | {"id": "b", "span": [1, 2.5], "duration": 9},
        GOOD | {"id": "c", "spans": [[0, 1], [2, 3]], "anything": "else", "clip": [0, 3.5]},
    ]
    a, b, c = load_questions(write_lines(tmp_path / "q.jsonl", *rows), "videos")
    video = os.path.join("videos", "v/a.mp4")
    assert a == Question("a", video, "What?", "red", "Attribute Perception", ("red", "blue"), 0)
    assert b == Question("b", video, "What?", "red", spans=((1, 2.5),), duration=9)
    assert c.spans == ((0, 1), (2, 3)) and hash(c) == hash(c)
    assert (a.shown, c.shown) == ((video,), (video, 0, 3.5))


@pytest.mark.parametrize(
    "row, told",
    [
        ("{not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ({k: v for k, v in GOOD.items() if k != "video"}, "field 'video' is missing"),
        (GOOD | {"question": 7}, "field 'question' is 7"),
        (GOOD | {"answer": " "}, "field 'answer'"),
        (GOOD | {"category": 3}, "field 'category'"),
        (GOOD | {"options": ["a", "b"], "answer_index": 2}, "field 'answer_index' is 2; .* 0 to 1"),
        (GOOD | {"options": ["a", "b"], "answer_index": True}, "field 'answer_index'"),
        (GOOD | {"options": ["a", "b"]}, "field 'answer_index' is missing"),
        (GOOD | {"answer_index": 0}, "field 'options' is missing"),
        (GOOD | {"options": "ab", "answer_index": 0}, "field 'options'"),
        (GOOD | {"span": [1]}, "field 'span' .* two numbers"),
        (GOOD | {"span": ["1", 2]}, "field 'span' .* two numbers"),
        (GOOD | {"span": [3, 2]}, "field 'span' .* after the end"),
        ('{"id": "b", "video": "v", "question": "q", "answer": "a", "span": [NaN, 2]}', "not JSON"),
        (GOOD | {"spans": []}, "field 'spans'"),
        (GOOD | {"spans": [1, 2]}, "field 'spans' .* list of such pairs"),
        (GOOD | {"span": [1, 2], "spans": [[1, 2]]}, "field 'spans' .* not both"),
        (GOOD | {"duration": 0}, "field 'duration'"),
        (GOOD | {"clip": 3}, "field 'clip' .* two numbers"),
        (GOOD | {"clip": [3, 2]}, "field 'clip' is .3, 2.; the start must be before the end"),
        (GOOD | {"clip": [-1, 2]}, "field 'clip'"),
        (GOOD | {"clip": [1, 9], "duration": 8}, "field 'clip' .* within the video"),
        (GOOD | {"clip": [1, 2], "span": [1, 3]}, "field 'span' .* is not within 'clip'"),
        (GOOD | {"id": "first"}, "field 'id' repeats that of line 1"),
        (GOOD | {"options": ["blue", "red"], "answer_index": 0}, "field 'answer' .* option 1, .* 0; correct"),
        (GOOD | {"options": ["blue", "Red."], "answer_index": 0}, "field 'answer'"),
        (GOOD | {"options": ["red", "blue"], "answer_index": 0, "answer": "B"}, "field 'answer' is .B"),
        (GOOD | {"options": [f"o{i}" for i in range(27)], "answer_index": 0}, "field 'options' .* 27, .* 26"),
        (GOOD | {"options": ["a", "b"], "answer_index": 0, "marks": ["X", "X"]}, "field 'marks'"),
        ({"selection": "train"}, "field 'id' is missing"),
    ],
)
def test_malformed_line_is_told_with_file_line_and_field(tmp_path, row, told):
    path = write_lines(tmp_path / "q.jsonl", GOOD | {"id": "first"}, "", row)
    with pytest.raises(BadInput, match=told) as caught:
        load_questions(path, "videos")
    assert str(caught.value).startswith(f"{path}, line 3: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"options": ["red", "blue", "blue"], "answer_index": 0},  # Video-MME and NExT-QA repeat options
        {"options": ["blue", "red", "red"], "answer_index": 2},
        {"options": ["a red one", "blue"], "answer_index": 0},
        {"options": ["an orange", "pears", "plums"], "answer_index": 0, "answer": "Vitamin C is in it"},
        {"options": ["B", "red"], "answer_index": 1},
        {
            "options": [str(i) for i in range(30)],
            "answer_index": 3,
            "marks": [f"Clip {i}" for i in range(30)],
        },
        {"selection": "train"},
    ],
)
def test_a_row_is_a_question_whatever_else_it_holds(tmp_path, more):
    path = write_lines(tmp_path / "q.jsonl", {"selection": {"k": 8}}, GOOD | more, GOOD | {"id": "b"})
    assert [question.id for question in load_questions(path, "videos")] == ["a", "b"]


def test_file_without_questions_or_in_another_encoding_is_told(tmp_path):
    with pytest.raises(BadInput, match="No such file.*give a JSONL file"):
        load_questions(str(tmp_path / "none.jsonl"), "videos")
    with pytest.raises(BadInput, match="holds no question"):
        load_questions(write_lines(tmp_path / "empty.jsonl", "", " "), "videos")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}\n'.encode("latin-1"))
    with pytest.raises(BadInput, match="line 1: not JSON"):
        load_questions(str(tmp_path / "latin.jsonl"), "videos")
