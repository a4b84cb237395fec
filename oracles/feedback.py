"""What a step's feedback says: numbers of metrics.jsonl (docs/metrics.md) and rows of rollouts.jsonl."""

import re
from collections import Counter

import torch
from torch import Tensor

from grpo_rank import ranks_from_scores
from oracle import CAUSES, Ranking
from plumbing.machine import reduce_sum
from videoqa.answers import Reward, is_correct, kendall_tau, ndcg_agreement

REFUSAL = re.compile(
    r"\b(?:i|we) (?:cannot|can't|can not|won't|am unable|am not able)\b|\bas an ai\b|^\W*(?:i'm )?sorry\b"
    r"|\b(?:unable|impossible|not able) to (?:answer|determine|tell|say)\b",
    re.IGNORECASE,
)


def feedback_numbers(questions, texts, ranking: Ranking, policy_ranks, advantages, rollout) -> dict:
    """What the oracle said in a step, and how the policy's own order agrees with it, over all processes
    (docs/metrics.md). policy_ranks (P, G) int64, advantages (P, G) float32."""
    sums = policy_sums(questions, texts, ranking, policy_ranks, rollout) | feedback_sums(texts, ranking)
    sums["squares"] = (advantages**2).sum()
    n = dict(zip(sums, reduce_sum(*sums.values(), device=rollout.ended.device), strict=True))
    return {
        "accuracy": n["right"] / n["texts"],
        "oracle_best_accuracy": n["best_right"] / n["groups"],
        "ndcg": n["ndcg"] / max(n["num_ndcg"], 1),
        "kendall_tau": n["tau"] / max(n["num_tau"], 1),
        "groups": int(n["groups"]),
        "advantage_rms": (n["squares"] / n["texts"]) ** 0.5,
        "mean_tokens": n["policy_tokens"] / n["texts"],
        "cut_share": 1 - n["ended"] / n["texts"],
        "tokens": int(n["policy_tokens"]),
    } | feedback_means(n)


def policy_sums(questions, texts, ranking: Ranking, policy_ranks, rollout) -> dict[str, float]:
    """What the policy answered, and how its order agrees with the oracle's; sums add up over processes."""
    graded = zip(questions, texts, strict=True)
    right = torch.tensor([[is_correct(text, question) for text in group] for question, group in graded])
    orders = list(zip(policy_ranks[ranking.ok].tolist(), ranking.ranks[ranking.ok].tolist(), strict=True))
    ndcg = [x for x in (ndcg_agreement(policy, oracle) for policy, oracle in orders) if x is not None]
    tau = [x for x in (kendall_tau(policy, oracle) for policy, oracle in orders) if x is not None]
    return {
        "right": right.sum(),
        "best_right": (right & (ranking.ranks == 0)).any(dim=1).sum(),
        "ndcg": sum(ndcg), "num_ndcg": len(ndcg),
        "tau": sum(tau), "num_tau": len(tau),
        "policy_tokens": rollout.completion_mask.sum(),
        "ended": rollout.ended.sum(),
    }  # fmt: skip


def feedback_sums(texts: list[list[str]], ranking: Ranking) -> dict[str, float]:
    """Failed groups by cause, signs that the policy games the oracle, and the oracle's own counts: sums that
    add up over processes."""
    flat = [text for group in texts for text in group]
    failed = [note for note, ok in zip(ranking.notes, ranking.ok.tolist(), strict=True) if not ok]
    causes = Counter(note.partition(":")[0] for note in failed)
    longest_first = ranks_from_scores(torch.tensor([[len(text) for text in group] for group in texts]))
    orders = zip(longest_first[ranking.ok].tolist(), ranking.ranks[ranking.ok].tolist(), strict=True)
    tau = [x for x in (kendall_tau(length, oracle) for length, oracle in orders) if x is not None]
    openings = Counter(" ".join(text.casefold().split()[:3]) for text in flat)
    sums = {
        "groups": len(texts), "texts": len(flat), "failed": len(failed),
        "dead": (ranking.ok & ~ranking.live).sum(),
        "length_tau": sum(tau), "num_length_tau": len(tau),
        "repeated": max(openings.values()),
        "refusals": sum(bool(REFUSAL.search(text)) for text in flat),
    }  # fmt: skip
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
    if "early" in n:
        pairs = n["early"] + n["late"]
        numbers |= {"position_pairs": int(pairs), "lost_rankings": int(n["lost"])}
        numbers["position_bias"] = (n["early"] - n["late"]) / max(pairs, 1)
        if n["num_w"]:
            numbers["kendall_w"] = n["w"] / n["num_w"]
    if n.get("canaries"):
        numbers |= {"canaries": int(n["canaries"]), "canary_error": n["canary_errors"] / n["canaries"]}
    return numbers


def reward_numbers(rewards: list[list[Reward]], device) -> dict:
    """Means of the dual reward's parts over all processes, each over the answers to tasks that have the part;
    None if there is no such answer."""
    numbers = {}
    for name in ("discrete", "continuous", "format"):
        values = [getattr(parts, name) for group in rewards for parts in group]
        values = [x for x in values if x is not None]
        total, count = reduce_sum(sum(values), len(values), device=device)
        numbers[f"reward_{name}"] = total / count if count else None
    return numbers


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
