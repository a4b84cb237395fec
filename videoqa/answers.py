"""Read an answer and grade it: the one parser of oracle, rewards, selection and evaluation.

The answer format is <think>why</think><answer>what</answer>; with thinking off it is the answer alone, in its
block or bare. The answer is a text, an option's letter, a span "from 3 to 9 seconds", or, to a question that
asks for both, the one and then the other: "(B) red, from 3 to 9 seconds". A pretrained chat model is told so
behind each question (`instruction`); the small default policy, which has learned it, is not.

The rules are strict where a policy would find a hole: naming two choices is hedging and earns nothing.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

Interval = tuple[float, float]
# The strictest of the usual R@1 thresholds: at 0.5 "the whole video" is right wherever an event fills half of
# it, and in the embedded world that is every clip.
RIGHT_IOU = 0.7
_ARTICLES = {"a", "an", "the"}
_STOP_WORDS = _ARTICLES | set(
    """is are was were be been being am do does did has have had of in on at to by with for from as into and
    or then it its he she they them his her their we you i m re ll ve this that these those there here which
    what who where when how why look like appear seem show shown video clip image frame scene""".split()
)
_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty""".split()
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"once": "1", "twice": "2", "thrice": "3"}
# Only pairs that mean the same in every question; the left side is singular, as plurals are folded first.
_SYNONYMS = """grey=gray colour=color violet=purple disc=circle disk=circle bike=bicycle tv=television not=no
    motionless=still stationary=still stay=still upward=up downward=down leftward=left rightward=right"""
_SYNONYMS = dict(pair.split("=") for pair in _SYNONYMS.split())
_ORDER_WORDS = {"to", "then", "before", "after"}  # in a gold answer: "left to right" is not "right to left"
_ASKS = r"(?:which|what|who|where|when|how|why)\b"
# A capital that stands alone, but not the article of "A man" or the "I" of "I think"; or a bracketed letter;
# or a small one at the end of "answer: b".
_ARTICLE = r"[AI]\s+(?!(?:and|or|is|because|since|as|but)\b)[a-z]"
_LETTER = re.compile(
    rf"(?<![\w'])(?<!\w-)(?!{_ARTICLE})([A-Z])(?!['-]?\w)|\(([a-z])\)"
    r"|\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\s*(?:is\b|:|=)?\s*([a-z])(?=\s*(?:[.,;:!*]|$))"
)
_NOT = r"(?:\b(?:not|never|except|nor|neither)|n't|不是|不选)\s*(?:the\s+)?(?:option\s*|answer\s*)?"
_WRONG = r"(?:(?:is|are|was|can|could|does)\s*(?:not\b|n't\b|never\b)|cannot\b)"
_NEGATED = re.compile(
    rf"{_NOT}[(\[*\"']*([A-Z])(?![\w'])|(?<![\w'])([A-Z])\b[)\]*\"']*\s+{_WRONG}"  # "not (A)", "A is not"
)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}  # "Ｂ" and "：" as "B" and ":"
_REFUSAL = re.compile(  # "I'm not sure", "there is no way to tell": says nothing, and above all not "no"
    r"\b(?:not|no|never|cannot|can't|don't|doesn't|didn't|isn't|couldn't|unable|hard|impossible|difficult)\b"
    r".{0,60}\b(?:sure|clear|clearly|certain|certainty|know|known|tell|determined?|determinable|say|idea|information|"
    r"decide|enough|evident|obvious|confident|answer|provided?|mentioned|specified|identify|confirm|way|able|"
    r"possible|visible|apparent|assist|help|view|access|sufficient|see)\b|\b(?:unclear|unknown|unsure|uncertain)\b"
)

