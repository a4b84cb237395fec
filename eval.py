"""Tables of a model's answers: accuracy by category, mean IoU of time spans, 95 % intervals.

    python eval.py run RUN [--data FILE.jsonl --videos DIR]      # a run's tables again, or on other data
    python eval.py compare RUN RUN ...                           # finished runs side by side
    python eval.py merge RUN --out DIR                           # its policy as a checkpoint of its own
    python eval.py score --data FILE.jsonl --predictions PRED.jsonl [--json OUT]
    python eval.py score .. --judge_url URL --judge_model NAME   # open answers that match in other words

A line of PRED.jsonl is {"id", "prediction"}: a text, an option's letter, or the option's index as a number.
How predictions are scored: videoqa/scores.py, and with a judge oracles/verdicts.py.

One parser (videoqa/answers.py) reads every answer, here, in the oracle and in training. Intervals are
bootstrapped over videos, not questions: questions of one clip are right or wrong together.
"""

import json
import os
from dataclasses import fields, replace
from functools import partial

import torch
import torch.nn.functional as F

import lora
from checkpoints.policies import RUN, data_of, kind_of, load_run, refuse_changed, save_policy
from data import DataOptions, PromptSet, load_sets
from plumbing.machine import MachineOptions, pick_device, set_up, show_progress
from plumbing.options import (
    ArgumentParser,
    BadInput,
    cell,
    read_from,
    read_json,
    refuse_same,
    run_script,
    some_text,
    write_json,
)
from rollout import EVALUATED_AT_ONCE, Sampling, answer
from videoqa.answers import bootstrap_ci, by_video, grade, is_correct, summarize


def evaluate(
    policy, questions: PromptSet, sampling: Sampling, *, samples=4, seed=0, subset=0, kept=None, judge=None
) -> tuple[dict, dict]:
    """Greedy and sampled (temperature 1, `samples` draws a question) results of a policy.

    subset: number of questions, drawn by the seed; 0: all. kept: a Kept (plumbing/run_folder.py), in which
    each batch's answers are written as soon as they are there, and are not asked for again. judge: an
    LLMOracle, whose verdict on the open greedy answers stands beside their word match. Returns
    ({"greedy": R, "sampled": R}, {"greedy": values, "sampled": values}): R as in results.json (`summarize`);
    values are the shares of right answers per question, to compare two policies pairwise.
    """
    fewer = max(1, 5 * EVALUATED_AT_ONCE // (1 + samples))  # prompts, where each is answered many times
    at_once = sampling.prompts_at_once or min(EVALUATED_AT_ONCE, fewer)
    sampling = replace(sampling, temperature=1.0, top_p=1.0, prompts_at_once=at_once)
    generator, n = torch.Generator().manual_seed(seed), len(questions)
    # One prefill for the greedy answer, whose uniforms are NaN, and the sampled ones
    uniforms = torch.rand(n, samples, sampling.max_new_tokens, generator=generator)
    uniforms = F.pad(uniforms, (0, 0, 1, 0), value=torch.nan)  # (n, 1 + samples, T)
    chosen = torch.randperm(n, generator=generator)[: subset or n].sort().values
    stored = {} if kept is None else kept.of  # a row with another number of draws is damaged: asked anew
    done = {name: row for name, row in stored.items() if len(row["sampled"]) == samples}
    left = torch.tensor([i for i in chosen.tolist() if questions.questions[i].id not in done])
    for rows in show_progress(left.split(at_once) if len(left) else (), "evaluating"):
        texts = answer(policy, questions, rows, 1 + samples, sampling, uniforms[rows])[1]
        asked = [questions.questions[i] for i in rows]
        new = [answer_row(q, greedy, drawn) for q, (greedy, *drawn) in zip(asked, texts, strict=True)]
        done |= {row["id"]: row for row in new}
        if kept is not None:
            kept.add(new)
    results, values, asked = {}, {}, [questions.questions[i] for i in chosen]
    for name, texts in (("greedy", lambda row: [row["greedy"]]), ("sampled", lambda row: row["sampled"])):
        pairs = [(q, texts(done[q.id])) for q in asked]
        values[name] = [sum(is_correct(t, q) for t in ts) / len(ts) for q, ts in pairs]
        grades = [sum(grade(t, q) for t in ts) / len(ts) for q, ts in pairs]
        results[name] = summarize(asked, values[name], grades)
    if judge:
        from oracles.verdicts import of_open

        results["greedy"]["judged"] = of_open(asked, [done[q.id]["greedy"] for q in asked], judge)
    return results, values


def answer_row(question, greedy: str, sampled: list[str]) -> dict:
    """A row of answers.jsonl. `right` is of the greedy answer."""
    return {
        "id": question.id, "video": question.video, "category": question.category,
        "question": question.question, "gold": question.answer or str(list(question.spans)),
        "greedy": greedy, "right": is_correct(greedy, question), "sampled": sampled,
    }  # fmt: skip


def gains(questions, before: dict, after: dict) -> dict:
    """Paired difference after - before in accuracy, with its 95 % interval, greedy and sampled."""
    out = {}
    for name in before:
        difference = [b - a for a, b in zip(before[name], after[name], strict=True)]
        interval = list(bootstrap_ci(by_video(questions, difference)))
        out[name] = {"accuracy": sum(difference) / len(difference), "ci95": interval}
    return out


def table(before: dict, after: dict) -> str:
    """Before and after side by side, a row a category, in percent, as the paper's table has it."""
    from plumbing.progress import markdown

    columns = [("greedy", before), ("greedy", after), ("sampled", before), ("sampled", after)]
    rows, of_all = [], before["greedy"]
    for name, row in of_all["by_category"].items():
        cells = [f"{100 * e[mode]['by_category'][name]['accuracy']:.1f}" for mode, e in columns]
        rows.append([cell(name) or "(none)", row["n"], *cells])
    cells = []
    for mode, e in columns:
        low, high = (f"{100 * x:.1f}" for x in e[mode]["ci95"])
        cells.append(f"{100 * e[mode]['accuracy']:.1f} [{low}, {high}]")
    rows.append(["**all**", of_all["n"], *cells])
    if of_all["mean_iou"] is not None:
        cells = [f"{100 * e[mode]['mean_iou']:.1f}" for mode, e in columns]
        rows.append(["mean IoU of spans", "", *cells])
    if of_all.get("judged"):
        verdicts = [e[mode].get("judged") for mode, e in columns]
        cells = [f"{verdict['accuracy']:.1f}" if verdict else "" for verdict in verdicts]
        rows.append(["judge's verdict, open answers", verdicts[0]["n"], *cells])
    heads = ["category", "n", "greedy before", "greedy after", "sampled before", "sampled after"]
    return markdown(heads, rows)


def evaluate_run(folder: str, data: str, videos: str) -> str:
    """The table of a run's policy, supervised start beside it, on the run's held-out questions or on `data`,
    computed in the run's own dtype."""
    from videoqa.questions import load_questions

    if bool(data) != bool(videos):
        raise BadInput("--data and --videos go together: questions, and their videos' folder; give both")
    policy, tokenizer, config = load_run(folder, pick_device())
    set_up(policy.decoder, MachineOptions(dtype=config["dtype"]))
    if data:
        questions = load_questions(data, videos)
    else:
        names = [field.name for field in fields(DataOptions)]
        path, remedy = os.path.join(folder, "config.json"), "give --data and --videos"
        if not config.keys() >= set(names):
            raise BadInput(f"{path}: not all options of the data; {remedy}")
        with read_from(path):
            drawn = DataOptions(**{name: config[name] for name in names})
        sets = load_sets(drawn, config["seed"])
        refuse_changed(path, config, data_of(*sets), f"put it back, or {remedy}")
        questions = sets[1]
    prompts = PromptSet(policy, tokenizer, questions)
    at_once = dict(prompts_at_once=config.get("sample_prompts", 0))
    sampling = Sampling.of(policy, tokenizer, max_new_tokens=config["max_new_tokens"], **at_once)
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
    if kind_of(out):  # what the files of a pretrained layout do not tell, a supervised policy's do
        made = config | read_json(os.path.join(config["policy"], "config.json"), RUN)
        chosen = {name: made[name] for name in ("clip", "template", "video_tokens")}
        chosen |= {"policy": out, "num_frames": policy.cfg.num_frames}
        words = [f"--{name} {value}" for name, value in sorted(chosen.items()) if value not in ("", "auto")]
        print(f"use it: {' '.join(words)}")


def score(args) -> None:
    """Scores any model's predictions; open answers by a judge's verdict where one is named."""
    from videoqa import scores

    judged = None
    refuse_same(args.rows, args.data, args.predictions, args.judge_cache)
    refuse_same(args.json, args.data, args.predictions, args.judge_cache, args.rows)
    if args.judge_url or args.judge_model or args.judge_body or args.judge_cache:
        from oracles import verdicts

        judged = partial(verdicts.judged, judge=verdicts.judge_of(args))
    result = scores.score_file(args.data, args.predictions, judged, args.rows)
    print(scores.table(result["metrics"]))
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)


