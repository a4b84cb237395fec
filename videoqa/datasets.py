"""Public data sets, from their own annotation files to this repository's questions: data.py convert.

Every row is accounted for: written, an exact repeat of another (dropped, counted), or refused with its place.
Ids are the data set's own keys, so that other people's predictions can be joined. Rows whose video the folder
lacks are written too (predictions are scored without videos); the videos are listed once, with the total.
"""

import csv
import fnmatch
import io
import json
import math
import os
import re
from collections import defaultdict

from plumbing.options import (
    BadInput,
    is_kind,
    json_lines,
    one_line,
    parse_json,
    read_text,
    refuse_same,
    write_whole,
)
from videoqa.questions import is_number, is_span, is_text

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".gif")
ACTIVITYNET_TYPES = "motion spatial temporal yes/no color object location number other".split()
ACTIVITYNET_TYPES = {str(number): name for number, name in enumerate(ACTIVITYNET_TYPES)}
# MVBench's own video folders: tell apart files of one name
MVBENCH_FOLDERS = {
    "star": ("action_sequence", "action_prediction", "object_interaction"),
    "clevrer": ("object_existence", "moving_direction", "moving_count", "moving_attribute"),
    "perception": ("object_shuffle", "action_count", "state_change", "character_order"),
    "clevrer/video_validation": ("counterfactual_inference",),
    "sta": ("action_localization",),
}  # fmt: skip
MVBENCH_FOLDER_OF = {task: folder for folder, tasks in MVBENCH_FOLDERS.items() for task in tasks}
ORIGINAL = "give the original file"
OUTSIDE = "outside the video"
SPAN_TOLERANCE = 1e-6  # s; a span may exceed its video by so much, which is float noise, and is cut there
# what a column may hold, and how it is named to someone whose file holds something else
KINDS = {
    "text": (is_text, "a text"),
    "key": (lambda value: type(value) is int or is_text(value), "a text or an id"),
    "seconds": (lambda value: is_number(value) and value > 0, "a number of seconds"),
    "texts": (lambda value: is_kind(value, list[str]), "a list of texts"),
    "spans": (lambda value: isinstance(value, list) and all(map(is_span, value)), "a list of [start, end]"),
    "object": (lambda value: isinstance(value, dict), "an object"),
}


def _need(row, where: str, columns: str | list[str]) -> list:
    """The values of these columns, "name name:kind .." or a list of such. kind: of KINDS, text by default; a
    key comes as a text. BadInput names the first column that is not there or holds something else."""
    values = []
    for column in columns.split() if isinstance(columns, str) else columns:
        name, _, kind = column.partition(":")
        if not isinstance(row, dict) or row.get(name) is None:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else "no columns"
            words = f"column '{name}' is missing (there: {has[:200]})"
            raise BadInput(f"{where}: {words}; give the data set's own file")
        value, (good, words) = row[name], KINDS[kind or "text"]
        if value == "":
            raise BadInput(f"{where}: column '{name}' is empty; correct the row")
        if not good(value):
            shown = json.dumps(value, ensure_ascii=False)[:60]
            raise BadInput(f"{where}: column '{name}' is {shown}, not {words}; give the data set's own file")
        values.append(str(value) if kind == "key" else value)
    return values


def _json(path: str, kind: type, words: str):
    """A file's JSON value. BadInput: it is not of this kind, in words "an object of videos"."""
    value = parse_json(read_text(path, ORIGINAL), path, ORIGINAL)
    if not isinstance(value, kind):
        raise BadInput(f"{path}: not {words}; give the file of the named version")
    return value


def _parquet(path: str) -> list[dict]:
    try:
        import pyarrow.parquet  # Video-MME's own file; a format of its own, and no other data set here has it
    except ImportError as error:
        raise BadInput(f"{path}: parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0]}; {ORIGINAL}") from error


def _lines(path: str) -> list[tuple[int, str]]:
    """(number, line) of a text file, from 1, without its blank lines."""
    return [(i, x) for i, x in enumerate(read_text(path, ORIGINAL).split("\n"), start=1) if x.strip()]


