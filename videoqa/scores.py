"""The published metrics of grounding, grounded and multiple-choice questions, from any model's predictions.

All figures are percent over ALL questions: one without a prediction, or with one that cannot be read, counts
as wrong, overlap 0. Thresholds are inclusive. Duplicate annotations count as often as they are written.
"""

from collections import defaultdict
from statistics import fmean

from videoqa.answers import Question, grade, is_correct, read, task

# Video-MME's classes, upper bounds in seconds: for questions that name a duration and no class
DURATION_CLASSES = (("short", 120.0), ("medium", 900.0), ("long", float("inf")))


def percent(values) -> float:
    return 100 * fmean(map(float, values))


def grounding(ious: list[float]) -> dict[str, float]:
    """Temporal grounding (Charades-STA, ActivityNet Captions): mIoU and R@1 at IoU >= 0.3, 0.5, 0.7."""
    recalls = {f"R@1, IoU={m}": percent(iou >= m for iou in ious) for m in (0.3, 0.5, 0.7)}
    return {"mIoU": percent(ious)} | recalls


def grounded_qa(right: list[bool], overlaps: list[tuple[float, float]]) -> dict[str, float]:
    """NExT-GQA: `right` per question, overlaps (IoU, IoP) each the best over the gold spans, taken apart.

    Acc@GQA: the answer is right and IoP >= 0.5.
    """
    ious, iops = ([pair[i] for pair in overlaps] for i in (0, 1))
    both = percent(ok and iop >= 0.5 for ok, iop in zip(right, iops, strict=True))
    out = {"Acc@QA": percent(right), "Acc@GQA": both, "mIoP": percent(iops), "mIoU": percent(ious)}
    for name, values in (("IoP", iops), ("IoU", ious)):
        out |= {f"{name}@{m}": percent(value >= m for value in values) for m in (0.3, 0.5)}
    return out


def duration_class(question: Question) -> str:
    """The data set's own class, else Video-MME's by the length in seconds, else ""."""
    if question.duration_class or question.duration is None:
        return question.duration_class
    return next(name for name, bound in DURATION_CLASSES if question.duration <= bound)


def accuracy_table(questions: list[Question], right: list[bool], scores: list[int] | None = None) -> dict:
    """Accuracy overall, by task type and by duration class (rows without one are left out of that part), and
    beside each the mean of a judge's scores (0 to 5), where there are any."""

    def row(chosen):
        out = {"accuracy": percent(right[i] for i in chosen), "n": len(chosen)}
        return out if scores is None else out | {"mean_score": fmean(scores[i] for i in chosen)}

    out = row(range(len(questions)))
    for name, key in (("by_task_type", lambda q: q.category), ("by_duration", duration_class)):
        groups = defaultdict(list)
        for i, question in enumerate(questions):
            groups[key(question)].append(i)
        out[name] = {k: row(chosen) for k, chosen in sorted(groups.items()) if k}
    return out


def prediction_text(prediction, question: Question) -> str:
    """A prediction as text; a whole number is the index of an option where there are options (0 = the first).

    Anything else than text and numbers becomes "", which counts as unreadable.
    """
    if type(prediction) is int and question.options:
        return f"({chr(ord('A') + prediction)})" if 0 <= prediction < len(question.options) else ""
    return str(prediction) if isinstance(prediction, (str, int, float)) else ""


def score(questions: list[Question], texts: list[str]) -> dict:
    """Every metric that the questions have, by task, and the count of predictions that cannot be read."""
    readings = [read(text, question) for text, question in zip(texts, questions, strict=True)]
    rows = list(zip(questions, texts, readings, strict=True))
    unreadable = 0
    for question, text, reading in rows:
        no_option = bool(question.options) and reading.option is None
        no_span = bool(question.spans) and reading.span is None
        unreadable += no_option or no_span or not text.strip()
    out = {"n": len(questions), "parse_failures": unreadable}
    parts = {name: [row for row in rows if task(row[0]) == name] for name in ("qa", "grounding", "grounded")}
    if parts["grounding"]:
        out["grounding"] = grounding([r.overlaps(q)[0] for q, _, r in parts["grounding"]])
    if parts["grounded"]:
        right = [is_correct(text, q) for q, text, _ in parts["grounded"]]
        out["grounded_qa"] = grounded_qa(right, [r.overlaps(q) for q, _, r in parts["grounded"]])
    for name, wanted in (("multiple_choice", True), ("open_ended", False)):
        chosen = [(q, text) for q, text, _ in parts["qa"] if bool(q.options) == wanted]
        if chosen:
            some, said = map(list, zip(*chosen, strict=True))
            out[name] = accuracy_table(some, [is_correct(t, q) for q, t in chosen])
            if not wanted:  # normalised match; longer gold answers also get their words' F1
                out[name]["mean_grade"] = percent(grade(t, q) for q, t in zip(some, said, strict=True))
    return out