# m:ss, h:mm:ss or seconds. A comma stands before decimals ("3,5", "00:00:03,500") or thousands ("1,003").
_PLAIN = r"-?(?:\d++(?::\d{1,2}){1,2}(?:\.\d++)?|(?:\d++(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?+)"
_NUMBER = (
    rf"(?:-?\d++(?::\d{{1,2}}){{1,2}},\d++|-?\d{{1,3}}(?:,\d{{3}})+(?:\.\d++)?|-?\d++,\d{{1,2}}|{_PLAIN})"
)
_SECONDS, _MILLISECONDS = r"seconds?|secs?|s", r"milliseconds?|millisecs?|msecs?|ms"
# Left unread rather than misread
_OTHER_UNITS = r"%|(?:minutes?|mins?|m|hours?|hrs?|h|frames?|fps|percent)\b"
_UNIT = rf"\s*+((?:{_SECONDS}|{_MILLISECONDS})\b)?+(?!\s*(?:{_OTHER_UNITS}))"
_TIME = rf"(?<![\w.])(?<!\d[:,])({_NUMBER})(?![.:,]?\d){_UNIT}"
# In "[3,9]" the comma stands between two times
_LISTED_TIME = rf"(?<![\w.])(?<!\d:)({_PLAIN})(?![.:]?\d){_UNIT}"
_ABOUT = r"(?:(?:about|around|approximately|approx\.?|roughly|second)\s+)?"
_TO = r"(?:(?:up\s+)?(?:to|until|till)\b|through\b|-{1,2}>|→|-)"
_BOUND = rf"\w*\W*?(?:(?:time|at|is)\W+?)?{_TIME}"  # behind "start": '_time": "6.0"', "s at 6", " time = 6"
_SPANS = (
    re.compile(rf"\bbetween\s+{_ABOUT}{_TIME}\s*and\s+{_ABOUT}{_TIME}", re.IGNORECASE),
    re.compile(rf"(?:\bfrom\s+)?{_ABOUT}(?<!\d-){_TIME}\s*{_TO}\s*{_ABOUT}{_TIME}(?!-\d)", re.IGNORECASE),
    re.compile(rf"[\[(]\s*{_LISTED_TIME}\s*,\s*{_LISTED_TIME}\s*[\])]", re.IGNORECASE),
)
_BARE_SPAN = re.compile(rf"\W*{_LISTED_TIME}(?:\s*(?:and|&)\s*|,\s+){_LISTED_TIME}\W*", re.IGNORECASE)
_COUNTED = r"(?!\w*(?:frame|f_?idx|index|ms\b|milli|min|hour|percent|pct))"  # "start_frame": no seconds
_BOUNDS = [  # patterns of the start and of the end, the plain words first
    [re.compile(rf"\b(?:{word}){_COUNTED}{_BOUND}", re.IGNORECASE) for word in words]
    for words in (("start", "end"), ("start|begin|began|commence", "end|finish|stop|conclude"))
]
_UNIT_IN_FRONT = re.compile(
    r"\b(?:frames?|minutes?|mins?|hours?|percent|percentages?|milliseconds?|msecs?|ms|confidence|scores?|"
    r"probability|pages?|steps?)(?:_\w+)?\W*(?:(?:from|range|numbers?|no|between|index|indices|interval)\W*)*$",
    re.IGNORECASE,
)
_COMPOUND = re.compile(  # "1m5s", "1 hour 2 minutes and 3 s"
    rf"(?<![\w.:,])(?:(\d+)\s*(?:hours?|hrs?|h)\s*,?\s*(?:and\s+)?)?"
    rf"(\d+)\s*(?:minutes?|mins?|m)\s*,?\s*(?:and\s+)?(\d+(?:\.\d+)?)\s*(?:{_SECONDS})\b",
    re.IGNORECASE,
)
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−﹣－~～", "-"))
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBERS)})\b", re.IGNORECASE)
_BLOCK = r"<answer>((?:(?!</?(?:answer|think)>).)+)</answer>"
_WELL_FORMED = re.compile(rf"<think>(?:(?!</?(?:answer|think)>).)+</think>\s*{_BLOCK}", re.DOTALL)
_BARE = re.compile(rf"{_BLOCK}|[^<>]+", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question about one video; `task` says which of options, spans and answer decide its grade."""

    id: str
    video: str  # path of the file
    question: str
    answer: str  # gold
    category: str = ""
    options: tuple[str, ...] = ()  # choices without their letters
    answer_index: int | None = None  # of the gold option; None: the option equal to `answer`
    spans: tuple[Interval, ...] = ()  # gold (start, end), seconds
    duration: float | None = None  # seconds
    duration_class: str = ""  # of the data set, as "short" in Video-MME
    clip: Interval | None = None  # seconds of the file; the part of it that the question is about, None: all
    benchmark: str = ""  # whose published rule reads its answers, as "tempcompass yes_no": docs/scoring.md
    marks: tuple[str, ...] = ()  # the data set's own names of the options, as "Caption A"; (): the letters

    @property
    def shown(self) -> tuple:
        """(path,) or (path, start, end): what of the video anyone who looks at it is shown."""
        return (self.video, *(self.clip or ()))


@lru_cache(maxsize=1 << 16)
def task(question: Question) -> str:
    """What is asked: "qa", an answer; "grounding", a span; "grounded", an answer and the span that shows it.

    Grounding has gold spans, no options, and a gold answer that is empty or a span itself.
    """
    if not question.spans:
        return "qa"
    only_span = not question.options and (not question.answer.strip() or parse_span(question.answer))
    return "grounding" if only_span else "grounded"


def is_open(question) -> bool:
    """Asks for an answer in free words, alone or with a span."""
    return task(question) != "grounding" and not question.options


def prompt_text(question: Question) -> str:
    """The question's text and, where there are options, a second line "(A) red (B) blue", or a line for each
    option behind the data set's own mark, "Caption A: red"."""
    if question.marks:
        lines = (f"{mark}: {option}" for mark, option in zip(question.marks, question.options, strict=True))
        return "\n".join([question.question, *lines])
    choices = " ".join(f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(question.options))
    return f"{question.question}\n{choices}".strip()


def instruction(question: Question, think: bool, times: list[float] | tuple = ()) -> str:
    """The answer format as a chat model is told it, with the think part or without, to go behind prompt_text.

    times: seconds at which the frames that it sees are shown, said only where a span is asked for.
    """
    wanted = ["the letter of the right option" if question.options else "a few words"]
    if question.marks:
        wanted = [f"the right option's mark, as {question.marks[0]}"]
    if question.spans:
        span = "the time span as: from START to END seconds"
        wanted = [span] if task(question) == "grounding" else [*wanted, f"then {span}"]
    spread = f"evenly spread from {times[0]:.1f} to {times[-1]:.1f} seconds" if len(times) else ""
    shown = f"You see {len(times)} frames of the video, {spread}. " if question.spans and spread else ""
    first = "First think step by step inside <think></think>, then give" if think else "Give"
    return f"{shown}{first} only the answer inside <answer></answer>: {', '.join(wanted)}."


def _blocks(text: str, tag: str) -> tuple[list[str], str]:
    """The contents of the closed blocks <tag>..</tag>, and the text with a space in the place of each."""
    # Behind the last end no tag is closed: not to look for its end there keeps the search linear
    closed, end, rest = text.rpartition(f"</{tag}>")
    block = re.compile(f"<{tag}>(.*?)</{tag}>", re.DOTALL)
    return block.findall(closed + end), block.sub(" ", closed + end) + rest


def final_answer(text: str) -> str:
    """The part of a completion that counts: its last <answer>..</answer>, else all but its <think> part."""
    if "<" not in text:
        return text.strip()
    text = _blocks(text, "think")[1]
    blocks = _blocks(text, "answer")[0]
    if blocks:
        return blocks[-1].strip()
    return re.sub(r"</?answer>", " ", text.partition("<think>")[0]).strip()


def _tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"n't\b", " not", re.sub(r"'s\b", "", text))
    return re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


