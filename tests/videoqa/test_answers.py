import math
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from videoqa import answers
from videoqa.answers import (
    Question,
    Reward,
    bootstrap_ci,
    grade,
    instruction,
    iop,
    iou,
    is_correct,
    normalize,
    parse_span,
    prompt_text,
    read,
    reward,
    task,
)

SHAPE = Question("0", "a.mp4", "What shape is the red object?", "circle")
COUNT = Question("1", "a.mp4", "How many objects appear?", "two")
COLORS = Question(
    "2", "a.mp4", "What color is it?", "red", options=("red", "blue", "red ball"), answer_index=0
)
GREEK = Question("4", "a.mp4", "Which?", "beta", options=("alpha", "beta", "gamma", "delta"), answer_index=1)
EVENT = Question("3", "a.mp4", "When does it happen?", "", spans=((2.0, 8.0), (20.0, 30.0)))

unhurried = settings(deadline=None, max_examples=100)  # a busy machine is no failure
seconds = st.floats(-1e6, 1e6)
any_span = st.tuples(st.floats(), st.floats())


def asked(question, answer):
    return Question("0", "a.mp4", question, answer)


# ---- spans ----


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [  # worked by hand
        ((5, 15), (10, 20), 1 / 3),
        ((2, 8), (2, 8), 1),
        ((0, 1), (5, 9), 0),
        ((0, 5), (5, 9), 0),
        ((5, 5), (5, 5), 0),
        ((12, 5), (4, 14), 0),
        ((math.nan, 5), (4, 14), 0),
        ((4, math.inf), (4, 14), 0),
        ((4, math.inf), (4, math.inf), 0),
        ((-1e308, 1e308), (-1e308, 1e308), 0),  # its length overflows to inf
        ((-5, 5), (0, 5), 0.5),  # not clipped at 0: [0, 5] of [-5, 5]
    ],
)
def test_iou_of_worked_cases(a, b, expected):
    assert iou(a, b) == pytest.approx(expected, abs=1e-9)


@unhurried
@given(any_span, any_span)
def test_iou_is_symmetric_and_between_0_and_1(a, b):
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == iou(b, a)


@unhurried
@given(st.lists(seconds, min_size=2, max_size=2, unique=True))
def test_iou_of_equal_spans_is_1_and_of_reversed_ones_0(bounds):
    start, end = sorted(bounds)
    assert iou((start, end), (start, end)) == 1
    assert iou((end, start), (start, end)) == 0


@unhurried
@given(*[st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True)] * 2)
def test_iou_on_whole_seconds_is_a_count_of_seconds(a, b):
    a, b = sorted(a), sorted(b)
    cells_a, cells_b = set(range(*a)), set(range(*b))
    assert iou(tuple(a), tuple(b)) == pytest.approx(len(cells_a & cells_b) / len(cells_a | cells_b))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 1.0 to 2.5 seconds", (1, 2.5)),
        ("1.0 - 2.5", (1, 2.5)),
        ("1–2", (1, 2)),
        ("12s to 18s", (12, 18)),
        ("between 3 and 9 seconds", (3, 9)),
        ("from two to five seconds", (2, 5)),
        ("00:05 to 00:10", (5, 10)),
        ("It is shown at 1:05 to 1:20.", (65, 80)),
        ("1:00:00 - 1:00:01.5", (3600, 3601.5)),
        ("starts at 3s and ends at 7.5 s.", (3, 7.5)),
        ('{"start_time": "6.0", "end_time": "15.0"}', (6, 15)),
        ('```json\n{"end_time": 15, "start_time": -3}\n```', (-3, 15)),
        ("[(2.3, 5.2)]", (2.3, 5.2)),
        ("from 10 to 5", (10, 5)),  # reversed stays reversed
        ("<answer>0 to 30</answer> no: <answer>6 to 15\n</answer>", (6, 15)),
        ("<think>0 to 30, or <answer>1 to 2</answer></think> 6 to 15", (6, 15)),
        ("<answer>6 to 15</answer><answer>red</answer>", None),
        ("1 to 2, no: from 6 to 15 seconds", (6, 15)),  # the last counts
        ("starts at 1, ends at 2, or 6 to 15", (6, 15)),
        ("6 to 15? It starts at 1 and ends at 2.", (1, 2)),
        ("6‑15", (6, 15)),  # no-break hyphen
        ("6−15", (6, 15)),  # minus sign
        ("6~15 s", (6, 15)),
        ("From 00:00:06.5 TO 00:00:15", (6.5, 15)),
        ("from nan to 9 seconds", None),
        ("<answer>C</answer><glue>[(2.3, 5.2)]</glue>", (2.3, 5.2)),
        ('{"start_time": "1.2.3", "end_time": "..."}', None),
        ("5 to 10 minutes", None),
        ("at 3 and 9 seconds", None),
        ("2024-05-10", None),
        ("nan to inf", None),
        ("7", None),
        ("", None),
    ],
)
def test_a_span_is_read_in_seconds_or_not_at_all(text, expected):
    assert parse_span(text) == expected


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000])
@pytest.mark.parametrize(
    "text",
    ["{0} m 1 s to 2 m 1 s", "{0} h 1 m 1 s", "1 m {0} s", "from {0} to {0} ms", "{0}:00:00,{0} - 1,{0}"],
)
def test_a_number_without_end_is_read_as_no_moment_and_never_raises(text, digits):
    text = text.format(digits)
    assert grade(text, EVENT) == 0 and task(replace(EVENT, answer=text)) in ("grounding", "grounded")
    assert not any(map(math.isfinite, parse_span(text) or ()))


