import json
import os
import sys

import pytest

from plumbing.options import BadInput
from videoqa.answers import prompt_text, task
from videoqa.datasets import NAMES, convert
from videoqa.questions import load_questions

REAL_CLIPS = os.environ.get("REAL_CLIPS", "")
ANNOTATIONS = os.path.join(REAL_CLIPS, "annotations")
needs_excerpts = pytest.mark.skipif(not os.path.isdir(ANNOTATIONS), reason="REAL_CLIPS names no folder")


def converted(tmp_path, name, *paths, bad_spans="error"):
    out = str(tmp_path / "out.jsonl")
    videos = os.path.join(REAL_CLIPS, "clips") if REAL_CLIPS else str(tmp_path)
    report = convert(name, [os.path.join(ANNOTATIONS, path) for path in paths], videos, out, bad_spans)
    return {q.id: q for q in load_questions(out, "")}, report


@needs_excerpts
@pytest.mark.parametrize(
    ("name", "path", "rows", "first", "answer"),
    [
        ("MSVD-QA", "msvd_qa/test_qa.json", 26, "44642", "woman"),
        ("MSVD-QA", "msvd_qa/MSVD_QA.csv", 300, "30933", "someone"),
        ("MSRVTT-QA", "msrvtt_qa/MSRVTT_QA.csv", 300, "158581", "couch"),
        ("ActivityNet-QA", "activitynet_qa", 500, "v_1QIUV7WYKXg_3", "no"),
        ("NExT-QA", "next_qa/test.csv", 500, "2574374895_8", "lay on floor"),
        ("NExT-GQA", "next_gqa", 300, "4882821564_1", "unwrap it"),
        ("Charades-STA", "charades_sta/charades_sta_test.txt", 306, "0", "from 24.3 to 30.4 seconds"),
        ("activitynet_captions", "activitynet_captions", 361, "v_QOlSCBRmfWY_1", None),
        ("Video-MME", "video_mme", 300, "001-1", None),
        ("MVBench", "mvbench/json", 500, "action_antonym_0", "Piling something up"),
        ("TempCompass", "tempcompass", 1415, "1034419625_multi-choice_action_0", "dunking a basketball"),
        ("Video-ChatGPT", "video_chatgpt", 480, "generic_0", None),
    ],
)  # fmt: skip
def test_every_row_of_a_data_set_becomes_a_question_with_its_own_key(
    tmp_path, name, path, rows, first, answer
):
    questions, report = converted(tmp_path, name, path)
    assert len(questions) == rows and f"{rows} read = {rows} written + 0 repeats" in report
    assert answer is None or questions[first].answer == answer
    assert first in questions


@needs_excerpts
def test_what_the_tables_are_broken_down_by_survives(tmp_path):
    videos = converted(tmp_path, "video_mme", "video_mme/test-excerpt.jsonl")[0]
    assert {q.duration_class for q in videos.values()} == {"short", "medium", "long"}
    assert videos["001-1"].category == "Counting Problem" and not videos["001-1"].options[0].startswith("A.")
    grounded = converted(tmp_path, "next_gqa", "next_gqa/val.csv")[0]["4882821564_1"]
    assert grounded.spans == ((13.8, 29.8),) and grounded.duration == 90 and task(grounded) == "grounded"
    bounds, report = converted(tmp_path, "mvbench", "mvbench/json/action_sequence.json")
    assert bounds["action_sequence_0"].clip == (1.5, 17.1)
    assert "25 questions are about a part of their video" in report
    charades = converted(tmp_path, "charades_sta", "charades_sta/charades_sta_test.txt")[0]
    assert task(charades["0"]) == "grounding"


@needs_excerpts
def test_a_missing_video_is_listed_once_with_the_total_and_a_present_one_is_found(tmp_path):
    questions, report = converted(tmp_path, "charades_sta", "charades_sta/charades_sta_test.txt")
    assert questions["305"].video == "OHOFG.mp4" and "missing video: OHOFG" not in report
    assert report.count("missing video: 3MSZA.mp4") == 1
    assert report.splitlines()[-1].startswith(f"{len({q.video for q in questions.values()})} videos: 1 found")
    clip = converted(tmp_path, "msvd_qa", "msvd_qa/test_qa.json")[0]["44642"].video
    assert clip == "rlQ2kW-FvMk_66_79.mp4"  # vid1730 of the annotations


