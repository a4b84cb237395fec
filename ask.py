"""Ask a policy about a video, before and after its training; or let it answer a file of questions.

    python ask.py runs/default clip.mp4 "what color appears last" --gold blue  # or --oracle my_judge:shortest
    python ask.py clip.mp4 "what color appears last"            # no run folder: weights/, or --policy
    python ask.py runs/default --data FILE.jsonl --videos DIR --out pred.jsonl    # for eval.py score
    python ask.py runs/default DIR "what happens" --out pred.jsonl                # one question, all videos

With --gold or --oracle, sampled answers are ranked; the advantages are those of the default form and gain. A
--gold of "1.5 to 4.0 seconds" is a time span, ranked by overlap. Predictions go on where they stopped, if
pred.jsonl.settings says that the same questions, videos, weights and options made them. A run's policy
computes in the run's dtype, another one in float32.
"""

import os
from dataclasses import dataclass, fields, replace

import torch

import lora
from checkpoints.policies import PolicyOptions, data_of, load_policy, load_run, policy_of
from data import PromptSet
from grpo_rank import rank_advantages, ranks_from_scores
from oracle import FunctionOracle, RuleOracle, load_function
from plumbing.machine import MachineOptions, pick_device, set_up, show_progress
from plumbing.options import (
    ArgumentParser,
    BadInput,
    Count,
    Positive,
    add_options,
    cell,
    one_line,
    refuse_same,
    run_script,
)
from plumbing.progress import markdown, show_table
from plumbing.run_folder import Kept, fingerprint
from rollout import EVALUATED_AT_ONCE, Sampling, answer
from videoqa.answers import Question, parse_span
from videoqa.datasets import VIDEO_SUFFIXES
from videoqa.questions import load_questions

EMPTY = "(empty)"  # how an answer without a word is shown


@dataclass
class AskOptions(PolicyOptions):
    """The question, or a file of them"""

    gold: str = ""  # the right answer: ranks the sampled answers by it
    oracle: str = ""  # module:function that ranks the sampled answers
    group_size: Count = 5  # G: sampled answers
    max_new_tokens: Count = 10  # tokens of an answer at most; of a run folder the run's
    temperature: Positive = 1.0
    data: str = ""  # JSONL of questions, answered greedily
    videos: str = ""  # folder that its video paths are relative to
    out: str = ""  # JSONL of {"id", "prediction"} to write


def show_answers(policy, asked: PromptSet, sampling: Sampling, cfg: AskOptions, trained: bool) -> None:
    """Prints the greedy answers, and G sampled ones, the likeliest first, with an oracle's ranks."""
    G, row = cfg.group_size, torch.tensor([0])
    for when, use in {"before": "off", "after": "policy"}.items() if trained else [("without", "policy")]:
        with lora.using(policy.decoder, use):
            text = answer(policy, asked, row, 1, sampling, None)[1][0][0]
            print(f"{when} training: {one_line(text) or EMPTY}")
    uniforms = torch.rand(1, G, cfg.max_new_tokens, generator=torch.Generator().manual_seed(cfg.seed))
    rollout, texts = answer(policy, asked, row, G, sampling, uniforms)
    logprobs = rollout.logprobs.sum(dim=1).cpu()  # (G,)
    columns = {"sampled answer": [text or EMPTY for text in texts[0]]}
    columns["probability"] = [f"{p:.4f}" for p in logprobs.exp().tolist()]
    if cfg.gold or cfg.oracle:
        oracle = FunctionOracle(load_function(cfg.oracle)) if cfg.oracle else RuleOracle()
        ranking = oracle.rank(asked.questions, texts)
        if ranking.notes[0]:
            raise BadInput(f"--oracle {cfg.oracle}: no ranking ({ranking.notes[0]}); mend the function")
        policy_ranks = ranks_from_scores(logprobs[None].round(decimals=4))
        advantages = rank_advantages(ranking.ranks, policy_ranks)[0].tolist()
        columns |= {"oracle rank": ranking.ranks[0].tolist(), "policy rank": policy_ranks[0].tolist()}
        columns["advantage"] = [f"{a:+.3f}" for a in advantages]
    likeliest = logprobs.argsort(descending=True).tolist()
    show_table(markdown(columns, [[cell(values[i]) for values in columns.values()] for i in likeliest]))