def _rows(path: str) -> list[tuple[str, dict]]:
    """(place, row) of a CSV, JSON list, JSON lines or parquet file."""
    if path.endswith(".csv"):
        table = csv.DictReader(io.StringIO(read_text(path, ORIGINAL), newline=""), strict=True)
        try:
            rows = [(f"{path}, line {table.line_num}", row) for row in table]
        except csv.Error as error:
            raise BadInput(f"{path}, line {table.line_num}: {error}; {ORIGINAL}") from error
        if longer := [where for where, row in rows if None in row]:
            raise BadInput(f"{longer[0]}: has more fields than line 1 has columns; {ORIGINAL}")
        return rows
    if path.endswith(".jsonl"):
        numbered = [(f"{path}, line {i}", line) for i, line in _lines(path)]
        return [(where, parse_json(line, where, ORIGINAL)) for where, line in numbered]
    rows = _parquet(path) if path.endswith(".parquet") else _json(path, list, "a list of rows")
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows)]


def _choice(where: str, options: list[str], index: int | str) -> dict:
    """Columns of a question whose right option is given by its index (0 = the first) or, where there is
    none, by its text; of two options of that text the first is taken."""
    if isinstance(index, str):
        if index not in options:
            raise BadInput(f"{where}: answer {index!r} is none of the options {options}; correct the row")
        index = options.index(index)
    if len(options) < 2:
        raise BadInput(f"{where}: its options are {options}, and a choice needs two; correct the row")
    if empty := [i for i, option in enumerate(options) if not option.strip()]:
        raise BadInput(f"{where}: option {empty[0]} is empty; correct the row")
    return {"answer": options[index], "options": options, "answer_index": index}


def _names(video: str) -> tuple[str, str]:
    """Of a video of ActivityNet, with and without the "v_" of its file."""
    bare = video.removeprefix("v_")
    return f"v_{bare}", bare


# Each reader yields (place, row): an output row with "videos", the names its file may have, for "video".


def msvd_qa(path):
    mapping = os.path.join(os.path.dirname(path), "youtube_mapping.txt")
    lines = read_text(mapping, ORIGINAL).splitlines() if os.path.exists(mapping) else []
    pairs = [line.split() for line in lines]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise BadInput(f"{mapping}: {' '.join(wrong[0])!r} is no line <clip> <video>; {ORIGINAL}")
    clip_of = {name: clip for clip, name in pairs}
    for where, row in _rows(path):
        if path.endswith(".csv"):  # a re-export: question_id is <video>_<id>
            columns = "question answer question_id video_name video_id:key"
            question, answer, key, clip, video = _need(row, where, columns)
            names, key = (clip, f"vid{video}"), key.rpartition("_")[2]
        else:
            question, answer, key, video = _need(row, where, "question answer id:key video_id:key")
            names = (clip_of.get(f"vid{video}", f"vid{video}"), f"vid{video}")
        kind = question.split()[0].lower()  # what, who, how, when, where: the published columns
        yield where, {"id": key, "videos": names, "question": question, "answer": answer, "category": kind}


def msrvtt_qa(path):
    for i, (where, row) in enumerate(_rows(path)):
        key = "question_id:key" if path.endswith(".csv") else "id:key"
        if isinstance(row, dict) and "answer_type" in row and "id" not in row:
            key, row = "id:key", row | {"id": i}  # a re-export without ids: they are the row's number
        question, answer, key, video = _need(row, where, f"question answer {key} video_id:key")
        names, kind = (f"video{video.removeprefix('video')}",), question.split()[0].lower()
        yield where, {"id": key, "videos": names, "question": question, "answer": answer, "category": kind}


def activitynet_qa(path):
    rows, answers = _rows(path), {}
    beside = re.sub(r"_q(?=\.json$)", "_a", path)
    for where, row in [] if path.endswith(".csv") else _rows(beside):
        (key,) = _need(row, where, "question_id:key")
        if answers.setdefault(key, (where, row))[1] != row:
            words = f"question_id {key!r} has another answer at {answers[key][0]}"
            raise BadInput(f"{where}: {words}; give both files of one split")
    for where, row in rows:
        question, key, video = _need(row, where, "question question_id:key video_name")
        if answers and key not in answers:
            words = f"question_id {key!r} has no answer in {beside}"
            raise BadInput(f"{where}: {words}; give both files of one split")
        place, other = answers[key] if answers else (where, row)
        answer, kind = _need(other, place, f"answer {'' if answers else 'question_'}type:key")
        if kind not in ACTIVITYNET_TYPES:
            raise BadInput(f"{place}: question type {kind!r} is none of 0 to 8; give the data set's own file")
        out = {"id": key, "videos": _names(video), "question": question, "answer": answer}
        yield where, out | {"category": ACTIVITYNET_TYPES[kind]}


