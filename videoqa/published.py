"""How the evaluation that a benchmark published reads an answer. docs/scoring.md has the table.

Rewards and oracles read strictly (answers.py): an answer that names two options is hedging and earns nothing.
A published figure follows its benchmark's own rule, so `eval.py score` reports both readings. Where a
benchmark publishes no rule for sentences, the last statement counts ("So the final answer is (D).").
"""

import re
from string import ascii_uppercase

from videoqa.answers import (
    FULL_WIDTH,
    Question,
    equal_option,
    final_answer,
    gold_option,
    is_refusal,
    latin,
    leading_yes_no,
    negated_letters,
    read,
)

EXACT, FIRST_WORD, LAST_STATEMENT = "exact match", "first word is yes or no", "last statement"
LEADING_LETTER, WHOLE_OPTION = "letter in front", "whole option or its mark"
FIRST_CAPITAL, FIRST_WORD_LETTER = "first capital A to D", "letter of the first word"
RULES = {
    "msvd_qa": EXACT,
    "msrvtt_qa": EXACT,
    "activitynet_qa": EXACT,
    "video_mme": FIRST_CAPITAL,
    "mvbench": FIRST_WORD_LETTER,
    "tempcompass yes_no": FIRST_WORD,
    "tempcompass multi-choice": LEADING_LETTER,
    "tempcompass caption_matching": WHOLE_OPTION,
}
_LETTER_RULES = {
    # Video-MME first takes out "The best answer is" and its like, which hold none of these letters
    FIRST_CAPITAL: r"([ABCD])",
    FIRST_WORD_LETTER: r"\A[(\[*\"']*([A-Za-z])[\])*\"'.:,]*(?:\s|$)",
    LEADING_LETTER: r"\A([ABCD])(?:[.)]|$)",
}
_NUMBER_OF = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4}
_KIND = r"(?:option|caption|sentence|choice|candidate|description)s?"
_CONCLUSION = re.compile(
    rf"(?:\b(?:answer|choice|{_KIND})\b\W*(?:(?:is|would be|should be|must be|will be)\b|[:=])"
    r"|答案[是为:]?|\b[Ii](?:'d| would| will|'ll)? (?:choose|pick|select|go with)\b|故选|选)\W*",
    re.IGNORECASE,
)
_LETTER_NEXT = re.compile(
    rf"(?:the\s+)?(?:{_KIND}\s*)?[(\[*\"'\s]*([A-Za-z])(?![\w'])(\s+[a-z]+)?", re.IGNORECASE
)
_MARK = re.compile(
    rf"\b{_KIND}\s*(?:number\s*)?[(#*]*([A-Z]|\d)(?![\w'])|\b({'|'.join(_NUMBER_OF)})\s+{_KIND}\b", re.I
)
_LEADING = re.compile(r"\W*([A-Z])\s*[.):\]](?!\s*(?:is|are|was|were|seems?|looks?|or|and|does|can)\b)")
_LISTED = re.compile(r"(?<![\w'])\(?([A-Z])[.):\]]")
_SO = re.compile(
    r"\W*(?:so|therefore|thus|hence|in conclusion|overall|it must be|it has to be|所以|因此)\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?。\n]+(?=\s|$)|,\s+(?=(?:so|therefore|thus|hence)\b)")
_VERBS = {"is", "as", "because", "since", "and", "or", "but", "with", "where", "for", "which"}


def rule_of(question: Question) -> str:
    """The name of the rule that reads this question's answers."""
    if question.options:
        return RULES.get(question.benchmark, LAST_STATEMENT)
    if question.benchmark not in RULES and question.answer.strip().lower() in ("yes", "no"):
        return FIRST_WORD
    return RULES.get(question.benchmark, EXACT)


def read_published(text: str, question: Question) -> int | str | None:
    """What the benchmark's rule reads: an option's index, or an answer in words. None if it reads nothing."""
    rule, text = rule_of(question), text.replace("</s>", "").strip()
    if rule == EXACT:
        return final_answer(text) or None
    if rule == FIRST_WORD:
        return first_word(final_answer(text))
    if rule in _LETTER_RULES:
        found = re.search(_LETTER_RULES[rule], text)
        index = _index(found[1]) if found else None
    else:
        index = _whole_option(text, question) if rule == WHOLE_OPTION else last_statement(text, question)
    return index if index in range(len(question.options)) else None