@unhurried
@given(seconds, seconds)
@example(1e-05, 3.0)
def test_a_written_span_is_read_back(start, end):
    assert parse_span(f"from {start} to {end} seconds") == (start, end)


def test_a_span_is_graded_against_the_best_gold_span_and_right_from_seven_tenths():
    assert grade("from 20 to 30 seconds", EVENT) == 1
    assert grade("2 to 5", EVENT) == 0.5  # 3 of 6 seconds
    assert grade("20 to 27", EVENT) == 0.7
    assert is_correct("20 to 27", EVENT)  # inclusive
    assert not is_correct("20 to 26.9", EVENT)
    assert grade("8 to 2", EVENT) == grade("some time", EVENT) == 0


# ---- options ----


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "B.",
        "b",
        "(b) red",
        "**B**",
        "Answer: B",
        "The answer is B because",
        "<answer>B</answer>\n",
        "B, B",
    ],
)
def test_a_letter_is_read(text):
    assert read(text, GREEK).option == 1


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "A and B",
        "(A) (b)",
        "it is a man",
        "A man walks",
        "E",
        "a b",
        "T-shirt",
        "red",
        "I know",
        "",
    ],
)
def test_prose_and_two_letters_are_no_letter(text):
    assert read(text, GREEK).option is None


@pytest.mark.parametrize(
    "text", ["A", "(A) red", "red", "It is red.", "<answer>A</answer>", "A. blue is wrong"]
)
def test_an_option_is_chosen_by_letter_or_name(text):
    assert grade(text, COLORS) == 1


@pytest.mark.parametrize(
    "text",
    ["B", "red or blue", "A or B", "A or B, red", "the red ball", "not red", "green", "", "A. red (B) blue"],
)
def test_hedging_between_options_or_missing_them_earns_nothing(text):
    assert grade(text, COLORS) == 0


def test_the_gold_option_may_be_given_by_its_text():
    question = Question("0", "a.mp4", "Which way?", "right", options=("left", "right"))
    assert [grade(text, question) for text in ("right", "B", "left")] == [1, 1, 0]
    with pytest.raises(ValueError):
        grade("B", Question("0", "a.mp4", "Which way?", "up", options=("left", "right")))


def test_the_prompt_lists_the_options_with_their_letters():
    assert prompt_text(COLORS) == "What color is it?\n(A) red (B) blue (C) red ball"
    assert prompt_text(COUNT) == "How many objects appear?"


# ---- answer and span together ----

GROUNDED = Question(
    "4", "a.mp4", "What color is it?", "red", options=COLORS.options, answer_index=0, spans=((2.0, 8.0),)
)
SPOKEN = Question("5", "a.mp4", "What color is the ball?", "red", spans=((2.0, 8.0),))


def test_the_task_follows_from_what_the_question_holds():
    assert [task(q) for q in (SHAPE, COLORS, EVENT, GROUNDED, SPOKEN)] == [
        *("qa", "qa", "grounding"), *("grounded", "grounded")]  # fmt: skip
    assert task(asked("When?", "from 2 to 8 seconds")) == "qa"
    assert task(Question("6", "a.mp4", "When?", "from 2 to 8 seconds", spans=((2.0, 8.0),))) == "grounding"