def _fold(word: str) -> str:
    """One spelling for one meaning: singular, digits, synonyms. "boxes" -> "box", "02.50" -> "2.5"."""
    if word[0].isdigit():
        whole, _, fraction = word.partition(".")
        return f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".removesuffix(".")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = re.sub(r"(?<=x|z)es$|(?<=ch|sh|ss)es$|s$", "", re.sub(r"ies$", "ys", word))
    word = _DIGITS.get(word, word)
    return _SYNONYMS.get(word, word)


def normalize(text: str, keep: list[str] | tuple = ()) -> list[str]:
    """Content words in order, folded: "The two Grey boxes, moving." -> ["2", "gray", "box", "moving"].

    Case, punctuation, articles and stop words (but those in `keep`) go; negations, directions and repetitions
    stay. A text of stop words only ("on", "it is there") keeps all but the articles. May be empty.
    """
    words = [(word, _fold(word)) for word in _tokens(text) if word not in _ARTICLES]
    stop_words = _STOP_WORDS.difference(keep)  # met as they stand ("has") and folded ("shows")
    content = [folded for word, folded in words if stop_words.isdisjoint((word, folded))]
    return content or [folded for _, folded in words]


@lru_cache(maxsize=1 << 16)
def _gold_words(question: Question) -> tuple[list[str], set[str], bool]:
    """The gold answer's words, the question's words that do not count, whether the gold has an order."""
    gold = normalize(question.answer)
    asked = set(normalize(question.question, gold))
    if not asked.isdisjoint(gold) and re.search(r"\b(?:or|and|versus)\b", question.question):
        # "Is it left or right?", "Which is first, red or blue?": the choices that it offers are not taken out
        offer = re.sub(rf"^\W*{_ASKS}[^,:]*[,:]|,\s*{_ASKS}[^,]*$", "", question.question.casefold())
        *pieces, last = (normalize(piece, gold) for piece in re.split(r"[,:]|\b(?:or|and|versus)\b", offer))
        asked.difference_update(last[: len(set(gold))], *(piece[-len(set(gold)) :] for piece in pieces))
    if not any(word[0].isdigit() for word in gold):
        asked.add("1")  # "the left one", "one circle": no count
    return gold, asked, not _ORDER_WORDS.isdisjoint(_tokens(question.answer))