def main() -> int:
    from plumbing.progress import compare, differences, show_table

    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a run's tables again, or on other data")
    run.add_argument("run")
    run.add_argument("--data", type=some_text, help="JSONL of other questions than the run's held-out ones")
    run.add_argument("--videos", type=some_text, help="folder that its video paths are relative to")
    scorer = commands.add_parser("score", help="any model's predictions, lines {id, prediction}")
    scorer.add_argument("--data", required=True, help="JSONL of questions with their right answers")
    scorer.add_argument("--predictions", required=True, help="JSONL of {id, prediction}")
    scorer.add_argument("--json", default="", help="JSON file to write: the metrics")
    scorer.add_argument("--rows", default="", help="JSONL to write: what was read in each prediction")
    scorer.add_argument("--judge_url", default="", help="of an OpenAI-compatible server; key: ORACLE_API_KEY")
    scorer.add_argument("--judge_model", default="")
    scorer.add_argument("--judge_body", default="", help="JSON merged into every request; null takes out")
    scorer.add_argument("--judge_cache", default="", help="sqlite file (PRED.jsonl.judge.sqlite)")
    comparer = commands.add_parser("compare", help="finished runs side by side")
    comparer.add_argument("runs", nargs="+")
    merger = commands.add_parser("merge", help="a run's policy as a checkpoint of its own")
    merger.add_argument("run")
    merger.add_argument("--out", type=some_text, required=True, help="the folder to write")
    args = parser.parse_args()
    if args.command == "merge":
        merge_run(args.run, args.out)
    elif args.command == "run":
        show_table(evaluate_run(args.run, args.data or "", args.videos or ""))
    elif args.command == "compare":
        show_table(compare(args.runs))
        if unlike := differences(args.runs):
            print()
            show_table(unlike)
    else:
        score(args)
    return 0


if __name__ == "__main__":
    run_script(main)