@pytest.mark.parametrize(
    ("text", "question", "discrete", "continuous", "form"),
    [
        ("(A) red, from 2 to 5 seconds", GROUNDED, 1, 0.5, 1),
        ("A from 2 to 8 seconds\n", GROUNDED, 1, 1, 1),  # a trailing newline costs nothing
        ("B, from 2 to 8 seconds", GROUNDED, 0, 1, 1),
        ("A", GROUNDED, 1, 0, 0),
        ("red, from 2 to 8 seconds", SPOKEN, 1, 1, 1),
        ("The ball is red: 2 s – 8 s.", SPOKEN, 1, 1, 1),
        ("blue, from 2 to 5 seconds", SPOKEN, 0, 0.5, 1),
        ("from 2 to 8 seconds", SPOKEN, 0, 1, 0),
        ("from 2 to 8 seconds", EVENT, None, 1, 1),
        ("from 8 to 2 seconds", EVENT, None, 0, 0),  # reversed: no overlap and no form either
        ("from 20 to 40", EVENT, None, 0.5, 1),  # past the end: not clipped
        ("nan to inf", EVENT, None, 0, 0),
        ("A", COLORS, 1, None, 1),
        ("", COLORS, 0, None, 0),
    ],
)
def test_each_part_of_the_reward_of_worked_cases(text, question, discrete, continuous, form):
    assert reward(text, question) == Reward(discrete, continuous, form)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<think>0 to 30</think><answer>from 2 to 8 seconds</answer>", 1),
        (" <think>a\nb</think>\n<answer>\n2 to 8</answer>\n", 1),
        ("<think>or <answer>0 to 30</answer></think><answer>2 to 8</answer>", 0),
        ("<answer>2 to 8</answer>", 0),
        ("<think></think><answer>2 to 8</answer>", 0),
        ("<think>x</think><answer>2 to 8</answer> so", 0),
        ('<think>x</think><answer>{"start_time": "1.2.3", "end_time": "..."}</answer>', 0),  # garbage
    ],
)
def test_form_with_a_think_part_is_paid_for_a_readable_answer_alone(text, form):
    assert reward(text, EVENT, think=True).format == form


def test_form_without_a_think_part_is_a_bare_answer_or_its_block():
    texts = "2 to 8", "<answer>2 to 8</answer>", "<think>x</think><answer>2 to 8</answer>", "<answer>2 to 8"
    assert [reward(text, EVENT).format for text in texts] == [1, 1, 0, 0]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    ("question", "says", "said"),
    [
        (SHAPE, "a few words.", "circle"),
        (COLORS, "the letter of the right option.", "(A)"),
        (EVENT, ": the time span as: from START to END seconds.", "from 2 to 8 seconds"),
        (GROUNDED, "letter of the right option, then the time span as", "A, from 2 to 8 seconds"),
        (SPOKEN, "a few words, then the time span as", "red, from 2 to 8 seconds"),
    ],
)
def test_the_form_that_the_instruction_asks_for_is_the_form_that_is_paid(question, says, said, think):
    told = instruction(question, think, [0.25, 1.5, 2.75])
    tags = ["<think>", "</think>"] * think + ["<answer>", "</answer>"]
    assert says in told and re.findall(r"</?\w+>", told) == tags
    text = ("<think>because</think>" if think else "") + f"<answer>{said}</answer>"
    assert reward(text, question, think=think).total() == 1.1 + bool(question.spans and question.answer)
    assert ("You see 3 frames of the video, evenly spread from 0.2 to 2.8 s" in told) == bool(question.spans)
    assert "frames" not in instruction(question, think)


def test_the_total_is_the_weighted_sum_of_the_parts_that_the_task_has():
    assert Reward(1.0, 0.5, 1.0).total(discrete=2, continuous=1, format=0.2) == pytest.approx(2.7)
    assert Reward(None, 0.5, 0.0).total() == 0.5
    # without the right answer nor overlap, form earns its weight and no more
    assert reward("B, from 20 to 30 seconds", GROUNDED).total(format=0.1) == pytest.approx(0.1)
    assert reward("A, 5 to 6 s", GROUNDED).key() > reward("B, 2 to 8 s", GROUNDED).key()


def test_iop_of_worked_cases():
    assert iop((19, 24), (20, 23.5)) == pytest.approx(0.7)  # worked by hand
    assert iop((0, 10), (1.2, 5.8)) == pytest.approx(0.46)
    assert [iop(p, (5, 9)) for p in ((7, 7), (20, 20), (20, 25), (9, 5))] == [1, 0, 0, 0]
    assert iop((2, math.inf), (0, 10)) == iop((math.nan, 3), (0, 10)) == 0
    assert reward("2 to 4 seconds", EVENT, "iop").continuous == 1  # IoU 1/3
    assert reward("3 to 3 seconds", EVENT, "iop").continuous == 0  # a moment earns nothing