def leading_yes_no(text: str, hedged: bool = True) -> str | None:
    """ "yes" or "no" where a text begins with it: "No, it moves down." -> "no".

    hedged=False: None where the text goes on to say the opposite or its negation ("yes and no", "yes, it is
    not red"), and where it does not stop behind the word ("no idea").
    """
    found = re.match(r"\W*(yes|no)\b(.*)", text, re.IGNORECASE | re.DOTALL)
    if not found:
        return None
    word, rest = found[1].lower(), found[2]
    opposite = "yes" if word == "no" else "no"
    if not hedged and (opposite in map(_fold, _tokens(rest)) or not re.match(r"\s*(?:[,.;:!\n-]|$)", rest)):
        return None
    return word


def _grade_words(text: str, question: Question) -> float:
    gold, asked, ordered = _gold_words(question)
    if gold in (["yes"], ["no"]) and (word := leading_yes_no(text, hedged=False)):
        return float([word] == gold)
    words = [word for word in normalize(text, gold) if word in gold or word not in asked]
    if len(set(gold)) == 1:
        return float(set(words) == set(gold))
    if ordered:  # neighbours count too, so that order does
        words, gold = [*words, *pairwise(words)], [*gold, *pairwise(gold)]
    return 2 * (Counter(words) & Counter(gold)).total() / max(len(words) + len(gold), 1)


def latin(text: str) -> str:
    """Full-width letters, digits and signs as plain ones, and spaces for Chinese, Japanese and Korean words:
    "答案是Ｂ" becomes " B"."""
    return _CJK.sub(" ", text.translate(FULL_WIDTH))


def _letters(text: str, num_options: int) -> set[int]:
    """Indices of the options whose letters stand in a text: "B", "(B)", "B. red", "Answer: B" -> {1}.

    Letters beyond num_options do not count, small ones only alone or in brackets, the article of "A man"
    never.
    """
    body = final_answer(text)
    if not body.isascii():
        body = latin(body)
    letters = re.findall(r"\A\W*([A-Za-z])\W*\Z", body) or ["".join(found) for found in _LETTER.findall(body)]
    return {ord(letter.upper()) - ord("A") for letter in letters} & set(range(num_options))


def negated_letters(text: str) -> set[int]:
    """Indices of the letters that a text says not to be the answer: "It is not (A)", "A is not right"."""
    found = _NEGATED.findall(text.translate(FULL_WIDTH))
    return {ord("".join(pair)) - ord("A") for pair in found}


@lru_cache(maxsize=1 << 16)
def _option_words(options: tuple[str, ...]) -> tuple[list[list[str]], list[str]]:
    """Each option's words, and its folded words between spaces. An option that is a single letter has no
    words: it is chosen by the letter of its place."""
    words = [_tokens(option) for option in options]
    letters = [len(option) == 1 and len(option[0]) == 1 and option[0].isalpha() for option in words]
    exact = [[] if letter else option for option, letter in zip(words, letters, strict=True)]
    return exact, [f" {' '.join(normalize(option))} " for option in options]


