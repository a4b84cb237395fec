"""Oracles around another oracle: noise, several permutations, and a gold answer that is ranked along; and how
several rankings of the same answers become one.
"""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import torch

from grpo_rank import ranks_from_scores
from oracle import Ranking, competition_ranks, group_size_of
from videoqa.answers import Question, grade


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
        return replace(ranking, ranks=ranks)

    def _noisy_levels(self, levels: dict[str, int], shown_first: str) -> dict[str, int]:
        """{distinct text: its oracle rank} -> the same with noise; lower is better, -1 is above all."""
        draw = torch.rand(len(levels) + 1, generator=self.generator).tolist()
        shuffled = torch.randperm(len(levels), generator=self.generator).tolist()
        order = [list(levels)[i] for i in shuffled]  # which of several tied texts swaps is chance, not place
        order.sort(key=levels.get)
        places = sorted(levels.values())
        for i in range(len(order) - 1):
            if places[i] != places[i + 1] and draw[i] < self.swap_prob:
                order[i], order[i + 1] = order[i + 1], order[i]
        noisy = dict(zip(order, places, strict=True))
        if draw[-1] < self.position_bias:
            noisy[shown_first] = -1
        return noisy


class PermutedOracle:
    """Another oracle, asked several times a group, each time with the candidates in another seeded order; its
    rankings become one (`settle`). agreement: off | scale (advantages by Kendall's W) | tie (disputed pairs).
    """

    def __init__(self, oracle, permutations: int, agreement: str, seed: int):
        self.oracle, self.permutations, self.agreement, self.seed = oracle, permutations, agreement, seed

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> ranks (P, G). A group fails where one of its rankings does."""
        G, orders = group_size_of(batch, texts), []
        groups = [[text.strip() for text in texts[p * G : (p + 1) * G]] for p in range(len(batch))]
        for question, group in zip(batch, groups, strict=True):
            orders.append(shown_orders(G, self.permutations, json.dumps([self.seed, question.id, group])))
        shown = [
            [group[i] for group, order in zip(groups, orders, strict=True) for i in order[k]]
            for k in range(len(orders[0]))
        ]
        rankings = [self.oracle.rank(batch, one) for one in shown]
        ranks, agreement, sums = [], torch.ones(len(batch)), dict.fromkeys(COUNTS, 0)
        for p in range(len(batch)):
            said = [ranking.ranks[p].tolist() for ranking in rankings]
            place, agreement[p], counts = settle(orders[p], said, self.agreement == "tie")
            sums = {name: value + counts[name] for name, value in sums.items()}
            ranks.append(place)
        ok = torch.stack([ranking.ok for ranking in rankings]).all(dim=0)
        notes = [max(said) for said in zip(*(ranking.notes for ranking in rankings), strict=True)]
        weights = agreement if self.agreement == "scale" else None
        return Ranking(torch.tensor(ranks), ok, notes, weights, sums=sums)


class AnchoredOracle:
    """Another oracle that ranks the reference answer along with the G candidates, unseen by them.

    anchor: candidates behind the reference are marked, so that they can earn no positive advantage
    (`weighed`): ranks know no absolute level, this gives them one. canary: a known-bad answer is ranked along
    as well; a judge that does not put it behind the reference has made an error, counted while training.
    """

    def __init__(self, oracle, anchor: bool, canary: bool):
        self.oracle, self.anchor, self.canary = oracle, anchor, canary

    def rank(self, batch: list[Question], texts: list[str]) -> Ranking:
        """texts (P * G), prompt-major -> the other oracle's ranks (P, G) of these alone."""
        G, along = group_size_of(batch, texts), []
        for p, question in enumerate(batch):
            along += [*texts[p * G : (p + 1) * G], question.answer]
            along += [wrong_answer(batch, p)] if self.canary else []
        ranking = self.oracle.rank(batch, along)
        own, reference, planted = ranking.ranks[:, :G], ranking.ranks[:, G], ranking.ranks[:, -1]
        below = own > reference[:, None] if self.anchor else None
        sums = dict(ranking.sums)
        if self.canary:
            sums |= {"canaries": int(ranking.ok.sum())}
            sums |= {"canary_errors": int((planted <= reference)[ranking.ok].sum())}
        return replace(ranking, ranks=ranks_from_scores(-own), below_anchor=below, sums=sums)


def wrong_answer(batch: list[Question], p: int) -> str:
    """An answer to question p of grade 0: one of its options, else the answer to another question."""
    others = [q.answer for q in batch[p + 1 :] + batch[:p]]
    wrong = (text for text in [*batch[p].options, *others] if text.strip() and grade(text, batch[p]) == 0)
    return next(wrong, "I do not know.")


# ------------------------------------------------------------------------- one order out of several rankings