def next_qa(path):
    for where, row in _rows(path):
        columns = "video:key question answer:key qid:key type a0 a1 a2 a3 a4"
        video, question, answer, key, kind, *options = _need(row, where, columns)
        index = re.fullmatch(r"\s*(\d{1,9})(?:\.0)?\s*", answer, re.ASCII)  # pandas: 2.0 beside a gap
        if not index or int(index[1]) >= len(options):
            words = f"column 'answer' is {answer!r}, no index of an option"
            raise BadInput(f"{where}: {words}; give the named version")
        out = {"id": f"{video}_{key}", "videos": (video,), "question": question, "category": kind}
        yield where, out | _choice(where, options, int(index[1]))


def next_gqa(path):
    folder, name = os.path.split(path)
    spans_path = os.path.join(folder, f"gsub_{name.removesuffix('.csv')}.json")
    located = _json(spans_path, dict, "an object of videos")
    for where, row in _rows(path):
        columns = "video_id:key question answer:key qid:key type a0 a1 a2 a3 a4"
        video, question, answer, key, kind, *options = _need(row, where, columns)
        place = f"{spans_path}, video {video}"
        duration, location = _need(located.get(video), place, "duration:seconds location:object")
        (spans,) = _need(location, place, [f"{key}:spans"])
        out = {"id": f"{video}_{key}", "videos": (video,), "question": question, "category": kind}
        yield where, out | _choice(where, options, answer) | {"spans": spans, "duration": duration}


def charades_sta(path):
    for i, line in _lines(path):
        where = f"{path}, line {i}"
        head, _, sentence = line.partition("##")
        parts = head.split()
        if not sentence.strip() or len(parts) != 3:
            column = "start, end" if sentence.strip() else "sentence"
            words = f"column '{column}' is missing"
            raise BadInput(f"{where}: {words}; a line is <video> <start> <end>##<sentence>")
        try:
            span = [float(part) for part in parts[1:]]
        except ValueError:
            words = f"start and end must be seconds, got {parts[1:]}"
            raise BadInput(f"{where}: {words}; correct the line") from None
        yield where, {"id": str(i - 1), "videos": (parts[0],), **_moment(sentence, span)}


def _moment(sentence: str, span: list[float]) -> dict:
    return {
        "question": f'When does this happen: "{sentence.strip()}"?',
        "answer": f"from {span[0]} to {span[1]} seconds",
        "spans": [span],
        "category": "Temporal Grounding",
    }


def activitynet_captions(path):
    for video, row in _json(path, dict, "an object of videos").items():
        place = f"{path}, video {video}"
        duration, spans, sentences = _need(row, place, "duration:seconds timestamps:spans sentences:texts")
        if len(spans) != len(sentences):
            raise BadInput(f"{place}: {len(spans)} timestamps, {len(sentences)} sentences; correct the video")
        for i, (span, sentence) in enumerate(zip(spans, sentences, strict=True)):
            out = {"id": f"{video}_{i}", "videos": _names(video), "duration": duration}
            yield f"{place}, moment {i}", out | _moment(sentence, span)


def video_mme(path):
    for where, row in _rows(path):
        columns = "question_id:key videoID duration task_type question options:texts answer"
        key, video, length, kind, question, lettered, answer = _need(row, where, columns)
        options = [re.sub(r"^[A-Z]\.\s*", "", option) for option in lettered]
        letter = re.fullmatch(r"\s*([A-Z])\.?\s*", answer)
        if not letter or ord(letter[1]) - ord("A") >= len(options):
            raise BadInput(f"{where}: column 'answer' is {answer!r}, no letter of an option; correct the row")
        out = {"id": key, "videos": (video,), "question": question, "category": kind}
        out |= _choice(where, options, ord(letter[1]) - ord("A"))
        yield where, out | {"duration_class": length}


def mvbench(path):
    task = os.path.basename(path).removesuffix(".json")
    for i, (where, row) in enumerate(_rows(path)):
        video, question, options, answer = _need(row, where, "video question candidates:texts answer")
        out = {"id": f"{task}_{i}", "videos": (video,), "question": question, "category": task}
        # five rows of the data set offer a single candidate: no choice, so they are asked openly
        out |= _choice(where, options, answer) if len(options) > 1 else {"answer": answer}
        cut = {"clip": [row["start"], row.get("end")]} if "start" in row else {}
        yield where, out | cut | {"folder": MVBENCH_FOLDER_OF.get(task, "")}


def _tempcompass_rows(path):
    """(place, video, aspect, number, row) of {video: {aspect: [row, ..]}}."""
    for video, aspects in _json(path, dict, "an object of videos").items():
        place = f"{path}, video {video}"
        if not isinstance(aspects, dict) or not all(isinstance(rows, list) for rows in aspects.values()):
            raise BadInput(f"{place}: no lists of questions by aspect; give the named version")
        for aspect, rows in aspects.items():
            yield from ((f"{place}, {aspect} {i}", video, aspect, i, row) for i, row in enumerate(rows))