@needs_excerpts
def test_the_four_reversed_moments_of_charades_are_an_error_with_their_row(tmp_path):
    path = "charades_sta/charades_sta_train.txt"
    with pytest.raises(BadInput, match=r"line 501: span \[8.0, 7.0\] is reversed.*3 more.*--bad_spans"):
        converted(tmp_path, "charades_sta", path)
    assert not os.path.exists(tmp_path / "out.jsonl")
    questions, report = converted(tmp_path, "charades_sta", path, bad_spans="drop")
    assert len(questions) == 500 and "504 read = 500 written + 0 repeats + 4 with bad spans" in report


def test_reversed_bounds_of_an_mvbench_row_are_an_error_with_the_row(tmp_path):
    source, bounds = tmp_path / "action_sequence.json", {"start": 7.0, "end": 3.5}
    row = {"video": "a.mp4", "question": "q", "candidates": ["a", "b"], "answer": "a"} | bounds
    source.write_text(json.dumps([row]))
    with pytest.raises(BadInput, match=r"action_sequence.json, row 0: span \[7.0, 3.5\] is reversed"):
        convert("mvbench", [str(source)], str(tmp_path), str(tmp_path / "out.jsonl"))


def test_a_span_beyond_the_video_is_an_error_dropped_or_cut(tmp_path):
    source, out = tmp_path / "train.json", str(tmp_path / "out.jsonl")
    times = [[1, 5], [2, 9.5], [-0.1, 4], [9.5, 10]]
    moments = {"duration": 9.0, "timestamps": times, "sentences": [" One.", "Two.", "Three.", "Four."]}
    source.write_text(json.dumps({"v_a": moments}))
    give = "activitynet_captions", [str(source)], str(tmp_path), out
    with pytest.raises(
        BadInput,
        match=r"video v_a, moment 1: span \[2, 9.5\] is partly outside the video, 0 to 9.0 s \(and 2",
    ):
        convert(*give)
    convert(*give, "drop")
    assert [q.id for q in load_questions(out, "")] == ["v_a_0"]
    convert(*give, "clip")
    assert [q.spans for q in load_questions(out, "")] == [((1, 5),), ((2, 9.0),), ((0, 4),)]
    assert load_questions(out, "")[1].answer == "from 2 to 9.0 seconds"


@pytest.mark.parametrize(
    ("name", "file", "content", "column"),
    [
        ("msvd_qa", "val_qa.json", '[{"answer": "a", "question": "q", "video_id": 1}]', "id"),
        ("msrvtt_qa", "a.jsonl", '{"answer": "a", "question": "q", "video_id": "video1"}', "id"),
        ("next_qa", "val.csv", "video,question,answer,type,a0\n1,q,0,CW,x\n", "qid"),
        ("charades_sta", "a.txt", "AAAAA 1.0 2.0 somebody sits\n", "sentence"),
        ("activitynet_captions", "a.json", '{"v": {"duration": 3, "timestamps": []}}', "sentences"),
        ("video_mme", "a.jsonl", '{"question_id": "1"}', "videoID"),
        ("mvbench", "a.json", '[{"video": "a", "question": "q"}]', "candidates"),
        ("tempcompass", "yes_no.json", '{"1": {"action": [{"question": "q"}]}}', "answer"),
        ("video_chatgpt", "consistency_qa.json", '[{"Q": "q", "A": "a", "video_name": "v"}]', "Q1"),
    ],
)
def test_a_file_of_another_version_is_refused_by_the_missing_column(tmp_path, name, file, content, column):
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=f"{file}.*column '{column}' is missing"):
        convert(name, [str(tmp_path / file)], str(tmp_path), str(tmp_path / "out.jsonl"))


