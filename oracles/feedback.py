"""What a step's feedback says: numbers of metrics.jsonl (docs/metrics.md) and rows of rollouts.jsonl."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import starmap
from statistics import fmean

import torch
from torch import Tensor

from grpo_rank import ranks_from_scores
from oracle import CAUSES, Ranking
from plumbing.machine import reduce_sum
from rollout import Completions
from videoqa.answers import Question, is_correct

REFUSAL = re.compile(
    r"\b(?:i|we) (?:cannot|can't|can not|won't|am unable|am not able)\b|\bas an ai\b|^\W*(?:i'm )?sorry\b"
    r"|\b(?:unable|impossible|not able) to (?:answer|determine|tell|say)\b",
    re.IGNORECASE,
)


@dataclass
class Groups:
    """P questions, G answers to each, and what the oracle says about them."""

    rows: Tensor  # (P,) int64, numbers of the questions
    questions: list[Question]
    texts: list[list[str]]
    rollout: Completions
    ranking: Ranking

    def after(self, earlier: "Groups | None") -> "Groups":
        """These and the earlier ones of the step as one."""
        if earlier is None:
            return self
        pair = earlier, self
        return Groups(
            torch.cat([x.rows for x in pair]), earlier.questions + self.questions, earlier.texts + self.texts,
            Completions.joined([x.rollout for x in pair]), Ranking.joined([x.ranking for x in pair]),
        )  # fmt: skip

    def fill(self, P: int) -> bool:
        """Whether P groups, over all processes, carry a signal."""
        return reduce_sum(self.ranking.live.sum(), device=self.rollout.ended.device)[0] >= P


def feedback_numbers(groups: Groups, policy_ranks: Tensor, advantages: Tensor) -> dict:
    """What the policy answered in a step, what the oracle said, how their orders agree, over all processes
    (docs/metrics.md). policy_ranks (P, G) int64, advantages (P, G) float32."""
    ranking, rollout = groups.ranking, groups.rollout
    graded = zip(groups.questions, groups.texts, strict=True)
    right = torch.tensor([[is_correct(text, question) for text in group] for question, group in graded])
    sums = {
        "right": right.sum(), "best_right": (right & (ranking.ranks == 0)).any(dim=1)[ranking.ok].sum(),
        "policy_tokens": rollout.completion_mask.sum(), "ended": rollout.ended.sum(),
        "squares": (advantages**2).sum(),
    }  # fmt: skip
    sums |= agreement("ndcg", ndcg_agreement, policy_ranks, ranking)
    sums |= agreement("tau", kendall_tau, policy_ranks, ranking)
    sums |= pair_sums(right[ranking.ok], ranking) | feedback_sums(groups.texts, ranking)
    n = dict(zip(sums, reduce_sum(*sums.values(), device=rollout.ended.device), strict=True))
    return {
        "accuracy": n["right"] / n["texts"],
        "oracle_best_accuracy": n["best_right"] / max(n["groups"] - n["failed"], 1),
        "ndcg": n["ndcg"] / max(n["num_ndcg"], 1),
        "kendall_tau": n["tau"] / max(n["num_tau"], 1),
        "groups": int(n["groups"]),
        "asked_groups": int(n["asked"]),
        "advantage_rms": (n["squares"] / n["texts"]) ** 0.5,
        "mean_tokens": n["policy_tokens"] / n["texts"],
        "cut_share": 1 - n["ended"] / n["texts"],
        "tokens": int(n["policy_tokens"]),
    } | feedback_means(n)


def ndcg_agreement(policy_ranks_row: list[int], oracle_ranks_row: list[int]) -> float | None:
    """How well the policy's order puts the oracle's best first, in (0, 1]; None if the oracle ties all.

    DCG = sum_i gain(oracle_i) / log2(2 + position_i), gain(r) = 1 / ((1 + r) * log2(2 + r)), over the DCG of
    the oracle's own order. Items that the policy ties share the mean discount of their positions. 0 = best.
    """
    gains = [1 / ((1 + r) * math.log2(2 + r)) for r in oracle_ranks_row]
    dcgs = []
    for order in (policy_ranks_row, oracle_ranks_row):
        share = {r: fmean(1 / math.log2(2 + i) for i, x in enumerate(sorted(order)) if x == r) for r in order}
        dcgs.append(sum(gain * share[r] for gain, r in zip(gains, order, strict=True)))
    return dcgs[0] / dcgs[1] if len(set(oracle_ranks_row)) > 1 else None


def kendall_tau(policy_ranks_row: list[int], oracle_ranks_row: list[int]) -> float | None:
    """Kendall's tau-b of two rankings of one group, in [-1, 1]; None if either ties all.

    (concordant - discordant) / sqrt(pairs untied in one * pairs untied in the other)
    """
    rows = (policy_ranks_row, oracle_ranks_row)
    policy, oracle = ([(x > y) - (x < y) for i, x in enumerate(row) for y in row[:i]] for row in rows)
    untied = sum(map(abs, policy)) * sum(map(abs, oracle))
    return sum(p * o for p, o in zip(policy, oracle, strict=True)) / math.sqrt(untied) if untied else None


def agreement(name: str, measure, ranks: Tensor, ranking: Ranking) -> dict[str, float]:
    """Of `measure` of ranks (P, G) and the oracle's, over the ranked groups that have one: sum and count."""
    rows = zip(ranks[ranking.ok].tolist(), ranking.ranks[ranking.ok].tolist(), strict=True)
    values = [x for x in starmap(measure, rows) if x is not None]
    return {name: sum(values), f"num_{name}": len(values)}


