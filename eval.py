"""Tables of a model's answers: greedy and sampled accuracy by category, mean IoU of time spans, 95 % intervals.

    python eval.py run RUN [--data FILE.jsonl --videos DIR]      # a run's tables again, or on other data
    python eval.py score --data FILE.jsonl --predictions PRED.jsonl [--json OUT]   # lines {"id", "prediction"}

One parser (answers.py) reads every answer, here, in the oracle and in training. Intervals are bootstrapped over
videos, not questions: questions of one clip are right or wrong together.
"""

import argparse
import json
import os
import sys
from collections import defaultdict

import torch

import lora
from answers import bootstrap_ci, grade, is_correct
from data import PAD_ID, DataError, PromptSet, Tokenizer, load_questions, run_script, write_json
from model import load_model
from rollout import generate


def by_video(questions, values) -> list[list[float]]:
    clusters = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        clusters[question.video].append(value)
    return list(clusters.values())


def summarize(questions, values, grades) -> dict:
    """values, grades: per question the share of its answers that are right, and their mean grade, in 0..1.

    Returns {"accuracy", "ci95", "n", "by_category", "mean_iou"}; mean_iou is over span questions, None without any.
    """
    names = sorted({q.category for q in questions})
    rows = {name: [v for q, v in zip(questions, values, strict=True) if q.category == name] for name in names}
    ious = [g for q, g in zip(questions, grades, strict=True) if q.spans]
    return {
        "accuracy": sum(values) / len(values),
        "ci95": list(bootstrap_ci(by_video(questions, values))),
        "n": len(values),
        "by_category": {name: {"accuracy": sum(v) / len(v), "n": len(v)} for name, v in rows.items()},
        "mean_iou": sum(ious) / len(ious) if ious else None,
    }


def answer_all(model, prompts: PromptSet, *, end_ids, banned, max_new_tokens, samples=0, seed=0, batch=128, **sampling):
    """Texts per question: one greedy answer (samples = 0), or `samples` drawn ones. list of lists of str."""
    texts = []
    generator = torch.Generator().manual_seed(seed)
    G = samples or 1
    for start in range(0, len(prompts), batch):
        rows = torch.arange(start, min(start + batch, len(prompts)))
        chosen = prompts[rows]
        uniforms = torch.rand(len(rows), G, max_new_tokens, generator=generator) if samples else None
        device = chosen.prompt_ids.device
        out = generate(
            model, chosen, G, max_new_tokens, end_ids=end_ids, pad_id=PAD_ID, banned=banned,
            uniforms=None if uniforms is None else uniforms.to(device), **sampling,
        )  # fmt: skip
        decoded = prompts.texts(out)
        texts += [decoded[i * G : (i + 1) * G] for i in range(len(rows))]
    return texts


def evaluate(model, prompts: PromptSet, *, samples=4, seed=0, **options) -> tuple[dict, dict]:
    """Greedy and sampled (temperature 1, `samples` draws a question) results of a model on a set of questions.

    Returns ({"greedy": R, "sampled": R}, {"greedy": values, "sampled": values}): R as in results.json (`summarize`),
    values per question, to compare two models question by question.
    """
    results, values = {}, {}
    for name, count in (("greedy", 0), ("sampled", samples)):
        texts = answer_all(model, prompts, samples=count, seed=seed, **options)
        pairs = list(zip(prompts.questions, texts, strict=True))
        values[name] = [sum(is_correct(t, q) for t in ts) / len(ts) for q, ts in pairs]
        grades = [sum(grade(t, q) for t in ts) / len(ts) for q, ts in pairs]
        results[name] = summarize(prompts.questions, values[name], grades)
    return results, values


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
        lines.append(f"| {name or '(none)'} | {row['n']} | " + " | ".join(cells) + " |")
    cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (e[m]["accuracy"], *e[m]["ci95"]))) for m, e in columns]
    lines.append(f"| **all** | {before['greedy']['n']} | " + " | ".join(cells) + " |")
    if before["greedy"]["mean_iou"] is not None:
        cells = [f"{100 * e[mode]['mean_iou']:.1f}" for mode, e in columns]
        lines.append("| mean IoU of spans | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score(data: str, predictions: str) -> dict:
    """R of any model's predictions, lines {"id", "prediction"}; a question without one counts as wrong."""
    questions, said = load_questions(data, ""), {}
    with open(predictions) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                said[row["id"]] = row["prediction"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{predictions}:{number}: {error!r}; each line is {{"id", "prediction"}}') from error
    unknown = said.keys() - {q.id for q in questions}
    if unknown:
        raise DataError(f"{predictions}: id {sorted(unknown)[0]!r} is not in {data}; give predictions of that file")
    texts = [said.get(q.id, "") for q in questions]
    result = summarize(
        questions,
        [float(is_correct(t, q)) for t, q in zip(texts, questions, strict=True)],
        [grade(t, q) for t, q in zip(texts, questions, strict=True)],
    )
    return result | {"missing": len(questions) - len(said)}


def load_run(folder: str):
    """(model with the run's adapter, tokenizer, config) of a run folder."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; name a folder that train.py made")
    with open(path) as file:
        config = json.load(file)
    model = load_model(config["policy"])
    lora.add_adapters(model.decoder, config["lora_r"], config["lora_alpha"])
    lora.load_adapter(model.decoder, os.path.join(folder, "adapter"))
    return model, Tokenizer.load(os.path.join(config["policy"], "tokenizer.json")), config
