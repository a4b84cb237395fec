"""1,000 answers of the kinds that models write: none is misread, at least 95 % are read. And what was read
before the issue on published figures is read the same."""

import json
from pathlib import Path
from time import perf_counter

from videoqa.answers import Question, parse_span, read, reward
from videoqa.published import last_statement

OPTIONS = [
    ("a red ball", "a green cup", "a blue box", "a yellow hat"),
    ("The man runs", "The man sits down", "The man jumps", "The man sleeps"),
    ("left", "right", "up", "down"),
    ("2", "3", "4", "5"),
    ("to play with the dog", "because it is raining", "to get some food", "he is tired"),
]
# L, l, F: the right letter, as a capital, small, full-width; o: its text; N: its number; W: a wrong letter
CHOICES = [
    "{L}",
    "({L})",
    "{L}.",
    "{L}) {o}",
    "({L}) {o}",
    "{L}. {o}",
    "{L}: {o}",
    "**{L}**",
    "{l}",
    "({l})",
    "Answer: {L}",
    "Answer: {l}",
    "The answer is {L}.",
    "The correct answer is ({L}).",
    "The best option is {L}. {o}",
    "<answer>{L}</answer>",
    "<think>Could be {W} or {L}.</think><answer>({L})</answer>",
    "{F}",
    "（{F}）",
    "答案是{L}。",
    "选{L}",
    "答案：{L}",
    "Option {L}",
    "Option {N}",
    "Caption {L}",
    "option {l}",
    "{o}",
    "{o}.",
    "I think it is {L} because of the video.",
    "Let me think. ({W}) is wrong since the video shows otherwise. So the final answer is ({L}).",
    "{W} does not fit the video, and the rest is unclear. Final answer: {L}",
    "Therefore, the answer is {L}.",
    "final answer is ({L})",
    "Based on the video, the correct option is {L}: {o}",
    "I would choose option {L}.",
    "It is not {W}, so it must be {L}",
    "Step 1: I see {W}-like things.\nStep 2: they go.\n\nAnswer: {L}",
    "The right choice is {L}",
    "$\\boxed{{{L}}}$",
    "My answer: ({l})",
    "Sentence {L}.",
    "The {nth} option.",
    "{L}\n\nExplanation: the video shows it.",
    "Among the options, {L} is the best.",
]
NO_CHOICES = [
    "I'm not sure.",
    "I don't know",
    "It is {L} or {W}",
    "{L} and {W}",
    "I cannot tell from the video.",
    "A man walks by",
    "It is not clear",
    "Neither {L} nor {W}",
]
SPANS = [
    "from {a} to {b} seconds",
    "{a} - {b}",
    "{a}–{b} s",
    "between {a} and {b} seconds",
    "[{a}, {b}]",
    "({a}, {b})",
    "{a}s to {b}s",
    "starts at {a} and ends at {b}",
    "begins at {a} s and finishes at {b} s",
    "It begins at {a} and ends at {b} seconds.",
    '{{"start": {a}, "end": {b}}}',
    '{{"start":{a},"end":{b}}}',
    "<answer>{a} to {b}</answer>",
    "<think>0 to 99</think><answer>from {a} to {b}</answer>",
    "{a} up to {b}",
    "from {a} until {b} sec",
    "{a} and {b}",
    "{a}, {b}",
    "{a} ~ {b}",
    "{a} --> {b}",
    "about {a} to about {b} seconds",
    "from {a} seconds to {b} seconds (frames 150 to 360)",
    "frames 150 to 360, i.e. {a} to {b} s",
    "The event happens from {a} to {b}.",
    "{a} seconds to {b} seconds",
    "start_time: {a}, end_time: {b}",
    "From second {a} to second {b}",
    "{a} through {b}",
    "{a} s until {b} s",
    "0 to 1, no: {a} to {b} seconds",
    "[[{a}, {b}]]",
    "{a} to {b} seconds, confidence 8 to 10",
]
TIMED = [
    "from {a} to {b}",
    "{a} - {b}",
    "between {a} and {b}",
    "starts at {a} and ends at {b}",
    "{a} --> {b}",
    "{a} to {b}",
    "from {a} up to {b}",
    "begins at {a}, finishes at {b}",
    "{a} until {b}",
    "<answer>{a} to {b}</answer>",
    "The event is from {a} to {b}.",
]
NO_SPANS = [
    "frames 150 to 360",
    "minutes 1 to 2",
    "start_frame: 150, end_frame: 360",
    "from 5% to 20%",
    "5 to 10 minutes",
    "frame range: [150, 360]",
    "frames from 30 to 60",
    "I'm not sure",
    "2024-05-10",
    "at 5 seconds",
    "Frame 30 - 60",
    "minute 2 - 3",
    "hours 1 to 2",
    "from 12 to 30 frames",
    "30% - 60%",
    "pages 3 to 9",
]
BEFORE = Path(__file__).parent / "readings_before.json"


def asked(options, i=0):
    return Question("0", "a.mp4", "What is it?", options[i], options=options, answer_index=i)


def multiple_choice():
    """(text, options, right index, or None where nothing may be read)"""
    out = []
    for options in OPTIONS:
        for i, right in enumerate(options):
            letters = {"L": "ABCD"[i], "l": "abcd"[i], "F": "ＡＢＣＤ"[i], "W": "BCDA"[i]}
            names = {"o": right, "N": i + 1, "nth": ("first", "second", "third", "fourth")[i]}
            numbers = options[0].isdigit()  # "Option 2" of the options 2, 3, 4, 5 could be either
            out += [
                (text.format(**letters, **names), options, i)
                for text in CHOICES
                if not (numbers and "{N}" in text)
            ]
    return out + [
        (text.format(L="C", W="A"), options, None) for text in NO_CHOICES for options in OPTIONS[:2]
    ]


