"""Oracles: they order the G answers to one question and say nothing about how good any of them is.

An oracle is any object with

    rank(batch: list[Question] of P, texts: list[str] of P * G, prompt-major) -> Ranking

It sees the question (with the path of its video) and the texts, never log-probabilities. It must tie what it
cannot tell apart: an order has no absolute level, so among G equally wrong answers a tie-break by length or
position is a full-strength signal to prefer a wrong answer. Texts that are equal once stripped always tie.

Here are the rule oracle, a user's own function, and what wraps any oracle: noise, several permutations, and a
reference answer that is ranked along. Elsewhere: the language model as a judge (judge.py), the trained ranker
(ranker.py).
"""

import importlib
import operator
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_rank import ranks_from_scores
from plumbing.machine import reduce_sum
from plumbing.options import BadInput
from videoqa.answers import (
    Question,
    Reward,
    grade,
    is_correct,
    kendall_tau,
    ndcg_agreement,
    prompt_text,
    reward,
)

# Why a ranking failed: the first word of its note. From the wire, of the reply, of the rest.
CAUSES = "connection timeout busy server refused bad_reply dead budget".split()
CAUSES += "empty cut not_json missing duplicate unknown function".split()
REFUSAL = re.compile(
    r"\b(?:i|we) (?:cannot|can't|can not|won't|am unable|am not able)\b|\bas an ai\b|^\W*(?:i'm )?sorry\b"
    r"|\b(?:unable|impossible|not able) to (?:answer|determine|tell|say)\b",
    re.IGNORECASE,
)


@dataclass
class Ranking:
    """What an oracle says about a batch."""

    ranks: Tensor  # (P, G) int64 competition ranks, 0 = best, ties share the better place: [0, 0, 2, 3, 3]
    ok: Tensor  # (P,) bool, False: the ranking failed (judge down, unreadable), its row means nothing
    notes: list[str]  # one per prompt, for people; of a failed one "cause: words", the cause one of CAUSES
    agreement: Tensor | None = None  # (P,) float32, 0..1: Kendall's W, where it is to scale the advantages
    below_anchor: Tensor | None = None  # (P, G) bool: ranked behind the reference answer
    dead: str = ""  # the judge answers nothing more at all: why
    sums: dict[str, float] = field(default_factory=dict)  # counts of this batch for the metrics

    @property
    def live(self) -> Tensor:
        """(P,) bool: groups that carry a signal. A group is dead if all its answers tie, or if its ranking
        failed; this is the one place that decides it."""
        return self.ok & (self.ranks != self.ranks[:, :1]).any(dim=1)


def group_size_of(batch: list[Question], texts: list[str]) -> int:
    """G. ValueError unless texts holds the same number of candidates, two or more, for each question."""
    if not batch or len(texts) % len(batch) or len(texts) < 2 * len(batch):
        raise ValueError(f"need G >= 2 texts for each of {len(batch)} questions, got {len(texts)} texts")
    return len(texts) // len(batch)