def _marked(text: str, marks: tuple[str, ...]) -> set[int]:
    """The options that a text names by the data set's own marks."""
    body = f" {' '.join(_tokens(text))} "
    return {i for i, mark in enumerate(marks) if f" {' '.join(_tokens(mark))} " in body}


def equal_option(text: str, options: tuple[str, ...]) -> int | None:
    """The only option that has the words of the text, in their order."""
    words = _tokens(text)
    equal = [i for i, option in enumerate(_option_words(options)[0]) if option and option == words]
    return equal[0] if len(equal) == 1 else None


def _chosen_option(text: str, question: Question) -> int | None:
    """The option that a text chooses: equal to it, else by mark or letter, else the only one named."""
    options = question.options
    equal = equal_option(text, options)
    if equal is not None:
        return equal
    letters = _marked(text, question.marks) if question.marks else set()
    letters = letters or _letters(text, len(options))
    if letters:
        only = letters.pop() if len(letters) == 1 else None
        return None if only in negated_letters(text) else only
    parts = _option_words(options)[1]
    said = f" {' '.join(normalize(text))} "
    named = [part for part in parts if part.strip() and part in said and f" no{part}" not in said]
    # "red ball" names the option "red ball", not the option "red" as well
    named = [part for part in named if not any(part in other and part != other for other in named)]
    if len(named) != 1 or (named == [" no "] and not leading_yes_no(text, hedged=False) and is_refusal(text)):
        return None
    return parts.index(named[0])


def is_refusal(text: str) -> bool:
    """Declines to answer: "I'm not sure", "It is not clear", "There is no way to tell"."""
    return bool(_REFUSAL.search(text.casefold().replace("’", "'")))


def _seconds(number: str, unit: str | None) -> float:
    """Of "1:05", "3,5" or "1,003"; the unit, where there is one, as in "500 ms"."""
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        number = number.replace(",", "")
    parts = reversed(number.replace(",", ".").split(":"))  # seconds, minutes, hours
    seconds = sum(float(x) * 60**i for i, x in enumerate(parts))
    return seconds / 1000 if unit and unit.casefold().startswith(("ms", "mill")) else seconds


def _interval(start: str, start_unit: str | None, end: str, end_unit: str | None) -> Interval:
    """In seconds; a start without a unit has the end's."""
    return _seconds(start, start_unit or end_unit), _seconds(end, end_unit)


def _compound(found: re.Match) -> str:
    hours, minutes, seconds = (float(part or 0) for part in found.groups())  # infinite if of 400 digits
    return f"{hours * 3600 + minutes * 60 + seconds:.12g} s"


def _in_seconds(found: re.Match) -> bool:
    """No other unit stands in front, unless seconds are named behind: "frames 150 to 360" is no time."""
    named = found[2] or found[4]
    return bool(named) or not _UNIT_IN_FRONT.search(found.string[max(0, found.start() - 40) : found.start()])


def _last(matches) -> re.Match | None:
    return max(matches, key=re.Match.start, default=None)


def _split_span(body: str) -> tuple[Interval | None, str]:
    """The last span of a text, in seconds, and the text without it."""
    if not any(map(str.isdigit, body)) and not _NUMBER_WORD.search(body):
        return None, body
    body = body.translate(_DASHES).translate(FULL_WIDTH)
    if bare := _BARE_SPAN.fullmatch(body):
        return _interval(*bare.groups()), ""
    body = _NUMBER_WORD.sub(lambda m: _DIGITS[m[0].casefold()], body)
    body = _COMPOUND.sub(_compound, body)
    last = _last(m for pattern in _SPANS for m in pattern.finditer(body) if _in_seconds(m))
    for start, end in _BOUNDS if re.search("start|beg|commence", body, re.IGNORECASE) else ():
        bounds = _last(start.finditer(body)), _last(end.finditer(body))  # in either order
        if all(bounds):
            if not last or max(m.end() for m in bounds) > last.end():
                times = bounds[0].groups() + bounds[1].groups()
                return _interval(*times), end.sub(" ", start.sub(" ", body))
            break
    if not last:
        return None, body
    return _interval(*last.groups()), f"{body[: last.start()]} {body[last.end() :]}"