@needs_excerpts
def test_video_mme_is_read_from_its_own_parquet_file(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with open(os.path.join(ANNOTATIONS, "video_mme", "test-excerpt.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    (tmp_path / "mme").mkdir()
    path = str(tmp_path / "mme" / "test-00000-of-00001.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = converted(tmp_path, "video_mme", "video_mme/test-excerpt.jsonl")[0]
    for source in (path, os.path.dirname(path), "video_mme/test-excerpt.parquet"):
        assert converted(tmp_path, "video_mme", source)[0] == expected
    parquet.write_table(pyarrow.Table.from_pylist([{"question_id": "1", "question": "q"}]), path)
    with pytest.raises(BadInput, match="parquet, row 0: column 'videoID' is missing"):
        converted(tmp_path, "video_mme", path)
    (tmp_path / "mme" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInput, match="parquet: .*; give the original file$"):
        converted(tmp_path, "video_mme", path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(BadInput, match="parquet: parquet needs the package pyarrow: pip install pyarrow$"):
        converted(tmp_path, "video_mme", path)


@pytest.mark.parametrize("content", ["[1]", '{"1": [2]}', '{"1": {"action": {}}}'])
def test_a_file_of_another_shape_is_one_line(tmp_path, content):
    (tmp_path / "yes_no.json").write_text(content)
    with pytest.raises(BadInput, match=r"^\S+yes_no.json.*: no.*give the (file of the )?named version$"):
        convert("tempcompass", [str(tmp_path / "yes_no.json")], str(tmp_path), str(tmp_path / "out.jsonl"))


def test_repeats_are_counted_and_two_questions_of_one_id_refused(tmp_path):
    source, out = tmp_path / "train_qa.json", str(tmp_path / "out.jsonl")
    row = {"answer": "a", "question": "q", "id": 7, "video_id": 1}
    source.write_text(json.dumps([row, row]))
    assert "2 read = 1 written + 1 repeats" in convert("MSVD-QA", [str(source)], str(tmp_path), out)
    source.write_text(json.dumps([row, row | {"answer": "b"}]))
    with pytest.raises(BadInput, match="row 0 and .*row 1: two questions of id '7'"):
        convert("MSVD-QA", [str(source)], str(tmp_path), out)


def test_an_unknown_data_set_names_the_known_ones(tmp_path):
    with pytest.raises(BadInput, match="'imagenet' is not known.*video_mme") as error:
        convert("imagenet", [], str(tmp_path), "out")
    assert all(name in str(error.value) for name in NAMES)


def write_and_convert(tmp_path, name, file, content):
    (tmp_path / file).write_text(content, encoding="utf-8")
    out = str(tmp_path / "out.jsonl")
    report = convert(name, [str(tmp_path / file)], str(tmp_path), out)
    return load_questions(out, ""), report


def test_the_data_sets_own_answer_key_stays_where_two_options_share_a_text(tmp_path):
    rows = "\ufeffvideo,question,answer,qid,type,a0,a1,a2,a3,a4\n1,q,3,0,CW,sit,run,eat,run,fly\n"
    (question,) = write_and_convert(tmp_path, "next_qa", "val.csv", rows)[0]
    assert (question.answer_index, question.answer, question.benchmark) == (3, "run", "next_qa")
    row = {"question_id": "119-1", "videoID": "v", "duration": "short", "task_type": "OCR", "question": "q"}
    row |= {"options": ["A. two", "B. one", "C. two", "D. six"], "answer": "C"}
    (question,) = write_and_convert(tmp_path, "video_mme", "a.jsonl", json.dumps(row))[0]
    assert question.answer_index == 2


@pytest.mark.parametrize(
    ("name", "file", "row", "cause"),
    [
        (
            "video_mme",
            "a.jsonl",
            {"options": "['A. red' 'B. blue']"},
            "line 1: column 'options' is .* list of texts",
        ),
        (
            "video_mme",
            "a.jsonl",
            {"options": ["A. red"]},
            "line 1: column 'answer' is 'B', no letter of an option",
        ),
        ("msvd_qa", "val_qa.json", {"answer": 2}, "row 0: column 'answer' is 2, not a text"),
        ("msvd_qa", "val_qa.json", {"answer": " "}, "row 0: column 'answer' is \" \", not a text"),
        (
            "next_qa",
            "val.json",
            dict.fromkeys("video qid type a0 a1 a2 a3 a4".split(), "x") | {"answer": "9" * 5000},
            "row 0: column 'answer' is '9+', no index of an option",
        ),
    ],
)
def test_a_column_of_another_type_is_refused_by_row_and_column(tmp_path, name, file, row, cause):
    whole = dict.fromkeys("question_id videoID duration task_type question answer id video_id".split(), "x")
    row = whole | {"options": ["A. red", "B. blue"], "answer": "B"} | row
    with pytest.raises(BadInput, match=cause):
        write_and_convert(tmp_path, name, file, json.dumps(row if file.endswith("l") else [row]))
    assert not (tmp_path / "out.jsonl").exists()


def test_durations_as_text_are_refused_and_float_noise_behind_the_end_is_cut(tmp_path):
    video = {"duration": 9.5, "timestamps": [[1, 9.5000004]], "sentences": [" One."]}
    ((question,), _) = write_and_convert(
        tmp_path, "activitynet_captions", "a.json", json.dumps({"v_a": video})
    )
    assert question.spans == ((1, 9.5),) and question.answer == "from 1 to 9.5 seconds"
    with pytest.raises(BadInput, match="moment 0: span .* is partly outside"):
        late = video | {"timestamps": [[1, 9.50001]]}
        write_and_convert(tmp_path, "activitynet_captions", "a.json", json.dumps({"v_a": late}))
    with pytest.raises(BadInput, match="video v_a: column 'duration' is \"9.5\", not a number of seconds"):
        text = json.dumps({"v_a": video | {"duration": "9.5"}})
        write_and_convert(tmp_path, "activitynet_captions", "a.json", text)


def test_one_video_under_two_names_is_missing_once(tmp_path):
    rows = [{"Q": "q", "A": "a", "video_name": name} for name in ("v_abc", "abc")]
    _, report = write_and_convert(tmp_path, "video_chatgpt", "generic_qa.json", json.dumps(rows))
    assert report.count("missing video:") == 1 and "1 videos: 0 found, 1 missing" in report


@needs_excerpts
def test_a_re_export_of_msrvtt_without_ids_and_tempcompass_own_marks_are_read(tmp_path):
    questions, report = converted(tmp_path, "msrvtt", "msrvtt_qa/msrvtt_qa_val.jsonl")
    assert "300 read = 300 written" in report and questions["0"].category in ("what", "who")
    questions, _ = converted(tmp_path, "tempcompass", "tempcompass/caption_matching.json")
    first = next(iter(questions.values()))
    assert first.marks == ("Option 1", "Option 2") and "\nOption 1: " in prompt_text(first)


def written(tmp_path, name, value):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_a_row_that_would_be_lost_or_asks_nothing_is_refused_with_its_place(tmp_path):
    row = {"question_id": "1", "answer": "red", "type": 0}
    question = {"question_id": "1", "question": "what?", "video_name": "a"}
    written(tmp_path, "x_q.json", [question])
    written(tmp_path, "x_a.json", [row, row | {"answer": "blue"}])
    choice = {"question_id": "1", "videoID": "a", "duration": "short", "task_type": "t", "question": "what?"}
    csv = "question,answer,question_id,video_name\nwhat?,red,1,a\n"
    cases = {
        "activitynet_qa": (str(tmp_path / "x_q.json"), "has another answer at"),
        "video_mme": (
            written(tmp_path, "v.json", [choice | {"options": ["A. red"], "answer": "A"}]),
            "needs two",
        ),
        "charades_sta": (written(tmp_path, "c.txt", "AO8RW 0.0 6.9##  \n"), "column 'sentence' is missing"),
        "msrvtt_qa": (written(tmp_path, "m.json", [5]), "column 'question' is missing"),
        "msvd_qa": (written(tmp_path, "d.csv", csv), "column 'video_id' is missing"),
    }
    for name, (path, words) in cases.items():
        with pytest.raises(BadInput, match=words):
            list(NAMES[name][0](path))