def refuse_ignored(given: dict, cfg: AskOptions, run: str) -> None:
    """BadInput for an option that does nothing here, and for a group that no oracle can rank."""
    of_policy = {field.name for field in fields(PolicyOptions)} - {"seed"} | {"max_new_tokens"}
    why = dict.fromkeys(of_policy, f"the run in {run} has its own") if run else {}
    if cfg.out:
        of_sampling = ("gold", "oracle", "group_size", "temperature") + ("seed",) * bool(run)
        why |= dict.fromkeys(of_sampling, "--out takes greedy answers alone")
    if not cfg.data:
        why["videos"] = "only the paths in --data are relative to it"
    for name in filter(why.get, given):
        raise BadInput(f"--{name} {given[name]}: {why[name]}; leave --{name} out")
    if (cfg.gold or cfg.oracle) and cfg.group_size < 2:
        raise BadInput(f"--group_size {cfg.group_size}: one answer has no rank; give at least 2")


def questions_of(cfg: AskOptions, words: list[str]) -> tuple[str, list[Question]]:
    """(run folder or "", questions) of the command line: [RUN] VIDEO QUESTION, or [RUN] with --data."""
    least = 0 if cfg.data else 2
    if len(words) not in (least, least + 1):
        raise BadInput("give [RUN] VIDEO QUESTION, or [RUN] --data FILE.jsonl --videos DIR --out FILE")
    run, rest = words[0] if len(words) > least else "", words[-2:]
    if not all(words):
        raise BadInput("a RUN, VIDEO or QUESTION is empty; name it, or leave it out")
    if cfg.data:
        return run, load_questions(cfg.data, cfg.videos)
    if not rest[1].strip():
        raise BadInput("the question is empty; ask something")
    names = sorted(os.listdir(rest[0])) if os.path.isdir(rest[0]) else []
    videos = [os.path.join(rest[0], name) for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
    span = parse_span(cfg.gold) if "second" in cfg.gold else None
    if span and not span[0] < span[1]:
        raise BadInput(f"--gold {cfg.gold}: ends before it begins; write it as '1.5 to 4.0 seconds'")
    gold = dict(answer=cfg.gold, spans=(span,) if span else ())
    return run, [Question(os.path.basename(v), v, rest[1], **gold) for v in videos or rest[:1]]


def settings_of(cfg: AskOptions, run: str, questions: list[Question]) -> dict:
    """All that decides the predictions: those of other settings are not continued."""
    if run:
        files = [os.path.join(run, name) for name in ("config.json", "adapter", "best")]
        return data_of(questions) | {"run": fingerprint(*files)}
    return data_of(questions) | policy_of(cfg) | {"max_new_tokens": cfg.max_new_tokens}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="RUN, VIDEO, QUESTION")
    add_options(parser, AskOptions)
    given = vars(parser.parse_args())
    words, cfg = given.pop("words"), AskOptions(**given)
    run, questions = questions_of(cfg, words)
    refuse_ignored(given, cfg, run)
    if (cfg.data or len(questions) > 1) and not cfg.out:
        raise BadInput("--out: name the JSONL file that the predictions go to")
    refuse_same(cfg.out, cfg.data, *{question.video for question in questions})
    settings = settings_of(cfg, run, questions) if cfg.out else None
    kept = Kept(cfg.out, {"prediction": str}, bool(cfg.out), settings)
    left, dtype, at_once = [q for q in questions if q.id not in kept.of], "float32", EVALUATED_AT_ONCE
    if left:
        if run:
            policy, tokenizer, made = load_run(run, pick_device())
            cfg, dtype = replace(cfg, max_new_tokens=made["max_new_tokens"]), made["dtype"]
            at_once = made.get("sample_prompts") or at_once
        else:
            policy, tokenizer = load_policy(cfg, pick_device())
        set_up(policy.decoder, MachineOptions(dtype=dtype))
        asked = PromptSet(policy, tokenizer, left)
        how = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
        sampling = Sampling.of(policy, tokenizer, **how)
    if not cfg.out:
        return show_answers(policy, asked, sampling, cfg, bool(run))
    for rows in show_progress(torch.arange(len(left)).split(at_once) if left else (), "answering"):
        texts = answer(policy, asked, rows, 1, sampling, None)[1]
        kept.add([{"id": left[i].id, "prediction": text} for i, (text,) in zip(rows, texts, strict=True)])
    print(f"{len(questions)} predictions in {cfg.out}, {len(questions) - len(left)} of them from before")


if __name__ == "__main__":
    run_script(main)