pieces = st.sampled_from(
    "<think> </think> <answer> </answer> A (B) red from 3 to 9 s nan - – 0:05 1:00:00.5 -1 1e999 {".split()
)
any_text = st.one_of(st.text(), st.lists(pieces).map(" ".join), st.lists(pieces).map("".join))


@unhurried
@given(any_text, st.sampled_from([SHAPE, COLORS, EVENT, GROUNDED, SPOKEN]), st.booleans(), st.floats(0, 1))
def test_any_text_has_a_reward_and_form_alone_never_earns_more_than_its_weight(text, question, think, weight):
    parts = reward(text, question, think=think)
    assert all(part is None or 0 <= part <= 1 for part in parts.__dict__.values())
    if not parts.discrete and not parts.continuous:
        assert parts.total(format=weight) <= weight
    assert reward(f"\n{text} ", question, think=think) == parts


@unhurried
@given(st.integers(0, 9), st.integers(0, 59), st.integers(0, 59), st.sampled_from("-‐‑‒–—−~"))
def test_clock_times_and_seconds_read_the_same_with_any_dash(hours, minutes, seconds, dash):
    total = 3600 * hours + 60 * minutes + seconds
    clock = f"{hours}:{minutes:02}:{seconds:02}.5"
    assert (
        parse_span(f"{clock} {dash} {clock}") == parse_span(f"{total}.5{dash}{total}.5") == (total + 0.5,) * 2
    )


@unhurried
@given(any_span, any_span)
@example((-1.3e302, sys.float_info.max), (-1.3e302, sys.float_info.max))  # finite, but not its length
def test_iop_is_never_below_iou(a, b):
    assert iou(a, b) <= iop(a, b) + 1e-9 <= 1 + 2e-9


# ---- free text ----


@unhurried
@given(st.integers(0, 20))
def test_number_words_equal_digits(number):
    words = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    word = [*words.split(), "sixteen", "seventeen", "eighteen", "nineteen", "twenty"][number]
    assert normalize(word) == normalize(str(number)) == normalize(f"0{number}.0") == [str(number)]
    assert is_correct(word, asked("How many?", str(number)))
    assert is_correct(f"There are {number}.", asked("How many?", word))


def test_normalize_folds_spelling_and_keeps_negations():
    assert normalize("The two Grey boxes, moving UPWARDS.") == ["2", "gray", "box", "moving", "up"]
    assert normalize("It isn’t the man's 1,000th bike") == ["no", "man", "1000", "th", "bicycle"]
    assert normalize("bodies, houses, dresses, buses, grass") == ["body", "house", "dress", "buse", "grass"]
    assert normalize("stays still") == ["still", "still"]
    assert normalize("it is on") == ["it", "is", "on"]  # nothing but stop words
    assert normalize("the ...") == []


@pytest.mark.parametrize(
    "text",
    [
        "circle",
        "A red circle.",
        "The red object is a circle",
        "circles",
        "a disc",
        "CIRCLE",
    ],
)
def test_a_one_word_answer_is_right_in_any_wording(text):
    assert grade(text, SHAPE) == 1


@pytest.mark.parametrize(
    "text",
    ["", "red", "square", "circle or square", "circle square", "not a circle", "an object", "circle, maybe"],
)
def test_a_one_word_answer_with_anything_else_earns_nothing(text):
    assert grade(text, SHAPE) == 0


@pytest.mark.parametrize(("text", "expected"), [("2", 1), ("two objects", 1), ("one or two", 0), ("2 3", 0)])
def test_a_count_is_one_number(text, expected):
    assert grade(text, COUNT) == expected


@pytest.mark.parametrize(
    ("question", "gold", "right", "hedge"),
    [
        ("Does the ball move left or right?", "left", "the ball moves left", "left right"),
        ("Which is first, red, green or blue?", "green", "green is first", "red green"),
        ("Between the cat and the dog, which eats?", "dog", "the dog eats", "cat dog"),
        ("Is the lamp on or off?", "on", "the lamp is on", "on or off"),
        ("Is the man dancing?", "yes", "Yes, the man is dancing", "yes and no"),
    ],
)
def test_naming_every_choice_that_the_question_offers_earns_nothing(question, gold, right, hedge):
    assert grade(right, asked(question, gold)) == 1
    assert grade(hedge, asked(question, gold)) == 0