def pair_sums(right: Tensor, ranking: Ranking) -> dict[str, float]:
    """How often feedback puts a right answer above a wrong one, a tie counting half: pairs and wins within a
    group, by order and score, and across groups by score. right (P, G) bool, of the groups that were ranked.
    """
    owner, flat, sums = torch.arange(len(right)).repeat_interleave(right.shape[1]), right.flatten(), {}
    pairs, same = flat[:, None] & ~flat, owner[:, None] == owner  # (P * G, P * G)

    def count(name, values, chosen):
        x = values[ranking.ok].double().flatten()
        wins = (x[:, None] > x).double() + 0.5 * (x[:, None] == x)
        sums.update({f"{name}_pairs": chosen.sum(), f"{name}_wins": wins[chosen].sum()})

    count("order", -ranking.ranks, pairs & same)
    if ranking.scores is not None:
        count("score", ranking.scores, pairs & same)
        count("across", ranking.scores, pairs & ~same)
    return sums


def feedback_sums(texts: list[list[str]], ranking: Ranking) -> dict[str, float]:
    """Failed groups by cause, signs that the policy games the oracle, and the oracle's own counts, to be
    added up over processes (of repeated openings: each process's own commonest)."""
    flat = [text for group in texts for text in group]
    failed = [note for note, ok in zip(ranking.notes, ranking.ok.tolist(), strict=True) if not ok]
    causes = Counter(note.partition(":")[0] for note in failed)
    longest_first = ranks_from_scores(torch.tensor([[len(text) for text in group] for group in texts]))
    sums = {
        "groups": len(texts), "texts": len(flat), "failed": len(failed),
        "asked": sum(len({text.strip() for text in group}) > 1 for group in texts),  # something to order
        "dead": (ranking.ok & ~ranking.live).sum(),
        "repeated": max(Counter(" ".join(text.casefold().split()[:3]) for text in flat).values()),
        "refusals": sum(bool(REFUSAL.search(text)) for text in flat),
    }  # fmt: skip
    sums |= agreement("length_tau", kendall_tau, longest_first, ranking)
    return sums | {f"failed_{cause}": causes[cause] for cause in CAUSES} | ranking.sums


def feedback_means(n: dict[str, float]) -> dict:
    """The sums of feedback_sums over all processes -> metrics (docs/metrics.md)."""
    numbers = {
        "dead_groups": int(n["dead"]),
        "failed_groups": int(n["failed"]),
        "failed_by_cause": {cause: int(n[f"failed_{cause}"]) for cause in CAUSES if n[f"failed_{cause}"]},
        "length_tau": n["length_tau"] / max(n["num_length_tau"], 1),
        "repeated_openings": n["repeated"] / n["texts"],
        "refusals": n["refusals"] / n["texts"],
    }
    numbers |= {name: int(value) for name, value in n.items() if name.startswith("judge_")}
    for name in ("order", "score", "across"):
        if n.get(f"{name}_pairs"):
            numbers[f"{name}_right"] = n[f"{name}_wins"] / n[f"{name}_pairs"]
    for name in [name for name in n if name.startswith("reward_")]:
        numbers[name] = n[name] / n[f"num_{name}"] if n[f"num_{name}"] else None
    if "early" in n:
        pairs = n["early"] + n["late"]
        numbers |= {"position_pairs": int(pairs), "lost_rankings": int(n["lost"])}
        numbers["position_bias"] = (n["early"] - n["late"]) / max(pairs, 1)
        if n["num_w"]:
            numbers["kendall_w"] = n["w"] / n["num_w"]
    if n.get("canaries"):
        numbers |= {"canaries": int(n["canaries"]), "canary_error": n["canary_errors"] / n["canaries"]}
    return numbers


def examples_of(groups: Groups, policy_ranks: Tensor, advantages: Tensor) -> list[dict]:
    """Two prompts of a step as rows of rollouts.jsonl."""
    ranking = groups.ranking
    return [
        {
            "id": q.id, "question": q.question, "answer": q.answer, "candidates": groups.texts[i],
            "oracle_ok": bool(ranking.ok[i]), "note": ranking.notes[i],
            "oracle_ranks": ranking.ranks[i].tolist(), "policy_ranks": policy_ranks[i].tolist(),
            "advantages": [round(a, 6) for a in advantages[i].tolist()],
        }
        for i, q in enumerate(groups.questions[:2])
    ]  # fmt: skip
