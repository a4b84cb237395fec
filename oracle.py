"""Oracles: they order the G answers to one question and say nothing about how good any of them is.

An oracle is any object with

    rank(batch: list[Question] of P, texts: list[str] of P * G, prompt-major) -> Ranking

It sees the question (with the path of its video) and the texts, never log-probabilities. It must tie what it
cannot tell apart: an order has no absolute level, so among G equally wrong answers a tie-break by length or
position is a full-strength signal to prefer a wrong answer. Texts that are equal once stripped always tie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from answers import Question, Reward, grade, reward
from grpo_rank import ranks_from_scores


@dataclass
class Ranking:
    """What an oracle says about a batch."""

    ranks: Tensor  # (P, G) int64 competition ranks, 0 = best, ties share the better place: [0, 0, 2, 3, 3]
    ok: Tensor  # (P,) bool, False: the ranking failed (judge down, unreadable), its row means nothing
    notes: list[str]  # one per prompt, for people; "" when there is nothing to say


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


class NoisyOracle:
    """Another oracle with the errors of a human or a model judge, for experiments.

    oracle: any object with `rank`.
    swap_prob: each pair of distinct texts next to each other in the ranking and not tied changes places with
    this probability, in one pass from the top (so a text may fall several places, but rises by one at most).
    position_bias: then, with this probability, the text shown first is put on top, alone.
    Equal texts still tie; failed rankings pass through. Every draw comes from `generator` (CPU), so a resume
    that restores its state restores the noise.
    """

    def __init__(
        self, oracle, generator: torch.Generator, swap_prob: float = 0.0, position_bias: float = 0.0
    ):
        self.oracle, self.generator = oracle, generator
        self.swap_prob, self.position_bias = swap_prob, position_bias

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> the other oracle's ranking with noise."""
        ranking = self.oracle.rank(batch, texts)
        group_size = group_size_of(batch, texts)
        ranks = ranking.ranks.clone()
        for p in ranking.ok.nonzero().flatten().tolist():
            group = [text.strip() for text in texts[p * group_size : (p + 1) * group_size]]
            levels = self._noisy_levels(dict(zip(group, ranking.ranks[p].tolist(), strict=True)), group[0])
            ranks[p] = ranks_from_scores(torch.tensor([-levels[text] for text in group]))
        return Ranking(ranks, ranking.ok, ranking.notes)

    def _noisy_levels(self, levels: dict[str, int], shown_first: str) -> dict[str, int]:
        """{distinct text: its oracle rank} -> the same with noise; lower is better, -1 is above all."""
        draw = torch.rand(len(levels) + 1, generator=self.generator).tolist()
        shuffled = torch.randperm(len(levels), generator=self.generator).tolist()
        order = [
            list(levels)[i] for i in shuffled
        ]  # so that which of several tied texts swaps is chance, not place
        order.sort(key=levels.get)
        places = sorted(levels.values())
        for i in range(len(order) - 1):
            if places[i] != places[i + 1] and draw[i] < self.swap_prob:
                order[i], order[i + 1] = order[i + 1], order[i]
        noisy = dict(zip(order, places, strict=True))
        if draw[-1] < self.position_bias:
            noisy[shown_first] = -1
        return noisy
