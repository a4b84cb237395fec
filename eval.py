"""Tables of a model's answers: greedy and sampled accuracy by category, mean IoU of
time spans, 95 % intervals.

    python eval.py run RUN [--data FILE.jsonl --videos DIR]      # a run's tables again, or on other data
    python eval.py compare RUN RUN ...                           # finished runs side by side
    python eval.py score --data FILE.jsonl --predictions PRED.jsonl [--json OUT]
    python eval.py score .. --judge_url URL --judge_model NAME   # open answers that match in other words

A line of PRED.jsonl is {"id", "prediction"}: a text, an option's letter, or the option's index as a number.
With a judge, what matches the reference word by word is right unasked, the rest is as judge.py says: yes or
no, and a score from 0 to 5.

One parser (answers.py) reads every answer, here, in the oracle and in training. Intervals are bootstrapped
over videos, not questions: questions of one clip are right or wrong together.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import fields, replace

import torch

import lora
from checkpoints.policies import load_run, save_policy
from data import DataOptions, PromptSet, load_questions, load_sets
from plumbing.machine import pick_device, show_progress
from plumbing.options import (
    ArgumentParser,
    BadInput,
    cell,
    read_jsonl,
    run_script,
    write_json,
    write_whole,
)
from rollout import EVALUATED_AT_ONCE, Sampling, answer
from videoqa.answers import bootstrap_ci, grade, is_correct, read, task


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


def evaluate(
    policy, questions: PromptSet, sampling: Sampling, *, samples=4, seed=0, subset=0, kept=None
) -> tuple[dict, dict]:
    """Greedy and sampled (temperature 1, `samples` draws a question) results of a policy.

    subset: number of questions, drawn by the seed; 0: all. kept: a Kept (plumbing/run_folder.py), in which
    each batch's answers are written as soon as they are there, and are not asked for again. Returns
    ({"greedy": R, "sampled": R}, {"greedy": values, "sampled": values}): R as in results.json (`summarize`);
    values are the shares of right answers per question, to compare two policies pairwise.
    """
    at_once = sampling.prompts_at_once or EVALUATED_AT_ONCE
    sampling = replace(sampling, temperature=1.0, top_p=1.0, prompts_at_once=at_once)
    generator, n = torch.Generator().manual_seed(seed), len(questions)
    uniforms = torch.rand(n, samples, sampling.max_new_tokens, generator=generator)
    chosen = torch.randperm(n, generator=generator)[: subset or n].sort().values
    done = {} if kept is None else dict(kept.of)
    left = torch.tensor([i for i in chosen.tolist() if questions.questions[i].id not in done])
    for rows in show_progress(left.split(at_once) if len(left) else (), "evaluating"):
        greedy = answer(policy, questions, rows, 1, sampling, None)[1]
        sampled = answer(policy, questions, rows, samples, sampling, uniforms[rows])[1]
        asked = [questions.questions[i] for i in rows]
        new = [answer_row(*of) for of in zip(asked, greedy, sampled, strict=True)]
        done |= {row["id"]: row for row in new}
        if kept is not None:
            kept.add(new)
    results, values, asked = {}, {}, [questions.questions[i] for i in chosen]
    for name, texts in (("greedy", lambda row: [row["greedy"]]), ("sampled", lambda row: row["sampled"])):
        pairs = [(q, texts(done[q.id])) for q in asked]
        values[name] = [sum(is_correct(t, q) for t in ts) / len(ts) for q, ts in pairs]
        grades = [sum(grade(t, q) for t in ts) / len(ts) for q, ts in pairs]
        results[name] = summarize(asked, values[name], grades)
    return results, values


def answer_row(question, greedy: list[str], sampled: list[str]) -> dict:
    """A row of answers.jsonl. `right` is of the greedy answer."""
    return {
        "id": question.id, "video": question.video, "category": question.category,
        "question": question.question, "gold": question.answer or str(list(question.spans)),
        "greedy": greedy[0], "right": is_correct(greedy[0], question), "sampled": sampled,
    }  # fmt: skip


def gains(questions, before: dict, after: dict) -> dict:
    """Paired difference after - before in accuracy, with its 95 % interval, greedy and sampled."""
    out = {}
    for name in before:
        difference = [b - a for a, b in zip(before[name], after[name], strict=True)]
        interval = list(bootstrap_ci(by_video(questions, difference)))
        out[name] = {"accuracy": sum(difference) / len(difference), "ci95": interval}
    return out


def table(before: dict, after: dict | None = None) -> str:
    """Before and after side by side, a row a category, in percent, as the paper's table has it."""
    columns = [("greedy", before), ("sampled", before)]
    if after:
        columns = [("greedy", before), ("greedy", after), ("sampled", before), ("sampled", after)]
    heads = [f"{mode} {'before' if e is before else 'after'}" if after else mode for mode, e in columns]
    lines = ["| category | n | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(columns)]
    for name, row in before["greedy"]["by_category"].items():
        cells = [f"{100 * e[mode]['by_category'][name]['accuracy']:.1f}" for mode, e in columns]
        lines.append(f"| {cell(name) or '(none)'} | {row['n']} | " + " | ".join(cells) + " |")
    cells = [
        "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (e[m]["accuracy"], *e[m]["ci95"])))
        for m, e in columns
    ]
    lines.append(f"| **all** | {before['greedy']['n']} | " + " | ".join(cells) + " |")
    if before["greedy"]["mean_iou"] is not None:
        cells = [f"{100 * e[mode]['mean_iou']:.1f}" for mode, e in columns]
        lines.append("| mean IoU of spans | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_open(question) -> bool:
    """Asks for an answer in free words, alone or with a span."""
    return task(question) != "grounding" and not question.options


def judged(questions, texts, judge) -> dict:
    """Accuracy, percent, and mean score, 0 to 5, of open-ended answers: normalised match first (right, 5),
    then the judge's yes or no and its score. Of grounded ones the answer alone is judged, and their own
    metrics follow from it.

    An empty answer is wrong unasked, 0. A reply that is no verdict leaves its answer wrong, 0, and is counted
    under "failures" by cause. Judge, hash of the prompt and cache file (all replies) stand beside the score.
    """
    from oracles.chat import Failed
    from oracles.choose import remedy_of
    from oracles.judge import TOP_SCORE, VERDICT_SHA256
    from videoqa import scores

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
        raise BadInput(f"--judge_url {judge.url}: {words}; {remedy_of(note, 'judge')}")
    for i, verdict in zip(asked, verdicts, strict=True):
        if not isinstance(verdict, Failed):
            right[i], points[i] = verdict["correct"], verdict["score"]
    table = scores.accuracy_table(questions, right, points)
    if questions[0].spans:
        overlaps = [reading.overlaps(q) for q, reading in zip(questions, readings, strict=True)]
        table |= scores.grounded_qa(right, overlaps)
    return table | {
        "matched": matched,
        "asked": len(asked),
        "failures": dict(Counter(failure.cause for failure in failures)),
        "judge": judge.judge,
        "prompt_sha256": VERDICT_SHA256,
        "cache": judge.cache,
    }


def read_predictions(path: str, of: dict, data: str) -> dict[str, str]:
    """Text by id of a file of lines {"id", "prediction"}; `of`: the questions by id. Raises BadInput for a
    line that is no prediction, an unknown or a repeated id."""
    from videoqa import scores

    said, wants = {}, 'each line is {"id", "prediction"}'
    for where, row in read_jsonl(path, wants):
        missing = {"id", "prediction"} - row.keys()
        if missing:
            raise BadInput(f"{where}: field {sorted(missing)[0]!r} is missing; {wants}")
        name = str(row["id"])
        if name not in of:
            raise BadInput(f"{where}: id {name!r} is not in {data}; give predictions of that file")
        if name in said:
            raise BadInput(f"{where}: id {name!r} was predicted before; keep one line a question")
        said[name] = scores.prediction_text(row["prediction"], of[name])
        if said[name] is None:
            shown = json.dumps(row["prediction"])[:60]
            raise BadInput(f"{where}: prediction {shown} is unclear; give a text, an index or a span")
    return said


def score(data: str, predictions: str, judge=None, rows: str = "") -> dict:
    """R of any model's predictions, and under "metrics" the published ones (scores.py), in percent; with a
    judge also "judged" beside those of open-ended and of grounded questions without options.

    rows: a file to write what was read in each prediction to, a line a question. A question without a
    prediction counts as wrong ("missing"); one that cannot be read is counted under "parse_failures".
    Raises BadInput for a bad line, and where not one prediction can be read.
    """
    from videoqa import scores

    questions = load_questions(data, "")
    if judge and not any(map(is_open, questions)):
        raise BadInput(f"--judge_url: {data} has no open-ended question to judge; leave the judge out")
    said = read_predictions(predictions, {q.id: q for q in questions}, data)
    texts = [said.get(q.id, "") for q in questions]
    if all(scores.unread_by_both(questions, texts)):
        raise BadInput(
            f"{predictions}: not one of its {len(said)} predictions can be read as an answer to {data}; "
            "look at its first lines, and at docs/scoring.md for what is read"
        )
    grades = [grade(t, q) for t, q in zip(texts, questions, strict=True)]
    right = [float(is_correct(t, q)) for t, q in zip(texts, questions, strict=True)]
    published = scores.score(questions, texts)
    for name, kind in (("open_ended", "qa"), ("grounded_qa", "grounded")):
        chosen = [(q, t) for q, t in zip(questions, texts, strict=True) if is_open(q) and task(q) == kind]
        if judge and chosen:
            published[name]["judged"] = judged(*zip(*chosen, strict=True), judge)
    if rows:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows(questions, texts))
        write_whole(rows, "".join(lines).encode(errors="replace"))
    return summarize(questions, right, grades) | {"missing": len(questions) - len(said), "metrics": published}


def evaluate_run(folder: str, data: str, videos: str) -> str:
    """The table of a run's policy, supervised start beside it, on the run's held-out questions or on `data`,
    computed in the run's own dtype."""
    policy, tokenizer, config = load_run(folder, pick_device())
    policy.decoder.compute_dtype = getattr(torch, config["dtype"])
    if data:
        questions = load_questions(data, videos)
    else:
        names = [field.name for field in fields(DataOptions)]
        questions = load_sets(DataOptions(**{name: config[name] for name in names}), config["seed"])[1]
    prompts = PromptSet(policy, tokenizer, questions)
    sampling = Sampling.of(policy, tokenizer, max_new_tokens=config["max_new_tokens"])
    options = {"samples": config["eval_samples"], "seed": config["seed"]}
    with lora.using(policy.decoder, "off"):
        before, _ = evaluate(policy, prompts, sampling, **options)
    after, _ = evaluate(policy, prompts, sampling, **options)
    return table(before, after)


def merge_run(folder: str, out: str):
    """Writes the run's policy, its adapter folded into the weights, in the layout that it came in."""
    if os.path.exists(out):
        raise BadInput(f"--out {out}: exists already; name another folder")
    policy, tokenizer, config = load_run(folder)
    lora.merge(policy.decoder)
    save_policy(policy, tokenizer, config["policy"], out)
    size = sum(os.path.getsize(os.path.join(out, name)) for name in os.listdir(out))
    print(f"wrote {out}: {size / 1e6:.1f} MB, {', '.join(sorted(os.listdir(out)))}")


def judge_of(args):
    """The judge that the options of `score` name, None without any."""
    if not (args.judge_url or args.judge_model):
        return None
    if not (args.judge_url and args.judge_model):
        raise BadInput("--judge_url and --judge_model: one without the other; give both")
    from oracles.judge import LLMOracle

    options = {k: getattr(args, f"judge_{k}") for k in ("url", "model", "body")}
    options["cache"] = args.judge_cache or f"{args.predictions}.judge.sqlite"
    return LLMOracle(**options, key=os.environ.get("ORACLE_API_KEY", ""), option="judge")


def main() -> int:
    from plumbing.progress import compare, differences, show_table

    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a run's tables again, or on other data")
    run.add_argument("run")
    run.add_argument("--data", default="")
    run.add_argument("--videos", default="")
    scorer = commands.add_parser("score", help="any model's predictions, lines {id, prediction}")
    scorer.add_argument("--data", required=True)
    scorer.add_argument("--predictions", required=True)
    scorer.add_argument("--json", default="")
    scorer.add_argument("--rows", default="", help="JSONL to write: what was read in each prediction")
    scorer.add_argument("--judge_url", default="", help="of an OpenAI-compatible server; key: ORACLE_API_KEY")
    scorer.add_argument("--judge_model", default="")
    scorer.add_argument("--judge_body", default="", help="JSON merged into every request; null takes out")
    scorer.add_argument("--judge_cache", default="", help="sqlite file (PRED.jsonl.judge.sqlite)")
    comparer = commands.add_parser("compare", help="finished runs side by side")
    comparer.add_argument("runs", nargs="+")
    merger = commands.add_parser("merge", help="a run's policy as a checkpoint of its own")
    merger.add_argument("run")
    merger.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.command == "merge":
        merge_run(args.run, args.out)
    elif args.command == "run":
        show_table(evaluate_run(args.run, args.data, args.videos))
    elif args.command == "compare":
        show_table(compare(args.runs))
        if unlike := differences(args.runs):
            print()
            show_table(unlike)
    else:
        from videoqa import scores

        result = score(args.data, args.predictions, judge_of(args), args.rows)
        print(scores.table(result["metrics"]))
        print(json.dumps(result, indent=1))
        if args.json:
            write_json(args.json, result)
    return 0


if __name__ == "__main__":
    run_script(main)