def first_word(text: str) -> str | None:
    """ "yes" or "no", if the answer begins with it; not "no" for a refusal ("No idea")."""
    ends = re.match(r"\W*(?:yes|no)\b\s*(?:[^\w\s]|$)", text, re.IGNORECASE)
    return leading_yes_no(text) if ends or not is_refusal(text) else None


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _capitals(text: str) -> set[int]:
    """The options whose letters stand alone in a text."""
    return {_index(letter) for letter in re.findall(r"(?<![\w'])([A-Z])(?![\w'])", text)}


def _whole_option(text: str, question: Question) -> int | None:
    behind = text.split(") ")[1] if ") " in text else None
    found = None
    marks = question.marks or ascii_uppercase[: len(question.options)]
    for i, (mark, option) in enumerate(zip(marks, question.options, strict=True)):
        named = text.replace(".", "") in (mark, mark[-1])  # "Caption A", or the letter alone
        if named or option in (text, behind) or text == f"{mark}: {option}":
            found = i
    return found


def last_statement(text: str, question: Question) -> int | None:
    """The option of the last conclusion; without one that of the strict reading, of a mark ("Option 2"), of a
    letter in front, or of the last sentence."""
    body = final_answer(text)
    yes_no = [option.strip(" .").lower() for option in question.options]
    if sorted(yes_no) == ["no", "yes"] and (word := first_word(body)):
        return yes_no.index(word)
    concluded = _concluded(body, question)
    if concluded is not None:
        return concluded
    named = {read(text, question).option, _marked(body, question)} - {None}
    if named:
        return named.pop() if len(named) == 1 else None
    leading = _LEADING.match(body)
    if leading and len(set(_LISTED.findall(body))) <= 1 + bool(negated_letters(body)):
        return _index(leading[1])
    return _last_sentence(body, question)


def _concluded(body: str, question: Question) -> int | None:
    """What stands behind the last "the answer is": a letter, an option's words, or a mark."""
    conclusion = max(_CONCLUSION.finditer(body), key=lambda m: m.start(), default=None)
    if not conclusion:
        return None
    tail = body[conclusion.end() :].translate(FULL_WIDTH)
    if re.match(r"(?:not|neither|unclear|unknown|either|both)\b", tail, re.IGNORECASE):
        return None
    line = re.split(r"[\n。]|\.\s", tail, maxsplit=1)[0]
    equal = equal_option(line, question.options)
    if equal is not None:
        return equal
    found = _LETTER_NEXT.match(tail)
    # "A man runs" begins with no letter of an option, nor does "a"
    is_letter = found and (not found[2] or found[2].strip() in _VERBS or found[1] not in "AaIi")
    if is_letter and _index(found[1]) < len(question.options):
        others = _capitals(line) - {_index(found[1])}
        another = r"[)\]*\"'.\s]*(?:or|and|/|,)\s*(?:option\s*)?\(?[A-Z](?![\w'])"
        hedging = re.match(another, tail[found.end(1) :])
        return None if others and hedging else _index(found[1])
    marked = _marked(tail, question)
    return marked if marked is not None else read(line, question).option


def _marked(body: str, question: Question) -> int | None:
    """The only option that "Option 2" or "the second option" names, unless it is said not to be."""
    found = set()
    for match in _MARK.finditer(body):
        one, ordinal = match.groups()
        index = _NUMBER_OF[ordinal.lower()] if ordinal else int(one) - 1 if one.isdigit() else _index(one)
        before, behind = body[: match.start()], body[match.end() :]
        several = re.match(r"\W*(?:and|or|nor)\b|\W*[,/]\s*\(?[A-Z\d]\b", behind)
        negated = re.search(r"(?:\bnot|n't|\bneither|\bexcept)\s+(?:the\s+)?$", before[-20:])
        if several:
            return None
        if not negated and not re.match(r"\W*(?:is|are|does|do|can)\s*(?:not\b|n't)", behind):
            found.add(index)
    found &= set(range(len(question.options)))
    return found.pop() if len(found) == 1 else None


def _last_sentence(body: str, question: Question) -> int | None:
    sentences = [part.strip() for part in _SENTENCE_END.split(body) if part.strip()]
    if not sentences:
        return None
    last = latin(sentences[-1])
    if _SO.match(sentences[-1]) or re.fullmatch(r"\W*[A-Za-z]\W*", last):
        letters = _capitals(last) - negated_letters(last)
        if len(letters) == 1:
            return letters.pop()
        return read(last, question).option if not letters else None
    return equal_option(last, question.options)


def is_right_published(text: str, question: Question) -> bool:
    """Counts as right by the benchmark's rule."""
    reading = read_published(text, question)
    if question.options:
        return reading == gold_option(question)
    if rule_of(question) == FIRST_WORD:
        return reading == question.answer.strip().lower()
    return reading == question.answer.strip()
