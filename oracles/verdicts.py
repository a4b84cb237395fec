"""A judge's verdicts on open-ended answers: in `eval.py score`, and in the tables of a run with a judge."""

import os
from collections import Counter

from oracles.cache import check_cache
from oracles.chat import Failed
from oracles.choose import remedy_of
from oracles.judge import TOP_SCORE, VERDICT_SHA256, LLMOracle
from plumbing.machine import say
from plumbing.options import BadInput, one_line
from videoqa.answers import is_correct, read
from videoqa.scores import accuracy_table, grounded_qa, is_open


def judged(questions, texts, judge) -> dict:
    """Accuracy, percent, and mean score, 0 to 5, of open-ended answers. Of grounded questions only the answer
    is judged, and their own metrics follow from it.

    An answer that equals the gold answer after normalisation is right with score 5, and an empty one wrong
    with score 0; the judge is not asked about either. If a reply is no verdict, its answer counts as wrong
    with score 0, and the failure is counted under "failures" by its cause. The judge, the hash of the prompt
    and the cache file, which holds all replies, stand beside the score.
    """
    readings = [read(t, q) for t, q in zip(texts, questions, strict=True)]
    said = [reading.rest.strip(" ,;") for reading in readings]  # what stood between answer and span
    right = [is_correct(t, q) for t, q in zip(texts, questions, strict=True)]
    points, matched = [TOP_SCORE * ok for ok in right], sum(right)
    asked = [i for i, text in enumerate(said) if text and not right[i]]
    if asked:
        judge.check()
    verdicts = judge.verdicts([(questions[i], said[i]) for i in asked])
    failures = [verdict for verdict in verdicts if isinstance(verdict, Failed)]
    if failures and len(failures) == len(verdicts):
        note = f"{failures[0].cause}: {failures[0]}"
        words = f"all {len(failures)} verdicts failed, the first with {note}"
        raise BadInput(f"--{judge.option}_url {judge.url}: {words}; {remedy_of(note, judge.option)}")
    for i, verdict in zip(asked, verdicts, strict=True):
        if not isinstance(verdict, Failed):
            right[i], points[i] = verdict["correct"], verdict["score"]
    table = accuracy_table(questions, right, points)
    if questions[0].spans:
        overlaps = [reading.overlaps(q) for q, reading in zip(questions, readings, strict=True)]
        table |= grounded_qa(right, overlaps)
    causes = dict(Counter(failure.cause for failure in failures))
    table |= {"matched": matched, "asked": len(asked), "failures": causes}
    return table | {"judge": judge.judge, "prompt_sha256": VERDICT_SHA256, "cache": judge.cache}


def of_open(questions, texts, judge) -> dict | None:
    """`judged` of those of these answers that are open. None if there are none, or if the judge is dead;
    a line says so, and the run goes on."""
    pairs = [(q, text) for q, text in zip(questions, texts, strict=True) if is_open(q)]
    try:
        return judged(*zip(*pairs, strict=True), judge) if pairs else None
    except BadInput as error:
        say(f"no verdicts on the open answers: {one_line(error)}")


def judge_of(args):
    """The judge that the options of `eval.py score` name."""
    if not (args.judge_url and args.judge_model):
        raise BadInput("--judge_url and --judge_model: one without the other; give both")
    options = {k: getattr(args, f"judge_{k}") for k in ("url", "model", "body")}
    options["cache"] = args.judge_cache or f"{args.predictions}.judge.sqlite"
    check_cache(options["cache"], "judge")
    return LLMOracle(**options, key=os.environ.get("ORACLE_API_KEY", ""), option="judge")
