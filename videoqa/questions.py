"""Questions about videos, read from JSON lines, each field checked; and the videos themselves, checked."""

import json
import math
import os

import av

from plumbing.options import BadInput, one_line, read_jsonl
from videoqa.answers import Question, equal_option, read
from videoqa.video import FRAMES_SHARE, LATE_SECONDS, VideoError, open_video, too_short

NEEDED = ("id", "video", "question", "answer")
OPTIONAL = ("category", "duration_class", "benchmark")  # texts as well


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # bool is no number here


def is_span(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_below(path: str) -> bool:
    """Whether a path, joined to a folder, names something in the folder or below it."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


def _read_question(row: dict, videos_dir: str, where: str) -> Question:
    def need(good: bool, field: str, remedy: str):
        if not good:
            what = f"is {json.dumps(row[field])[:60]}" if field in row else "is missing"
            raise BadInput(f"{where}: field '{field}' {what}; {remedy}")

    for field in NEEDED:
        need(is_text(row.get(field)), field, "give a text that is not empty")
    need(is_below(row["video"]), "video", "give a path below --videos, or name a folder above it there")
    for field in OPTIONAL:
        need(isinstance(row.get(field, ""), str), field, "give a text or leave it out")
    options, index, duration = row.get("options"), row.get("answer_index"), row.get("duration")
    if options is not None or index is not None:
        good = isinstance(options, list) and len(options) >= 2 and all(map(is_text, options))
        need(good, "options", "give a list of at least two texts beside 'answer_index'")
        good = len(options) <= 26 or row.get("marks") is not None
        need(good, "options", f"there are {len(options)}, and letters for 26; give fewer, or 'marks'")
        good = type(index) is int and 0 <= index < len(options)
        need(good, "answer_index", f"give the right option as a whole number from 0 to {len(options) - 1}")
    field = "span" if row.get("span") is not None else "spans"
    need(field == "spans" or row.get("spans") is None, "spans", "give 'span' or 'spans', not both")
    spans = [row["span"]] if field == "span" else row.get("spans")
    good = spans is None or isinstance(spans, list) and spans != [] and all(map(is_span, spans))
    need(good, field, "give [start, end], two numbers in seconds; for 'spans' a list of such pairs")
    good = all(0 <= start < end for start, end in spans or ())
    need(good, field, "the start must be before the end, neither negative nor after the end")
    good = duration is None or is_number(duration) and duration > 0
    need(good, "duration", "give seconds > 0 or leave it out")
    good = all(duration is None or end <= duration for _, end in spans or ())
    need(good, field, f"it ends after the video, whose 'duration' is {duration} s; correct one of them")
    clip = row.get("clip")
    if clip is not None:
        need(is_span(clip), "clip", "give [start, end], two numbers in seconds, or leave it out")
        good = 0 <= clip[0] < clip[1] <= (clip[1] if duration is None else duration)
        need(good, "clip", "the start must be before the end, both within the video")
        good = all(clip[0] <= start and end <= clip[1] for start, end in spans or ())
        need(good, field, f"it is not within 'clip' {clip}, all that is shown; correct one of them")
    marks = row.get("marks")
    good = marks is None or isinstance(marks, list) and len(marks) == len(options or ())
    good = good and all(map(is_text, marks or ())) and len(set(marks or ())) == len(marks or ())
    need(good, "marks", "give a text of its own for each of 'options' or leave it out")
    texts = {name: row[name] for name in (*NEEDED, *OPTIONAL) if name in row}
    question = Question(
        **texts | {"video": os.path.normpath(os.path.join(videos_dir, row["video"]))},
        options=tuple(options or ()), answer_index=index, marks=tuple(marks or ()),
        spans=tuple(map(tuple, spans or ())), duration=duration, clip=tuple(clip) if clip else None,
    )  # fmt: skip
    answer, named = row["answer"], None  # an answer in other words than its option's names none
    if options and answer != options[index]:
        one_word = len(answer.split()) == 1  # perhaps a letter
        named = read(answer, question).option if one_word else equal_option(answer, question.options)
    need(named in (index, None), "answer", f"that is option {named}, 'answer_index' is {index}; correct one")
    return question


def load_questions(jsonl_path: str, videos_dir: str) -> list[Question]:
    """The questions of a JSONL file, video paths joined to videos_dir; opens no video.

    Blank lines, unknown fields and selection.py's report in line 1 are passed over.
    Raises BadInput at the first bad line.
    """
    questions, first_line = [], {}
    for where, row in read_jsonl(jsonl_path, "give a JSONL file of questions, one object {...} a line"):
        if not questions and row.keys() == {"selection"}:  # selection.py's report
            continue
        question = _read_question(row, videos_dir, where)
        number = where.rpartition(" ")[2]
        if (first := first_line.setdefault(question.id, number)) != number:
            raise BadInput(f"{where}: field 'id' repeats that of line {first}; make ids unique")
        questions.append(question)
    if not questions:
        raise BadInput(f"{jsonl_path}: holds no question; write one JSON object a line")
    return questions


def check_video(path: str, needed: float = 0.0) -> dict:
    """Decode the whole file and say what is there; a bad file is reported, not raised. So is one that ends
    before second `needed`.

    Returns {"ok": bool, "reason": str, empty if ok, "frames": those that decode, "fps": average, "duration":
    seconds, "codec", "width", "height"}; None stands for what could not be established.
    """
    path = os.fspath(path)
    facts = dict.fromkeys(("frames", "fps", "duration", "codec", "width", "height"))
    try:
        with open_video(path) as source:
            frames = damaged = refused = packets = corrupt = backwards = logged = 0
            cause, previous = "", -math.inf
            stream, codec = source.stream, source.stream.codec_context
            facts |= dict(codec=codec.name, width=codec.width, height=codec.height)
            for packet, _ in source:
                packets += packet.size > 0 and not packet.is_discard
                corrupt += packet.is_corrupt
                reported = source.reported()
                source.logs.clear()
                try:
                    decoded = packet.decode()
                except av.FFmpegError as error:
                    refused, cause, decoded = refused + 1, error.strerror, []
                else:
                    logged += bool(source.logs or reported)
                frames += len(decoded)
                damaged += sum(frame.is_corrupt for frame in decoded)
                times = [frame.pts for frame in decoded if frame.pts is not None and not source.by_order]
                for time in times:
                    backwards, previous = backwards + source.goes_back(previous, time), time
            source.outlasted()
            seconds = float((source.end - source.zero) * source.tick)
            fps = float(stream.average_rate or frames / max(seconds, 1e-3))
            facts |= dict(frames=frames, fps=fps, duration=seconds)
            fault = source.fault()
            found = {
                f"{refused} packets cannot be decoded ({cause})": refused,
                f"{logged} packets are read or decoded with errors": logged,
                f"{damaged} of {frames} decoded frames are damaged": damaged,
                f"{corrupt} packets are damaged": corrupt,
                f"packets are missing in {source.holes} places": source.holes,
                f"its time stamps go back in {backwards} places": backwards,
                f"{frames} of {packets} frames decoded": not frames or frames < FRAMES_SHARE * packets,
                fault: fault,
                too_short(seconds, needed): needed - seconds > LATE_SECONDS,
            }
            faults = [words for words, is_so in found.items() if is_so]
    except VideoError as error:
        faults = [error.cause]
    return {"ok": not faults, "reason": "; ".join(faults), **facts}


def check(jsonl_path: str, videos_dir: str) -> bool:
    """Print a line for every distinct video and a summary; True if all are sound."""
    ends = {}  # of every video, the last moment that is asked for
    for question in load_questions(jsonl_path, videos_dir):
        asked = [end for _, end in (*question.spans, question.clip or (0.0, 0.0))]
        ends[question.video] = max(ends.get(question.video, 0.0), *asked)
    num_ok = 0
    for video, end in ends.items():
        facts = check_video(video, end)
        num_ok += facts["ok"]
        parts = ["ok  " if facts["ok"] else "FAIL", one_line(video), facts["reason"]]
        if facts["codec"]:
            about = "{frames} frames, {fps:.3f} fps, {duration:.2f} s, {codec} {width}x{height}"
            parts.append(about.format_map(facts))
        print("  ".join(filter(None, parts)), flush=True)
    print(f"{len(ends)} videos: {num_ok} ok, {len(ends) - num_ok} failed")
    return num_ok == len(ends)