class RuleOracle:
    """Ranks by `answers.grade`: the embedded world knows every answer."""

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> ranks (P, G). Never fails; equal grades tie, whatever the texts."""
        group_size = group_size_of(batch, texts)
        # Rounded: spans of one IoU on paper may differ by 1e-16 in floats, which must not break the tie
        scores = [round(grade(text.strip(), batch[row // group_size]), 6) for row, text in enumerate(texts)]
        ranks = ranks_from_scores(torch.tensor(scores, dtype=torch.float64).view(len(batch), group_size))
        return Ranking(ranks, torch.ones(len(batch), dtype=torch.bool), [""] * len(batch))


class RewardOracle:
    """Ranks by the dual reward of Temporal-R1 (answers.reward): by its weighted sum or lexicographically.

    by: "sum" | "lexicographic" (the right answer, then the overlap, then the form). weights: of the discrete,
    the continuous and the format part, for the sum.
    """

    def __init__(self, by: str, weights: tuple[float, float, float], overlap="iou", think=False):
        self.by, self.weights, self.overlap, self.think = by, weights, overlap, think

    def rewards(self, batch: list[Question], texts: list[str]) -> list[Reward]:
        """The parts of each text's reward, (P * G), prompt-major."""
        G = group_size_of(batch, texts)
        return [reward(text, batch[row // G], self.overlap, self.think) for row, text in enumerate(texts)]

    def totals(self, batch: list[Question], texts: list[str]) -> Tensor:
        """(P, G) float64: the weighted sums, rounded as RuleOracle's grades are."""
        sums = [round(parts.total(*self.weights), 6) for parts in self.rewards(batch, texts)]
        return torch.tensor(sums, dtype=torch.float64).view(len(batch), -1)

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> ranks (P, G). Never fails; equal rewards tie."""
        if self.by == "sum":
            scores = self.totals(batch, texts)
        else:
            keys = [tuple(round(x, 6) for x in parts.key()) for parts in self.rewards(batch, texts)]
            level = {key: i for i, key in enumerate(sorted(set(keys)))}
            scores = torch.tensor([level[key] for key in keys], dtype=torch.float64).view(len(batch), -1)
        return Ranking(ranks_from_scores(scores), torch.ones(len(batch), dtype=torch.bool), [""] * len(batch))


class FunctionOracle:
    """A user's own ranker: f(question, texts, *, video, reference) -> a competition rank a text, 0 = best.

    It is called once a group with the distinct texts. What it raises, and what is no ranking, fails it.
    """

    def __init__(self, function):
        self.function = function

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> ranks (P, G). Identical texts are ranked once and tie."""
        group_size = group_size_of(batch, texts)
        ranks = torch.zeros(len(batch), group_size, dtype=torch.int64)
        notes = [""] * len(batch)
        for p, question in enumerate(batch):
            group = [text.strip() for text in texts[p * group_size : (p + 1) * group_size]]
            distinct = list(dict.fromkeys(group))
            try:
                places = self._ask(question, distinct) if len(distinct) > 1 else [0]
            except Exception as error:  # a user's code may raise anything; no group may end the run
                notes[p] = " ".join(f"function: {type(error).__name__}: {error}".split())
            else:
                place_of = dict(zip(distinct, places, strict=True))
                ranks[p] = ranks_from_scores(torch.tensor([-place_of[text] for text in group]))
        return Ranking(ranks, torch.tensor([not note for note in notes]), notes)

    def _ask(self, question: Question, distinct: list[str]) -> list[int]:
        asked = {"video": question.video, "reference": question.answer}
        places = [operator.index(x) for x in self.function(prompt_text(question), list(distinct), **asked)]
        if len(places) != len(distinct):
            raise ValueError(f"{len(places)} ranks for {len(distinct)} texts")
        if places != competition_ranks(places):
            raise ValueError(f"{places} are no competition ranks, it should be {competition_ranks(places)}")
        return places


def load_function(spec: str):
    """The function that "module:function" names. BadInput, one line, where there is none."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the module is the user's: whatever its import raises is shown
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"--oracle {spec}: {words}; put its folder on PYTHONPATH") from error
    if not callable(function):
        raise BadInput(f"--oracle {spec}: {module} has no function {name!r}; define it there")
    return function


def competition_ranks(values: list) -> list[int]:
    """[7, 3, 7] -> [1, 0, 1]: how many are smaller."""
    return [sum(other < value for other in values) for value in values]


def weighed(advantages: Tensor, ranking: Ranking) -> Tensor:
    """(P, G) -> (P, G): times the agreement of the judge with itself, then none above 0 behind the anchor.

    Under an anchor a group's advantages need not sum to zero: where all answers are worse than the reference
    none of them is reinforced.
    """
    if ranking.agreement is not None:
        advantages = advantages * ranking.agreement[:, None]
    if ranking.below_anchor is not None:
        advantages = torch.where(ranking.below_anchor, advantages.clamp(max=0.0), advantages)
    return advantages


# ------------------------------------------------------------------------------------------- for the metrics


def feedback_sums(texts: list[str], ranking: Ranking) -> dict[str, float]:
    """Failures by cause, tripwires and the oracle's own counts: sums that add up over processes."""
    P, G = ranking.ranks.shape
    causes = Counter(ranking.notes[p].partition(":")[0] for p in (~ranking.ok).nonzero().flatten().tolist())
    sums = {f"failed_{cause}": causes[cause] for cause in CAUSES} | {"texts": P * G}
    lengths = torch.tensor([len(text) for text in texts]).view(P, G)
    by_length = ranks_from_scores(lengths)[ranking.ok].tolist()  # 0 = longest
    pairs = zip(by_length, ranking.ranks[ranking.ok].tolist(), strict=True)
    tau = [x for x in (kendall_tau(length, oracle) for length, oracle in pairs) if x is not None]
    openings = Counter(" ".join(text.casefold().split()[:3]) for text in texts)
    sums |= {"length_tau": sum(tau), "num_length_tau": len(tau), "repeated": openings.most_common(1)[0][1]}
    return sums | {"refusals": sum(bool(REFUSAL.search(text)) for text in texts)} | ranking.sums


def feedback_means(n: dict[str, float]) -> dict:
    """feedback_sums over all processes -> metrics (docs/metrics.md)."""
    numbers = {
        "failed_by_cause": {cause: int(n[f"failed_{cause}"]) for cause in CAUSES if n[f"failed_{cause}"]},
        "length_tau": n["length_tau"] / max(n["num_length_tau"], 1),
        "repeated_openings": n["repeated"] / n["texts"],
        "refusals": n["refusals"] / n["texts"],
    }
    if "calls" in n:
        numbers |= {f"judge_{name}": int(n[name]) for name in ("calls", "cache_hits", "tokens", "repairs")}
    if "early" in n:
        numbers |= {"position_pairs": int(n["early"] + n["late"])}
        numbers |= {"position_bias": (n["early"] - n["late"]) / max(n["early"] + n["late"], 1)}
        numbers |= {"kendall_w": n["w"] / n["num_w"]} if n["num_w"] else {}
    if n.get("canaries"):
        numbers |= {"canaries": int(n["canaries"]), "canary_error": n["canary_errors"] / n["canaries"]}
    return numbers


def feedback_numbers(questions, texts, ranking: Ranking, policy_ranks, advantages, rollout) -> dict:
    """What the oracle said of a step, and how the policy's own order agrees with it, over all processes
    (docs/metrics.md). policy_ranks (P, G) int64, advantages (P, G) float32."""
    P, G = ranking.ranks.shape
    graded = zip(questions, texts, strict=True)
    right = torch.tensor([[is_correct(text, question) for text in group] for question, group in graded])
    orders = list(zip(policy_ranks[ranking.ok].tolist(), ranking.ranks[ranking.ok].tolist(), strict=True))
    ndcg = [x for x in (ndcg_agreement(p, o) for p, o in orders) if x is not None]
    tau = [x for x in (kendall_tau(p, o) for p, o in orders) if x is not None]
    sums = {
        "prompts": P, "completions": P * G, "right": right.sum(),
        "policy_tokens": rollout.completion_mask.sum(),
        "best_right": (right & (ranking.ranks == 0)).any(dim=1).sum(), "ended": rollout.ended.sum(),
        "failed": (~ranking.ok).sum(), "dead": (ranking.ok & ~ranking.live).sum(),
        "squares": (advantages**2).sum(), "ndcg": sum(ndcg), "num_ndcg": len(ndcg), "tau": sum(tau),
        "num_tau": len(tau),
    } | feedback_sums([text for group in texts for text in group], ranking)  # fmt: skip
    n = dict(zip(sums, reduce_sum(*sums.values(), device=rollout.ended.device), strict=True))
    return {
        "accuracy": n["right"] / n["completions"],
        "oracle_best_accuracy": n["best_right"] / n["prompts"],
        "ndcg": n["ndcg"] / max(n["num_ndcg"], 1),
        "kendall_tau": n["tau"] / max(n["num_tau"], 1),
        "dead_groups": int(n["dead"]),
        "failed_groups": int(n["failed"]),
        "advantage_rms": (n["squares"] / n["completions"]) ** 0.5,
        "mean_tokens": n["policy_tokens"] / n["completions"],
        "cut_share": 1 - n["ended"] / n["completions"],
        "tokens": int(n["policy_tokens"]),
    } | feedback_means(n)


def reward_numbers(rewards: list[Reward], device) -> dict:
    """Means of the dual reward's parts over all processes, each over the answers to tasks that have it; None
    without any."""
    names = ("discrete", "continuous", "format")
    parts = [[getattr(r, name) for r in rewards if getattr(r, name) is not None] for name in names]
    sums = reduce_sum(*map(sum, parts), *map(len, parts), device=device)
    return {f"reward_{name}": sums[i] / sums[i + 3] if sums[i + 3] else None for i, name in enumerate(names)}


def examples_of(questions, texts, ranking: Ranking, policy_ranks: Tensor, advantages: Tensor) -> list[dict]:
    """Two prompts of a step as rows of rollouts.jsonl."""
    return [
        {
            "id": q.id, "question": q.question, "answer": q.answer, "candidates": texts[i],
            "oracle_ok": bool(ranking.ok[i]), "note": ranking.notes[i],
            "oracle_ranks": ranking.ranks[i].tolist(), "policy_ranks": policy_ranks[i].tolist(),
            "advantages": [round(a, 6) for a in advantages[i].tolist()],
        }
        for i, q in enumerate(questions[:2])
    ]  # fmt: skip
