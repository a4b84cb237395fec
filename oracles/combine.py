"""Oracles around another oracle: noise, several orders of the same answers, duels of two, and the gold answer
ranked along; and how several rankings of the same answers become one.
"""

import functools
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from grpo_rank import ranks_from_scores
from oracle import Ranking, checked_groups, competition_ranks, ranks_by_text
from videoqa.answers import Question, grade, prompt_text


class NoisyOracle:
    """Another oracle with the errors of a human or a model judge, for experiments.

    swap_prob: in one pass from the top, two texts that are neighbours in the ranking and do not tie change
    places with this probability. position_bias: then, with this probability, the text shown first is put on
    top, alone. Equal texts still tie, failed rankings pass through. All draws come from `generator` (CPU).
    """

    def __init__(self, oracle, generator: torch.Generator, swap_prob=0.0, position_bias=0.0):
        self.oracle, self.generator = oracle, generator
        self.swap_prob, self.position_bias = swap_prob, position_bias

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> the other oracle's ranking with noise."""
        ranking = self.oracle.rank(batch, texts)
        ranks = ranking.ranks.clone()
        for p in ranking.ok.nonzero().flatten().tolist():
            group = [text.strip() for text in texts[p]]
            rank_of = dict(zip(group, ranking.ranks[p].tolist(), strict=True))
            draw = torch.rand(len(rank_of) + 1, generator=self.generator).tolist()
            shuffled = torch.randperm(len(rank_of), generator=self.generator).tolist()
            order = [list(rank_of)[i] for i in shuffled]  # which of several tied texts swaps is chance
            order.sort(key=rank_of.get)
            places = sorted(rank_of.values())
            for i in range(len(order) - 1):
                if places[i] != places[i + 1] and draw[i] < self.swap_prob:
                    order[i], order[i + 1] = order[i + 1], order[i]
            noisy = dict(zip(order, places, strict=True))
            if draw[-1] < self.position_bias:
                noisy[group[0]] = -1
            ranks[p] = torch.tensor(ranks_by_text(group, noisy))
        return replace(ranking, ranks=ranks)