def tempcompass(path):
    task = os.path.basename(path).removesuffix(".json")
    mark_and_text = r"^((?:Option|Sentence|Caption|Information) [A-Z1-9]|[A-Z1-9])[.:]\s*(.*)"
    for where, video, aspect, i, row in _tempcompass_rows(path):
        question, answer = _need(row, where, "question answer")
        out = {"id": f"{video}_{task}_{aspect}_{i}", "videos": (video,), "question": question}
        out |= {"answer": answer, "category": f"{task}, {aspect}", "benchmark": f"tempcompass {task}"}
        if task == "yes_no":
            yield where, out
            continue
        pairs = re.findall(mark_and_text, question, flags=re.MULTILINE)
        marks, options = [mark for mark, _ in pairs], [text.strip() for _, text in pairs]
        chosen = re.match(mark_and_text, answer)
        letters = [mark[-1] for mark in marks]  # of "Information A" in a question, of "A" in an answer
        if not chosen or chosen[1][-1] not in letters:
            raise BadInput(f"{where}: answer {answer!r} names no option; correct the row")
        if task == "captioning":  # to be written, not an option to be named: judged against the right option
            yield where, out | {"answer": chosen[2]}
            continue
        out["question"] = question.split("\n")[0]
        yield where, out | _choice(where, options, letters.index(chosen[1][-1])) | {"marks": marks}


def video_chatgpt(path):
    part = os.path.basename(path).removesuffix(".json").removesuffix("_qa")
    for i, (where, row) in enumerate(_rows(path)):
        wordings = "Q1 Q2" if part == "consistency" else "Q"
        *questions, answer, video = _need(row, where, f"{wordings} A video_name")
        for wording, question in zip(wordings.split(), questions, strict=True):
            key = f"{part}_{i}{wording[1:] and '_' + wording[1:]}"
            out = {"id": key, "videos": _names(video), "question": question, "answer": answer}
            yield where, out | {"category": part}


# reader, and which files of a folder it reads: those of the first pattern that any of them has
NAMES = {
    "msvd_qa": (msvd_qa, "*_qa.json"),
    "msrvtt_qa": (msrvtt_qa, "*.json"),
    "activitynet_qa": (activitynet_qa, "*_q.json"),
    "next_qa": (next_qa, "*.csv"),
    "next_gqa": (next_gqa, "*.csv"),
    "charades_sta": (charades_sta, "charades_sta_*.txt"),
    "activitynet_captions": (activitynet_captions, "*.json"),
    "video_mme": (video_mme, "*.jsonl *.parquet"),
    "mvbench": (mvbench, "*.json"),
    "tempcompass": (tempcompass, "*.json"),
    "video_chatgpt": (video_chatgpt, "*_qa.json"),
}
ALIASES = {name.replace("_", ""): name for name in NAMES}
ALIASES |= {"msvd": "msvd_qa", "msrvtt": "msrvtt_qa", "charades": "charades_sta"}
# read together with the file that they lie beside, and never alone
COMPANIONS = r"(?:_a|(?:gsub|upbd|frame2time)_\w+|meta_info|map_vid_vidorID)\.json$|youtube_mapping\.txt$"


def _files(annotations: list[str], patterns: str) -> list[str]:
    files = []
    for path in annotations:
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file or folder; give the annotations")
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        matching = next(filter(None, (fnmatch.filter(names, p) for p in patterns.split())), [])
        if os.path.isdir(path) and not matching:
            raise BadInput(f"{path}: no file in it is named like {patterns}; name the annotation files")
        files += [os.path.join(path, name) for name in matching] or [path]
    return [path for path in files if not re.search(COMPANIONS, path)]