def clock(seconds):
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def srt(seconds):
    return f"00:{int(seconds // 60):02d}:{int(seconds % 60):02d},{round(seconds % 1 * 1000):03d}"


def grounding():
    """(text, right span, or None where nothing may be read)"""
    pairs = (3, 9), (12.5, 18.25), (0, 30), (0.5, 7), (41, 42.5), (7.25, 11), (100, 104.5), (23, 61)
    out = [(text.format(a=a, b=b), (a, b)) for text in SPANS for a, b in pairs]
    out += [(text.format(a=clock(65), b=clock(80)), (65, 80)) for text in SPANS]
    writers = [srt, lambda x: str(x).replace(".", ",")]  # 00:00:03,500 and 3,5
    for text in TIMED:
        for a, b in ((3.5, 9.25), (12.5, 20.75), (65.5, 70.25), (0.5, 31.5)):
            out += [(text.format(a=write(a), b=write(b)), (a, b)) for write in writers]
        for a, b in ((65, 80), (130, 200)):
            minutes = [f"{x // 60}m{x % 60}s" for x in (a, b)]
            out.append((text.format(a=minutes[0], b=minutes[1]), (a, b)))
            out.append((text.format(a=f"{1000 * a} ms", b=f"{1000 * b} milliseconds"), (a, b)))
            out.append((text.format(a=clock(a).replace(":", "："), b=clock(b).replace(":", "：")), (a, b)))
        out.append((text.format(a="1,003", b="1,009"), (1003, 1009)))
        out.append((text.format(a="1:03:00", b="1:09:30.5"), (3780, 4170.5)))
        out += [(text.format(a="５", b="１２"), (5, 12)), (text.format(a="two", b="five"), (2, 5))]
    return out + [(text, None) for text in NO_SPANS]


def test_of_500_and_more_choices_none_is_misread_and_95_percent_are_read():
    rows = multiple_choice()
    readings = [last_statement(text, asked(options)) for text, options, _ in rows]
    wrong = [row for row, got in zip(rows, readings, strict=True) if got not in (None, row[2])]
    readable = [got for (_, _, right), got in zip(rows, readings, strict=True) if right is not None]
    assert len(rows) >= 500 and wrong == []
    assert sum(got is not None for got in readable) >= 0.95 * len(readable)


def test_the_strict_reading_hedges_and_never_misreads_one_of_them():
    for text, options, right in multiple_choice():
        assert read(text, asked(options)).option in (None, right), text


def test_of_500_and_more_spans_none_is_misread_and_95_percent_are_read():
    rows = grounding()
    readings = [parse_span(text) for text, _ in rows]

    def same(a, b):
        return b is not None and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-6

    wrong = [row for row, got in zip(rows, readings, strict=True) if got and not same(got, row[1])]
    readable = [got for (_, right), got in zip(rows, readings, strict=True) if right is not None]
    assert len(rows) >= 500 and wrong == []
    assert sum(got is not None for got in readable) >= 0.95 * len(readable)


def test_rewards_of_strings_whose_meaning_did_not_change_are_those_of_before():
    """The file was written by the parser of commit 94ae082; strings that it misread are left out."""
    span, open_ended = ((2.0, 8.0),), Question("0", "a.mp4", "What color is it?", "red")
    kinds = {
        "choice": asked(OPTIONS[0]),
        "span": Question("0", "a.mp4", "When?", "", spans=span),
        "open": open_ended,
    }
    for kind, text, parts in json.loads(BEFORE.read_text(encoding="utf-8")):
        assert list(reward(text, kinds[kind]).key()) == parts, (kind, text)


def test_refusals_are_never_the_option_no_and_the_first_word_is_read_in_training_too():
    moves = Question("0", "a.mp4", "Does it move up?", "no", options=("yes", "no"), answer_index=1)
    for text in ("I'm not sure", "I don't know", "It is not clear", "No idea", "There is no way to tell"):
        assert read(text, moves).option is last_statement(text, moves) is None, text
    assert read("No, it moves down.", moves).option == 1
    spoken = Question("0", "a.mp4", "Does it move up?", "no")
    assert [reward(t, spoken).discrete for t in ("No, it moves down.", "Yes, it does.", "I'm not sure")] == [
        1,
        0,
        0,
    ]


def test_options_that_are_letters_are_chosen_by_the_letter_of_their_place():
    options = ("t", "a", "c")
    assert {read(t, asked(options)).option for t in ("A", "(A)", "A.", "(A) t", "Answer: A", "t")} == {0}


def test_the_time_to_read_any_tags_grows_with_their_length_alone():
    for tag in ("<think>", "<answer>", "<glue>"):
        start = perf_counter()
        reward(tag * 30_000, asked(OPTIONS[0]))
        assert perf_counter() - start < 2, tag  # 0.02 s; looking for an end from every tag on takes minutes


def test_the_time_to_look_for_a_refusal_grows_with_the_length_alone():
    moves = Question("0", "a.mp4", "Does it move up?", "no", options=("yes", "no"), answer_index=1)
    start = perf_counter()
    last_statement("not A " * 20_000, moves)
    reward("not A " * 20_000, moves)
    assert perf_counter() - start < 5  # 0.3 s; a minute if every "not" looks to the end of the text