def _read_span(text: str) -> tuple[Interval | None, str]:
    """The span of a completion and the rest of its final answer."""
    span, rest = _split_span(final_answer(text))
    blocks = _blocks(text, "glue")[0] if "<glue>" in text else []  # VideoChat-R1 writes its spans so
    return (_split_span(blocks[-1])[0] if blocks else span), rest


def parse_span(text: str) -> Interval | None:
    """(start, end) in seconds, the last of the final answer (or <glue> block); None if there is none.

    Reads "from 1 to 2.5 seconds", "1.0 - 2.5" with any dash, "between 3 and 9 s", "0:05 to 1:10",
    "1:00:00.5", "[3, 9]", "starts at 3, ends at 9", "begins at 3, finishes at 9", "1m5s to 1m20s",
    "500 to 900 ms", "3,5 to 9,25", "1,003 to 1,009", SRT's "00:00:03,500 --> 00:00:09,250", JSON with
    start_time and end_time, and "3 and 9" or "3, 9" where nothing else is said. Frames, minutes, hours and
    percents are left unread, whether the unit stands in front or behind. Reversed bounds stay reversed: their
    IoU is 0. Times past the video's end stay as they are.
    """
    return _read_span(text)[0]


def iou(a: Interval, b: Interval) -> float:
    """Intersection over union of two (start, end) spans in seconds, in [0, 1].

    0 for an empty or reversed span, NaN or inf. Negative times and times past the video's end are not
    clipped: the excess widens the union and lowers the IoU.
    """
    intersection = min(a[1], b[1]) - max(a[0], b[0])
    union = max(a[1], b[1]) - min(a[0], b[0])  # of two that overlap; empty or reversed ones never do
    usable = intersection > 0 and all(map(math.isfinite, (*a, *b, union)))
    return intersection / union if usable else 0.0


def iop(predicted: Interval, gold: Interval) -> float:
    """Intersection over the prediction's length (NExT-GQA), in [0, 1].

    A prediction of no length is 1 inside the gold span (bounds included) and 0 outside, as in the published
    evaluation; reversed, NaN, inf or of infinite length: 0.
    """
    start, end = predicted
    if not all(map(math.isfinite, (*predicted, *gold, end - start))) or start > end:
        return 0.0
    if start == end:
        return float(gold[0] <= start <= gold[1])
    return max(min(end, gold[1]) - max(start, gold[0]), 0.0) / (end - start)


@dataclass(frozen=True)
class Reading:
    """What one completion says to one question; None: unreadable, or not asked for."""

    option: int | None  # the chosen one: its exact text, else one letter, else the only option named
    span: Interval | None  # seconds, as written
    rest: str  # the final answer without its span

    def overlaps(self, question: Question) -> Interval:
        """(IoU, IoP): the best over the gold spans, each apart; unreadable: 0, 0."""
        if self.span is None:
            return 0.0, 0.0
        return tuple(max(measure(self.span, gold) for gold in question.spans) for measure in (iou, iop))

    def grade(self, question: Question) -> float:
        """See `grade`."""
        if question.options:
            return float(self.option == gold_option(question))
        if task(question) == "grounding":
            return self.overlaps(question)[0]
        return _grade_words(self.rest, question)

    def is_whole(self, question: Question) -> bool:
        """Says all that is asked: a span of positive length, an option, some word."""
        if question.spans and (self.span is None or not 0 <= self.span[0] < self.span[1] < math.inf):
            return False
        if question.options:
            return self.option is not None
        return task(question) == "grounding" or bool(_tokens(self.rest))


def read(text: str, question: Question) -> Reading:
    """The one reading of a completion, for grades, rewards and metrics alike; never raises."""
    span, rest = _read_span(text) if question.spans else (None, final_answer(text))
    return Reading(_chosen_option(rest, question) if question.options else None, span, rest)


def gold_option(question: Question) -> int:
    """Index of the right option. Raises ValueError if there is neither an index nor an equal option."""
    gold = question.answer_index
    return question.options.index(question.answer) if gold is None else gold


@lru_cache(maxsize=1 << 14)  # policies give the same answers again and again
def grade(text: str, question: Question) -> float:
    """How right a completion is, in [0, 1]; 0 when it is empty or unreadable.

    Grounding: the best IoU over the gold spans. Else the answer alone, a grounded question's too:
    Options: 1 if it chooses the gold one (its exact text, else one letter, else the only option named).
    Free text: content words, less those of the question (never the gold's, nor the choices that a question
    with the gold in it offers). A gold of one content word: that word and no other, 1 or 0. A longer gold:
    word F1 = 2 * common / (len(words) + len(gold)), over pairs of neighbours too if the gold has an order.
    """
    return read(text, question).grade(question)