def _index_videos(folder: str) -> dict[str, list[str]]:
    """Relative paths of the folder's files by path, name and name without its ending."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such folder; name the one that holds the videos")
    found = defaultdict(list)
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            path = os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
            for key in {path, name, stem} if suffix.lower() in VIDEO_SUFFIXES else ():
                found[key].append(path)
    return found


def _place_video(names: tuple[str, ...], folder: str, found: dict, where: str) -> tuple[str, bool]:
    """(relative path, whether it is there) of the first name that the folder has."""
    for name in names:
        stem, suffix = os.path.splitext(os.path.basename(name))
        keys = [name, stem + suffix, *([stem] if suffix.lower() in VIDEO_SUFFIXES else [])]
        paths = next(filter(None, map(found.get, keys)), [])
        if len(paths) > 1 and folder:
            paths = [path for path in paths if f"/{folder}/" in f"/{path}"] or paths
        if len(paths) > 1:
            raise BadInput(f"{where}: video {name!r} is there twice, {paths[0]} and {paths[1]}; keep one")
        if paths:
            return paths[0], True
    has_suffix = names[0].lower().endswith(VIDEO_SUFFIXES)
    return names[0] if has_suffix else f"{names[0]}.mp4", False


def _cut(row: dict, most: float) -> dict:
    """The row with its spans cut at the video's bounds, if none exceeds them by more than `most` seconds."""
    spans, duration = row.get("spans"), row.get("duration", math.inf)
    if not spans or _span_fault(row | {"duration": duration + most}, -most):
        return row
    spans = [[max(start, 0), min(end, duration)] for start, end in spans]
    if spans != row["spans"] and row["category"] == "Temporal Grounding":
        row = row | {"answer": "from {} to {} seconds".format(*spans[0])}
    return row | {"spans": spans}


def _span_fault(row: dict, first: float = 0) -> str:
    """What is wrong with the first bad one of the row's spans and its clip; "": nothing."""
    duration = row.get("duration")
    for span in [*row.get("spans", ()), *([row["clip"]] if "clip" in row else ())]:
        if not is_span(span):
            return f"span {span} is not two numbers"
        start, end = span
        if not start < end:
            return f"span {span} is reversed or empty"
        if start < first or (duration is not None and end > duration):
            return f"span {span} is partly {OUTSIDE}, 0 to {duration} s"
    return ""


def convert(name: str, annotations: list[str], videos: str, out: str, bad_spans: str = "error") -> str:
    """Writes the questions of a public data set as JSON lines and returns the report.

    bad_spans: "error" stops at rows whose span is reversed, empty or beyond the video; "drop" leaves
    such rows out; "clip" cuts spans at the video's bounds and drops what is still bad. Either is reported.
    """
    key = ALIASES.get(re.sub(r"[-._ ]", "", name.lower()))
    if key is None:
        raise BadInput(f"data set {name!r} is not known; give one of {', '.join(NAMES)}")
    reader, patterns = NAMES[key]
    annotations, found = _files(annotations, patterns), _index_videos(videos)
    read = {os.path.join(videos, path) for paths in found.values() for path in paths}
    refuse_same(out, *annotations, *read)
    rows, place_of = {}, {}
    num_read = num_repeats = num_clipped = 0
    is_there, faults = {}, []
    for where, row in (pair for path in annotations for pair in reader(path)):
        num_read += 1
        video, there = _place_video(row.pop("videos"), row.pop("folder", ""), found, where)
        is_there[video] = there
        row = _cut({"id": row.pop("id"), "video": video, "benchmark": key, **row}, SPAN_TOLERANCE)
        fault = _span_fault(row)
        if bad_spans == "clip" and OUTSIDE in fault:
            row = _cut(row, math.inf)
            fault = _span_fault(row)
            num_clipped += not fault
        if fault:
            faults.append(f"{where}: {fault}")
        elif row["id"] not in rows:
            rows[row["id"]], place_of[row["id"]] = row, where
        elif rows[row["id"]] == row:
            num_repeats += 1
        else:
            places = f"{place_of[row['id']]} and {where}"
            raise BadInput(f"{places}: two questions of id {row['id']!r}; convert one split at a time")
    if faults and bad_spans == "error":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BadInput(f"{faults[0]}{more}; correct it, or --bad_spans drop|clip")
    if not rows:
        raise BadInput(f"{annotations[0]}: holds no usable question; give the annotations of {key}")
    write_whole(out, json_lines(rows.values()).encode())
    report = [f"bad span, dropped: {fault}" for fault in faults]
    missing = [video for video, there in is_there.items() if not there]
    report += [f"missing video: {video}" for video in missing]
    parts = f"{len(rows)} written + {num_repeats} repeats + {len(faults)} with bad spans"
    report.append(f"{num_read} read = {parts}")
    num_found = sum(is_there.values())
    report.append(f"{len(is_there)} videos: {num_found} found, {len(missing)} missing in {videos}")
    if num_clipped:
        report.append(f"{num_clipped} questions with a span cut at the video's bounds")
    if num_cuts := sum("clip" in row for row in rows.values()):
        report.append(f"{num_cuts} questions are about a part of their video: field 'clip', in seconds")
    return "\n".join(map(one_line, report))
