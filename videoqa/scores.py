"""The published metrics of grounding, grounded and multiple-choice questions, from any model's predictions.

All figures are percent over ALL questions: one without a prediction, or with one that cannot be read, counts
as wrong, overlap 0. Thresholds are inclusive. Duplicate annotations count as often as they are written.
"""

import json
from collections import defaultdict
from decimal import Decimal
from statistics import fmean
from string import ascii_uppercase

from plumbing.options import BadInput, json_lines, one_line, read_jsonl, write_whole
from videoqa.answers import Question, final_answer, grade, is_correct, is_open, read, summarize, task
from videoqa.published import is_right_published, read_published, rule_of
from videoqa.questions import load_questions

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


def option_name(i: int, question: Question) -> str:
    """What names the option by its number: of its letter (for 26 of them) and its mark the one that more of
    the two rules read as it."""
    names = [*ascii_uppercase[i : i + 1], *question.marks[i : i + 1]]
    return max(names, key=lambda x: (read(x, question).option == i) + (read_published(x, question) == i))


def prediction_text(prediction, question: Question) -> str | None:
    """A prediction as text; None if it has no single meaning, and the file must say which one it has.

    A whole number, 1.0 too, is the index of an option where there are options (0 = the first). [5, 12],
    [[5, 12]] and [[5, 12, 0.9]] (a window with its confidence) are a span in seconds; several are None.
    null is "", which counts as unreadable.
    """
    if prediction is None or isinstance(prediction, str):
        return prediction or ""
    if type(prediction) in (int, float):
        if question.options and prediction == int(prediction):
            return option_name(int(prediction), question) if 0 <= prediction < len(question.options) else ""
        return None if question.options else str(prediction)
    if isinstance(prediction, list) and question.spans:
        window = prediction[0] if len(prediction) == 1 else prediction
        numbers = isinstance(window, list) and all(type(x) in (int, float) for x in window)
        if numbers and (len(window) == 2 or len(window) == 3 and window is not prediction):
            return f"[{', '.join(f'{Decimal(str(x)):f}' for x in window[:2])}]"  # without exponents
    return None


def rows(questions: list[Question], texts: list[str]) -> list[dict]:
    """A row a question, as `eval.py score --rows` writes them: the prediction, what either rule reads in it,
    whether that is right, and the overlaps of its span. Options are indices, 0 = the first."""
    out = []
    for question, text in zip(questions, texts, strict=True):
        reading, row = read(text, question), {"id": question.id, "prediction": text}
        if task(question) != "grounding":
            strict = reading.option if question.options else reading.rest
            row |= {"strict": {"reading": strict, "right": is_correct(text, question)}}
            by_rule = {"reading": read_published(text, question), "right": is_right_published(text, question)}
            row |= {"published": {"rule": rule_of(question)} | by_rule}
            if not question.options:
                row |= {"exact_match": final_answer(text) == question.answer.strip()}
        if question.spans:
            row |= {"span": reading.span} | dict(zip(("iou", "iop"), reading.overlaps(question), strict=True))
        out.append(row)
    return out


def is_unread(row: dict, question: Question) -> bool:
    """The strict rule leaves unread a part of what is asked for: an option, a span, or any word."""
    no_option = bool(question.options) and row["strict"]["reading"] is None
    return no_option or bool(question.spans) and row["span"] is None or not row["prediction"].strip()


def score(questions: list[Question], texts: list[str]) -> dict:
    """Every metric that the questions have, by task, and the count of predictions that the strict rule leaves
    unread.

    "accuracy" is by the strict reading, as in rewards. "published" is by the benchmark's own rule, which a
    paper's table uses (docs/scoring.md).
    """
    pairs = list(zip(questions, rows(questions, texts), strict=True))
    out = {"n": len(questions), "parse_failures": sum(is_unread(row, q) for q, row in pairs)}
    of_task = {name: [row for q, row in pairs if task(q) == name] for name in ("grounding", "grounded")}
    if spans := of_task["grounding"]:
        out["grounding"] = grounding([row["iou"] for row in spans])
    if both := of_task["grounded"]:
        right = [row["strict"]["right"] for row in both]
        out["grounded_qa"] = grounded_qa(right, [(row["iou"], row["iop"]) for row in both])
    for name, with_options in (("multiple_choice", True), ("open_ended", False)):
        chosen = [(q, row) for q, row in pairs if task(q) == "qa" and bool(q.options) == with_options]
        if chosen:
            some, found = map(list, zip(*chosen, strict=True))
            out[name] = accuracy_table(some, [row["strict"]["right"] for row in found])
            if not with_options:  # normalised match; longer gold answers also get their words' F1
                out[name]["mean_grade"] = percent(grade(row["prediction"], q) for q, row in chosen)
                out[name]["exact_match"] = percent(row["exact_match"] for row in found)
            published = [row["published"] for row in found]
            by_rule = accuracy_table(some, [row["right"] for row in published])
            by_rule["parse_failures"] = sum(row["reading"] is None for row in published)
            out[name]["published"] = {"rule": ", ".join(sorted({row["rule"] for row in published}))} | by_rule
    return out