class BentOracle:
    """Another oracle's scores as a judge gives them who is not calibrated from question to question.

    The scores of a question, at most `top`, are bent by a curve of its own, low + (high - low) u^power with
    u = score / top; each distinct text gets noise of standard deviation `noise`; the sum is rounded to whole
    numbers from 0 to 10, and the ranks are its order. bend, 0 to 1: how far the curves are apart. Draws: the
    curve from seed and question, the noise from `generator` (CPU).
    """

    def __init__(self, oracle, generator: torch.Generator, bend: float, noise: float, top: float, seed: int):
        self.oracle, self.generator, self.bend, self.noise = oracle, generator, bend, noise
        self.top, self.seed = top, seed

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks and scores (P, G); a failed group stays one."""
        ranking = self.oracle.rank(batch, texts)
        scores = torch.zeros_like(ranking.scores)
        for p, (question, group) in enumerate(zip(batch, texts, strict=True)):
            rng = random.Random(f"{self.seed} {question.id}")
            low, high = 0.6 * self.bend * rng.random(), 1 - 0.3 * self.bend * rng.random()
            power = math.exp(self.bend * rng.uniform(-1.5, 1.5))
            distinct = sorted({text.strip() for text in group})
            draws = torch.randn(len(distinct), generator=self.generator).tolist()
            noise = dict(zip(distinct, draws, strict=True))
            for g, text in enumerate(group):
                u = min(max(ranking.scores[p, g].item() / self.top, 0.0), 1.0)
                bent = low + (high - low) * u**power + self.noise * noise[text.strip()]
                scores[p, g] = min(max(round(10 * bent), 0), 10)
        return replace(ranking, ranks=ranks_from_scores(scores), scores=scores)


class PermutedOracle:
    """Another oracle, asked about a group in several seeded orders; its rankings become one (`settle`).

    All orders of all groups go to the other oracle in one batch. An order depends only on seed, question and
    distinct texts. A group fails if all of its rankings fail; else it keeps the others. agreement, what
    disagreement does: off | scale (advantages are multiplied by Kendall's W) | tie (disputed pairs tie).
    """

    def __init__(self, oracle, permutations: int, agreement: str, seed: int):
        self.oracle, self.permutations, self.agreement, self.seed = oracle, permutations, agreement, seed

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks (P, G); where the other oracle scores, each text's mean score too."""
        groups, G = checked_groups(batch, texts), len(texts[0])
        asked = []  # (number of a group, one order of its distinct texts), an entry a ranking
        for p, (question, group) in enumerate(zip(batch, groups, strict=True)):
            distinct = sorted(set(group))
            seed = json.dumps([self.seed, prompt_text(question), distinct])
            orders = shown_orders(len(distinct), self.permutations, seed)
            asked += [(p, [distinct[i] for i in order]) for order in orders]
        filled_up = [order + order[-1:] * (G - len(order)) for _, order in asked]
        inner = self.oracle.rank([batch[p] for p, _ in asked], filled_up)
        ranks, ok, notes = torch.zeros(len(batch), G, dtype=torch.int64), [], []
        scores, agreement = torch.zeros(len(batch), G, dtype=torch.float64), torch.ones(len(batch))
        sums = Counter(dict.fromkeys(COUNTS, 0))
        for p, group in enumerate(groups):
            own = [row for row, (owner, _) in enumerate(asked) if owner == p]
            kept = [row for row in own if inner.ok[row]]
            ok.append(bool(kept))
            notes.append(max(inner.notes[row] for row in own))
            if not kept:
                continue
            rank_of, agreement[p], counts = settle(by_text(asked, inner.ranks, kept), self.agreement == "tie")
            ranks[p] = torch.tensor(ranks_by_text(group, rank_of))
            sums.update(counts, lost=len(own) - len(kept))
            if inner.scores is not None:
                given = by_text(asked, inner.scores, kept)
                scores[p] = torch.tensor([fmean(one[text] for one in given) for text in group])
        return Ranking(
            ranks, torch.tensor(ok), notes, None if inner.scores is None else scores,
            agreement if self.agreement == "scale" else None, dead=inner.dead, sums={**inner.sums, **sums},
        )  # fmt: skip


def by_text(asked, values: Tensor, rows: list[int]) -> list[dict]:
    """{text: its value} of each of these rankings; what the last text was repeated for is left out."""
    return [dict(zip(asked[row][1], values[row].tolist(), strict=False)) for row in rows]


class DuelOracle:
    """Another oracle, asked about two answers at a time; the duels of a group become one ranking.

    asks: "pairs" (`round_robin`) or "tournament" (`knock_out`, its draw seeded). All duels that can be held
    at once go to the other oracle in one batch. A group fails if one of its duels does.
    """

    def __init__(self, oracle, asks: str, seed: int):
        self.oracle, self.seed = oracle, seed
        self.play = {"pairs": round_robin, "tournament": knock_out}[asks]

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks (P, G)."""
        groups = checked_groups(batch, texts)
        ranks, notes, dead = torch.zeros(len(batch), len(texts[0]), dtype=torch.int64), [""] * len(batch), ""
        plays, pairs, sums = [], {}, Counter()
        for p, (question, group) in enumerate(zip(batch, groups, strict=True)):
            drawn = sorted(set(group))
            random.Random(json.dumps([self.seed, prompt_text(question), drawn])).shuffle(drawn)
            plays.append(self.play(drawn))
            pairs[p] = next(plays[p])
        while pairs:  # group -> the duels of its next round
            rows = [(p, pair) for p, own in pairs.items() for pair in own]
            inner = self.oracle.rank([batch[p] for p, _ in rows], [list(pair) for _, pair in rows])
            sums.update(inner.sums)
            dead, points = inner.dead or dead, {p: [] for p in pairs}
            duels = zip(rows, inner.ranks.tolist(), inner.ok.tolist(), inner.notes, strict=True)
            for (p, _), (one, other), ok, note in duels:
                points[p].append(0.5 if one == other else float(one < other))
                notes[p] = notes[p] if ok else note
            pairs = {}
            for p, own in points.items():
                try:
                    if not notes[p]:
                        pairs[p] = plays[p].send(own)
                except StopIteration as end:
                    ranks[p] = torch.tensor(ranks_by_text(groups[p], end.value))
        ok = torch.tensor([not note for note in notes])
        return Ranking(ranks, ok, notes, dead=dead, sums=dict(sums))


def round_robin(texts: list[str]):
    """Every two of n texts meet, n (n - 1) / 2 duels. Yields the pairs and is sent the points of the first of
    each: 1 for a win, 1/2 for a tie, 0. Returns {text: less is better}, by points."""
    pairs = list(itertools.combinations(texts, 2)) or [(texts[0], texts[0])]
    points = Counter()
    for (one, other), won in zip(pairs, (yield pairs), strict=True):
        points[one] -= won
        points[other] -= 1 - won
    return points


def knock_out(texts: list[str]):
    """Seeded single elimination (ArenaRL, arXiv:2601.06487), 2 (n - 1) duels, yielded as by `round_robin`.

    Duels against the first text seed the others. Then, in each round, the best of those left meets the worst;
    of an odd number the best waits. Texts rank by the round that they were knocked out in, then by their mean
    points. Differs from ArenaRL: who is knocked out by a tie takes the rank of the text that it tied with.
    """
    points, out, tied_with = {text: [] for text in texts}, {}, {}

    def duels(pairs):
        results = yield pairs
        for (one, other), won in zip(pairs, results, strict=True):
            points[one].append(won)
            points[other].append(1 - won)
        return zip(pairs, results, strict=True)

    def mean(text):
        return sum(points[text]) / len(points[text])

    yield from duels([(texts[0], other) for other in texts[1:]] or [(texts[0], texts[0])])
    left = sorted(texts, key=lambda text: -mean(text))
    while len(left) > 1:
        playing = left[len(left) % 2 :]
        pairs = [(playing[i], playing[-1 - i]) for i in range(len(playing) // 2)]
        for (one, other), won in (yield from duels(pairs)):
            winner, loser = (one, other) if won >= 0.5 else (other, one)
            out[loser] = len(left)
            if won == 0.5:
                tied_with[loser] = winner
        left = [text for text in left if text not in out]
    out[left[0]] = 1
    rank_of = {}
    for text in sorted(texts, key=out.get):  # a text comes after whoever knocked it out
        rank_of[text] = rank_of[tied_with[text]] if text in tied_with else (out[text], -mean(text))
    return rank_of


class AnchoredOracle:
    """Another oracle that ranks the gold answer along with the G candidates.

    anchor: candidates ranked below the gold answer are marked, so that they earn no positive advantage
    (`weighed`). canary: a known-bad answer is ranked too; a judge that does not put it below the gold answer
    has made an error, which is counted.
    """

    def __init__(self, oracle, anchor: bool, canary: bool):
        self.oracle, self.anchor, self.canary = oracle, anchor, canary

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> the other oracle's ranks (P, G) of the G alone."""
        groups, longer = checked_groups(batch, texts), []
        for p, group in enumerate(groups):
            bad = [wrong_answer(batch, p)] if self.canary else []
            longer.append([*group, batch[p].answer, *bad])
        ranking, G = self.oracle.rank(batch, longer), len(groups[0])
        own, gold, planted = ranking.ranks[:, :G], ranking.ranks[:, G], ranking.ranks[:, -1]
        below = own > gold[:, None] if self.anchor else None
        scores = ranking.scores[:, :G] if ranking.scores is not None else None
        sums = {name: n for name, n in ranking.sums.items() if "reward_" not in name}  # not of the G alone
        if self.canary:
            errors = (planted <= gold)[ranking.ok].sum()
            sums |= {"canaries": int(ranking.ok.sum()), "canary_errors": int(errors)}
        return replace(ranking, ranks=ranks_from_scores(-own), scores=scores, below_anchor=below, sums=sums)


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


# What the metrics count of several rankings: pairs in which the text shown first came out better, or worse;
# Kendall's W and how many groups it is the sum of; failed rankings of groups that others were kept of
COUNTS = ("early", "late", "w", "num_w", "lost")


def settle(rankings: list[dict[str, int]], tie: bool) -> tuple[dict[str, int], float, dict[str, float]]:
    """Several rankings of the same texts, each {text: rank} in the order that was shown -> one ranking,
    Kendall's W, and COUNTS. tie: what the rankings disagree on ties."""
    texts = list(rankings[0])
    votes = [[ranking[text] for text in texts] for ranking in rankings]
    places, w = consensus(votes), kendall_w(votes)
    pairs = [pair for ranking in rankings for pair in itertools.combinations(ranking.values(), 2)]
    counts = {"early": sum(x < y for x, y in pairs), "late": sum(x > y for x, y in pairs)}
    counts |= {"w": w, "num_w": 1} if len(texts) > 1 else {"w": 0, "num_w": 0}
    places = tie_disputed(places, votes) if tie else places
    return dict(zip(texts, places, strict=True)), w, counts


def consensus(votes: list[list[int]]) -> list[int]:
    """One ranking out of several of the same n texts: Kemeny's for n <= 7, Borda's above."""
    if all(vote == votes[0] for vote in votes):
        return votes[0]
    if len(votes[0]) <= 7:
        return kemeny(votes)
    return competition_ranks(signs(torch.tensor(votes)).sum(dim=(0, 2)).tolist())


def signs(rankings: Tensor) -> Tensor:
    """(m, n) ranks -> (m, n, n): 1 where i is worse than j, 0 where they tie, -1 where it is better."""
    return (rankings[:, :, None] - rankings[:, None, :]).sign()


def kemeny(votes: list[list[int]]) -> list[int]:
    """The order with ties at the least total Kemeny-Snell distance from the votes, exactly, over all of them.

    A pair costs 2 a vote that has it the other way round, 1 a vote with a tie for an order or the reverse.
    Where several orders cost the same, texts go by their mean rank over these: none is favoured by its place.
    """
    n = len(votes[0])
    orders, pairs = weak_orders(n)
    first, second = torch.triu_indices(n, n, offset=1)
    own_pairs = signs(torch.tensor(votes))[:, first, second].float()
    cost = torch.cdist(pairs, own_pairs, p=1).sum(dim=1)
    return competition_ranks(orders[cost == cost.min()].sum(dim=0).tolist())


@functools.cache
def weak_orders(n: int) -> tuple[Tensor, Tensor]:
    """All orders of n texts with ties, as competition ranks (m, n) int64, and the `signs` of their pairs,
    (m, n (n - 1) / 2) float32. n = 7 has m = 47,293."""
    rows = torch.cartesian_prod(*[torch.arange(n)] * n).view(-1, n)
    orders = rows[(ranks_from_scores(-rows) == rows).all(dim=1)]
    first, second = torch.triu_indices(n, n, offset=1)
    return orders, signs(orders)[:, first, second].float()


def kendall_w(votes: list[list[int]]) -> float:
    """Kendall's coefficient of concordance with the correction for ties, 0..1; 1 where every vote ties all.

    W = 12 S / (m^2 (n^3 - n) - m sum(t^3 - t)), S the squared deviations of the m votes' sums of mid-ranks.
    """
    m, n = len(votes), len(votes[0])
    behind = signs(torch.tensor(votes))
    # A mid-rank deviates from (n - 1) / 2 by half its row's sum of signs
    S = behind.sum(dim=(0, 2)).square().sum().item() / 4
    tied_with = (behind == 0).sum(dim=2)  # t, once for each of the t texts
    ties = (tied_with**2 - 1).sum().item()
    span = m**2 * (n**3 - n) - m * ties
    return 12 * S / span if span else 1.0


def tie_disputed(ranks: list[int], votes: list[list[int]]) -> list[int]:
    """The ranking with each pair tied that not all votes put the same way, and all that lies between."""
    merged, ways = list(ranks), signs(torch.tensor(votes))
    for i, j in (ways != ways[0]).any(dim=0).nonzero().tolist():
        low, high = sorted((merged[i], merged[j]))
        merged = [low if low <= x <= high else x for x in merged]
    return competition_ranks(merged)