def is_correct(text: str, question: Question) -> bool:
    """Counts as right in an accuracy: IoU >= RIGHT_IOU for pure grounding, else a grade of exactly 1."""
    return grade(text, question) >= (RIGHT_IOU if task(question) == "grounding" else 1.0)


@dataclass(frozen=True)
class Reward:
    """The parts of one answer's reward, each in [0, 1], logged apart; None where a task lacks the part."""

    discrete: float | None  # the answer is right: 0 or 1
    continuous: float | None  # overlap of the spans
    format: float  # well-formed and readable: 0 or 1

    def total(self, discrete: float = 1.0, continuous: float = 1.0, format: float = 0.1) -> float:
        """The weighted sum; form alone never earns more than the weight `format`."""
        parts = (discrete, self.discrete), (continuous, self.continuous), (format, self.format)
        return sum(weight * part for weight, part in parts if part is not None)

    def key(self) -> tuple[float, float, float]:
        """To order answers by: the right answer first, then the overlap, then the form."""
        return self.discrete or 0.0, self.continuous or 0.0, self.format


def reward(text: str, question: Question, overlap: str = "iou", think: bool = False) -> Reward:
    """The dual reward of Temporal-R1 (arXiv:2506.01908), from one reading of the text.

    discrete: `is_correct` of the answer; None for pure grounding. continuous: best IoU, or with overlap="iop"
    best IoP, where a prediction of no length earns 0 (else a single moment would be the best answer); None
    without gold spans. format: the whole text is of the format (with or without think part), spaces around it
    do not matter, and what it says can be read: empty or garbled blocks earn nothing.
    """
    assert overlap in ("iou", "iop"), f"overlap must be iou or iop, got {overlap}"
    reading = read(text, question)
    discrete = continuous = None
    if question.spans:
        span, (best_iou, best_iop) = reading.span, reading.overlaps(question)
        continuous = best_iou if overlap == "iou" or not span or span[0] >= span[1] else best_iop
    if task(question) != "grounding":
        discrete = float(reading.grade(question) >= 1)
    well_formed = (_WELL_FORMED if think else _BARE).fullmatch(text.strip()) and reading.is_whole(question)
    return Reward(discrete, continuous, float(bool(well_formed)))


def bootstrap_ci(values_by_cluster: list[list[float]], num_resamples: int = 2000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean over all values, resampling clusters (videos) with replacement.

    Questions on one video fail together, so resampling those would give too narrow an interval. One cluster
    gives width 0; no value at all raises ValueError.
    """
    clusters = [(sum(values), len(values)) for values in values_by_cluster if values]
    if not clusters:
        raise ValueError("bootstrap_ci needs at least one value, got none")
    draws = np.random.default_rng(seed).integers(len(clusters), size=(num_resamples, len(clusters)))
    sums, counts = np.array(clusters, dtype=float)[draws].sum(axis=1).T
    return tuple(np.percentile(sums / counts, [2.5, 97.5]).tolist())


def by_video(questions, values) -> list[list[float]]:
    clusters = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        clusters[question.video].append(value)
    return list(clusters.values())


def summarize(questions, values, grades) -> dict:
    """values, grades: per question the share of its answers that are right, and their mean grade, in 0..1.

    Returns {"accuracy", "ci95", "n", "by_category", "mean_iou"}; mean_iou is over grounding
    questions, None without any.
    """
    names = sorted({q.category for q in questions})
    rows = {name: [v for q, v in zip(questions, values, strict=True) if q.category == name] for name in names}
    ious = [g for q, g in zip(questions, grades, strict=True) if task(q) == "grounding"]
    return {
        "accuracy": sum(values) / len(values),
        "ci95": list(bootstrap_ci(by_video(questions, values))),
        "n": len(values),
        "by_category": {name: {"accuracy": sum(v) / len(v), "n": len(v)} for name, v in rows.items()},
        "mean_iou": sum(ious) / len(ious) if ious else None,
    }