def test_a_longer_answer_gets_word_f1():
    question = asked("Where is it?", "top left")
    assert grade("in the top left", question) == 1
    assert grade("top right", question) == 0.5  # 2 * 1 / (2 + 2)
    assert grade("the top left corner", question) == 0.8  # 2 * 2 / (3 + 2)
    assert grade("top top top top", question) == pytest.approx(
        1 / 3
    )  # repeating does not pay: 2 * 1 / (4 + 2)
    assert not is_correct("top right", question)


def test_order_counts_where_the_gold_answer_has_one():
    question = asked("How does it move?", "from left to right")
    assert grade("left to right", question) == 1
    assert grade("right to left", question) == pytest.approx(2 / 3)  # 2 words, 0 of 1 pairs: 2 * 2 / (3 + 3)
    there_and_back = asked("How does it move?", "left, then right, then left")
    assert grade("left then right then left", there_and_back) == 1
    assert grade("left then right", there_and_back) == 0.75  # 2 words and 1 pair: 2 * 3 / (3 + 5)
    assert grade("green and yellow", asked("Which colors?", "yellow and green")) == 1


def test_an_empty_gold_answer_cannot_be_met():
    assert grade("", asked("", "")) == grade("red", asked("", "")) == 0


words = st.lists(st.sampled_from("a red circle or not A B (A) two 2 from 1.0 to 9 left the".split())).map(
    " ".join
)


@unhurried
@given(st.one_of(st.text(), words), st.sampled_from([SHAPE, COUNT, COLORS, EVENT]))
def test_any_text_gets_a_grade_between_0_and_1(text, question):
    assert 0 <= grade(text, question) <= 1
    assert grade(f"  {text}\n", question) == grade(text, question)  # a trailing newline costs nothing


# ---- statistics ----


def test_bootstrap_resamples_clusters_not_values():
    assert bootstrap_ci([[0.5] * 4] * 10) == (0.5, 0.5)
    low, high = bootstrap_ci(
        [[0.0] * 50, [1.0] * 50]
    )  # two videos: a quarter of the draws is all 0, a quarter all 1
    assert (low, high) == (0, 1)
    low, high = bootstrap_ci([[0.0], [1.0]] * 50)
    # normal approximation: 0.5 -+ 1.96 * 0.5 / sqrt(100) = 0.402, 0.598
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)


def test_bootstrap_weighs_values_not_clusters_and_repeats_with_its_seed():
    low, high = bootstrap_ci([[1.0] * 99, [0.0]])
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_ci([[1.0, 0.0], [0.0], []], seed=3) == bootstrap_ci([[1.0, 0.0], [0.0]], seed=3)
    low, high = bootstrap_ci([[1.0] * 9, [0.0]] * 200)
    assert low < 0.9 < high  # the mean over values; over clusters it is 0.5
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ci([[]])


def test_an_option_is_none_where_it_is_negated_or_two_are_alike_and_the_longer_of_two_named():
    quiz = answers.Question(
        "0", "v", "Which?", "ball", options=("ball", "red ball", "Red ball"), answer_index=0
    )
    assert answers.read("It is not (A).", quiz).option is None and answers.read("(A)", quiz).option == 0
    assert answers.read("red ball", quiz).option is None  # two are spelt so
    two = answers.Question("0", "v", "Which?", "ball", options=("ball", "red ball"), answer_index=0)
    assert answers.read("it must be that red ball there", two).option == 1
    worded = answers.Question("0", "v", "Which?", "the first", options=("ball", "cube"), answer_index=0)
    assert answers.gold_option(worded) == 0


def test_a_span_before_the_video_or_of_no_length_is_no_form_and_half_an_answer_is_not_right():
    event = answers.Question("0", "v", "When?", "1 to 4 s", spans=((1.0, 4.0),))
    forms = [answers.reward(text, event).format for text in ("1 to 4", "3 to 3", "-1 to 4")]
    assert forms == [1, 0, 0]
    place = answers.Question("1", "v", "Where?", "top left")
    assert 0 < answers.grade("top", place) < 1 and answers.reward("top", place).discrete == 0


def test_yes_is_yes_whatever_follows_and_a_start_has_the_unit_of_its_end():
    moves = answers.Question("0", "v", "Is it so?", "yes")
    assert answers.grade("Yes, it moves down.", moves) == 1
    assert answers.parse_span("500 to 900 ms") == (0.5, 0.9)


def test_an_interval_leaves_out_a_fortieth_on_each_side():
    low, high = answers.bootstrap_ci([[float(i % 2)] for i in range(400)])
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.06)  # of 5 % on each side: 2 * 1.645 * ..