def shown_orders(n: int, k: int, seed: str) -> list[list[int]]:
    """min(k, n!) different orders of n texts: a seeded shuffle, its rotations, then the next shuffle's.

    With k = n each text stands in each place once, so what a judge gives to a place it gives to all.
    """
    generator, orders = random.Random(seed), {}
    while len(orders) < min(k, math.factorial(n)):
        start = generator.sample(range(n), n)
        orders |= {tuple(start[i:] + start[:i]): None for i in range(n)}
    return [list(order) for order in orders][:k]


COUNTS = ("early", "late", "w", "num_w")  # what `settle` counts, for the metrics


def settle(orders: list[list[int]], said: list[list[int]], tie: bool) -> tuple[list[int], float, dict]:
    """Rankings of the same n texts, row k of `said` by place in order k -> one ranking by text, Kendall's W,
    and counts: pairs where the text shown first came out better (early) or worse (late), W and 1.

    tie: what the rankings disagree on ties.
    """
    asked = zip(orders, said, strict=True)
    votes = [[places[order.index(i)] for i in range(len(order))] for order, places in asked]
    place, w = consensus(votes), kendall_w(votes)
    pairs = [(x, y) for places in said for i, y in enumerate(places) for x in places[:i]]
    early, late = sum(x < y for x, y in pairs), sum(x > y for x, y in pairs)
    place = tie_disputed(place, votes) if tie else place
    return place, w, dict(zip(COUNTS, (early, late, w, 1), strict=True))


def consensus(votes: list[list[int]]) -> list[int]:
    """One ranking out of several of the same n texts: Kemeny's for n <= 7, Borda's above."""
    if all(vote == votes[0] for vote in votes):
        return votes[0]
    if len(votes[0]) <= 7:
        return kemeny(votes)
    lost = [
        sum(2 * (x < vote[i]) + (x == vote[i]) for vote in votes for x in vote) for i in range(len(votes[0]))
    ]
    return competition_ranks(lost)


def kemeny(votes: list[list[int]]) -> list[int]:
    """The order with ties at the least total Kemeny-Snell distance from the votes, exactly, over all of them.

    A pair costs 2 a vote that has it the other way round, 1 a vote with a tie for an order or the reverse.
    The dynamic programme takes the best level off each subset of the n texts, 3^n steps. Where several orders
    cost the same, texts go by their mean rank over all of these, so that none is favoured by its place.
    """
    n = len(votes[0])
    everyone = range(1 << n)
    sign = [[[(v[i] > v[j]) - (v[i] < v[j]) for v in votes] for j in range(n)] for i in range(n)]
    ahead = [[sum(s + 1 for s in sign[i][j]) for j in range(n)] for i in range(n)]  # cost of i before j
    level = [[sum(map(abs, sign[i][j])) for j in range(n)] for i in range(n)]  # cost of i tied with j
    members = [[i for i in range(n) if subset >> i & 1] for subset in everyone]
    before = [[sum(ahead[i][j] for j in members[subset]) for subset in everyone] for i in range(n)]
    tied = [sum(level[i][j] for i in inside for j in inside if i < j) for inside in members]
    # subset still to place -> cost, number of orders at that cost, sums of each one's ranks over them
    best = {0: (0, 1, [0] * n)}
    for subset in everyone[1:]:
        place, found = n - len(members[subset]), (float("inf"), 0, [])
        top = subset
        while top:  # every non-empty part of the subset
            cost, count, places = best[subset ^ top]
            cost += tied[top] + sum(before[i][subset ^ top] for i in members[top])
            if cost <= found[0]:
                places = [x + place * count * (top >> i & 1) for i, x in enumerate(places)]
                if cost == found[0]:
                    count, places = count + found[1], [a + b for a, b in zip(places, found[2], strict=True)]
                found = (cost, count, places)
            top = (top - 1) & subset
        best[subset] = found
    return competition_ranks(best[everyone[-1]][2])


def kendall_w(votes: list[list[int]]) -> float:
    """Kendall's coefficient of concordance with the correction for ties, 0..1; 1 where every vote ties all.

    W = 12 S / (m^2 (n^3 - n) - m sum(t^3 - t)), S the squared deviations of the m votes' sums of mid-ranks.
    """
    m, n = len(votes), len(votes[0])
    middle = [[sum(x < v for x in vote) + (vote.count(v) - 1) / 2 for v in vote] for vote in votes]
    totals = [sum(column) for column in zip(*middle, strict=True)]
    S = sum((total - sum(totals) / n) ** 2 for total in totals)
    ties = sum(t**3 - t for vote in votes for t in Counter(vote).values())
    span = m**2 * (n**3 - n) - m * ties
    return 12 * S / span if span else 1.0


def tie_disputed(ranks: list[int], votes: list[list[int]]) -> list[int]:
    """The ranking with each pair tied that not all votes put the same way, and all that lies between."""
    merged = list(ranks)
    for i in range(len(ranks)):
        for j in range(i):
            if len({(v[i] > v[j]) - (v[i] < v[j]) for v in votes}) > 1:
                low, high = sorted((merged[i], merged[j]))
                merged = [low if low <= x <= high else x for x in merged]
    return competition_ranks(merged)