def table(result: dict) -> str:
    """The figures as aligned columns, a line each: name, per cent, questions."""
    lines = []
    for part, figures in result.items():
        if not isinstance(figures, dict):
            continue
        numbers = {name: x for name, x in figures.items() if isinstance(x, float) and name != "accuracy"}
        lines += [(f"{part}: {name}", value, "") for name, value in numbers.items()]
        readings = {}
        if published := figures.get("published"):
            readings = {"strict, normalised match": figures, f"published, {published['rule']}": published}
        for reading, of in readings.items():
            lines.append((f"{part}: {reading}", of["accuracy"], of["n"]))
            for name, row in (*of["by_task_type"].items(), *of["by_duration"].items()):
                lines.append((f"  {one_line(name)}", row["accuracy"], row["n"]))
    width = max((len(name) for name, _, _ in lines), default=0)
    head = f"{'':<{width}}  {'%':>7}  {'n':>6}"
    return "\n".join([head, *(f"{name:<{width}}  {value:>7.2f}  {n:>6}" for name, value, n in lines)])


def read_predictions(path: str, of: dict, data: str) -> dict[str, str]:
    """Text by id of a file of lines {"id", "prediction"}; `of`: the questions by id. Raises BadInput for a
    line that is no prediction, an unknown or a repeated id."""
    predicted, wants = {}, 'each line is {"id", "prediction"}'
    for where, row in read_jsonl(path, wants):
        missing = {"id", "prediction"} - row.keys()
        if missing:
            raise BadInput(f"{where}: field {sorted(missing)[0]!r} is missing; {wants}")
        name = str(row["id"])
        if name not in of:
            raise BadInput(f"{where}: id {name!r} is not in {data}; give predictions of that file")
        if name in predicted:
            raise BadInput(f"{where}: id {name!r} was predicted before; keep one line a question")
        predicted[name] = prediction_text(row["prediction"], of[name])
        if predicted[name] is None:
            shown = json.dumps(row["prediction"])[:60]
            raise BadInput(f"{where}: prediction {shown} is unclear; give a text, an index or a span")
    return predicted


def score_file(data: str, predictions: str, judged=None, rows_path: str = "") -> dict:
    """Any model's predictions as in results.json (`summarize`), and under "metrics" the published figures,
    in percent.

    judged: function of questions and texts -> figures of open-ended and of grounded questions without
    options, by a judge (oracles/verdicts.py); they stand under "judged". rows_path: a file to write what was
    read in each prediction to, a line a question. A question without a prediction counts as wrong
    ("missing"); one that cannot be read is counted under "parse_failures". Raises BadInput for a bad line,
    and where not one prediction can be read.
    """
    questions = load_questions(data, "")
    if judged and not any(map(is_open, questions)):
        raise BadInput(f"--judge_url: {data} has no open-ended question to judge; leave the judge out")
    predicted = read_predictions(predictions, {q.id: q for q in questions}, data)
    texts = [predicted.get(q.id, "") for q in questions]
    found = rows(questions, texts)
    pairs = zip(questions, found, strict=True)
    if all(is_unread(row, q) and (q.spans or row["published"]["reading"] is None) for q, row in pairs):
        raise BadInput(
            f"{predictions}: not one of its {len(predicted)} predictions can be read as an answer to {data}; "
            "look at its first lines, and at docs/scoring.md for what is read"
        )
    metrics = score(questions, texts)
    for name, kind in (("open_ended", "qa"), ("grounded_qa", "grounded")):
        chosen = [(q, t) for q, t in zip(questions, texts, strict=True) if is_open(q) and task(q) == kind]
        if judged and chosen:
            metrics[name]["judged"] = judged(*zip(*chosen, strict=True))
    if rows_path:
        write_whole(rows_path, json_lines(found).encode())
    grades = [grade(t, q) for t, q in zip(texts, questions, strict=True)]
    right = [float(is_correct(t, q)) for t, q in zip(texts, questions, strict=True)]
    missing = len(questions) - len(predicted)
    return summarize(questions, right, grades) | {"missing": missing, "metrics": metrics}
