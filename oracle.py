"""Oracles: they order the G answers to one question and say nothing about how good any of them is.

An oracle is any object with

    rank(batch: list[Question] of P, texts: list[list[str]], P lists of G answers) -> Ranking

It sees the question (with the path of its video) and the texts, never log-probabilities. It must tie what it
cannot tell apart: an order has no absolute level, so among G equally wrong answers a tie-break by length or
position is a full-strength signal to prefer a wrong answer. Texts that are equal once stripped always tie.

This file has the rule oracle, the dual reward, and a user's own function. In oracles/: noise and permutations
(combine.py), the language model as a judge (judge.py), and the trained ranker (ranker.py).
"""

import importlib
import inspect
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_rank import ranks_from_scores
from plumbing.options import BadInput, one_line
from videoqa.answers import Question, grade, prompt_text, reward

# Why a ranking failed: the first word of its note. On the wire to a judge, and all causes
WIRE = "connection timeout busy server refused bad_reply dead".split()
CAUSES = [*WIRE, *"budget empty cut not_json missing duplicate unknown function".split()]
# What an objective reads beside the order: scores that differ in a group, or their level, of equals too
READS = {"grpo": "scores", "dr_grpo": "scores", "rloo": "scores", "ppo": "level"}


@dataclass
class Ranking:
    """What an oracle says about a batch of P groups."""

    ranks: Tensor  # (P, G) int64 competition ranks, 0 = best, ties share the better place: [0, 0, 2, 3, 3]
    ok: Tensor | None = None  # (P,) bool; False: the ranking failed, its row means nothing. None: all are ok
    notes: list[str] | None = None  # P texts for people; of a failed group "cause: words", a cause of CAUSES
    scores: Tensor | None = None  # (P, G) float64, higher is better, from an oracle that also scores
    agreement: Tensor | None = None  # (P,) float32, 0..1: Kendall's W, where it is to scale the advantages
    below_anchor: Tensor | None = None  # (P, G) bool: ranked below the gold answer
    dead: str = ""  # why the judge answers nothing any more
    sums: dict[str, float] = field(default_factory=dict)  # counts of this batch for the metrics
    reads: str = "order"  # what the objective reads of it: order, or one of READS

    def __post_init__(self):
        self.ok = torch.ones(len(self.ranks), dtype=torch.bool) if self.ok is None else self.ok
        self.notes = [""] * len(self.ranks) if self.notes is None else self.notes

    @property
    def live(self) -> Tensor:
        """(P,) bool: groups that carry a signal. The others are dead: all answers tie, or no ranking came."""
        if self.reads == "level":
            return self.ok
        values = self.scores if self.reads == "scores" else self.ranks
        return self.ok & (values != values[:, :1]).any(dim=1)

    @classmethod
    def joined(cls, parts: list["Ranking"]) -> "Ranking":
        """The groups of all parts as one batch."""
        found = {"reads": parts[0].reads, "dead": next((x.dead for x in parts if x.dead), "")}
        for name in ("ranks", "ok", "scores", "agreement", "below_anchor"):
            values = [getattr(part, name) for part in parts]
            found[name] = None if values[0] is None else torch.cat(values)
        names = dict.fromkeys(name for part in parts for name in part.sums)  # in order, unlike a set
        sums = {name: sum(part.sums.get(name, 0) for part in parts) for name in names}
        return cls(notes=[note for part in parts for note in part.notes], sums=sums, **found)


def checked_groups(batch: list[Question], texts: list[list[str]]) -> list[list[str]]:
    """texts without the spaces around each. Raises ValueError unless each question has the same G >= 2."""
    sizes = [len(group) for group in texts]
    if not batch or len(texts) != len(batch) or min(sizes) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"need G >= 2 texts for each of {len(batch)} questions, got groups of {sizes}")
    return [[text.strip() for text in group] for group in texts]


def competition_ranks(values: list) -> list[int]:
    """[7, 3, 7] -> [1, 0, 1]: how many are smaller."""
    return [sum(other < value for other in values) for value in values]


def ranks_by_text(group: list[str], rank_of: dict[str, int]) -> list[int]:
    """Competition ranks of a group from a rank of each distinct text, so that equal texts tie."""
    return competition_ranks([rank_of[text] for text in group])


class RuleOracle:
    """Ranks by `answers.grade`: the embedded world knows every answer."""

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks (P, G). Never fails. Equal grades tie, whatever the texts."""
        pairs = zip(batch, checked_groups(batch, texts), strict=True)
        # Rounded: spans of one IoU on paper may differ by 1e-16 in floats, which must not break the tie
        grades = [[round(grade(text, question), 6) for text in group] for question, group in pairs]
        return Ranking(ranks_from_scores(torch.tensor(grades, dtype=torch.float64)))


class RewardOracle:
    """Ranks by the dual reward of Temporal-R1 (arXiv:2506.01908; answers.reward), and scores by its sum.

    by: "sum" | "lexicographic" (the right answer first, then the overlap, then the form).
    weights: of the discrete, the continuous and the format part, for the sum.
    """

    def __init__(self, by: str, weights: tuple[float, float, float], overlap="iou", think=False):
        self.by, self.weights, self.overlap, self.think = by, weights, overlap, think

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks and scores (P, G). Never fails. Equal rewards tie."""
        pairs = zip(batch, checked_groups(batch, texts), strict=True)
        options = self.overlap, self.think
        rewards = [[reward(text, question, *options) for text in group] for question, group in pairs]
        totals = [[round(parts.total(*self.weights), 6) for parts in group] for group in rewards]
        scores = torch.tensor(totals, dtype=torch.float64)
        ranks = ranks_from_scores(scores)
        if self.by == "lexicographic":
            keys = [[tuple(-round(x, 6) for x in parts.key()) for parts in group] for group in rewards]
            ranks = torch.tensor([competition_ranks(group) for group in keys])
        sums, flat = {}, [parts for group in rewards for parts in group]
        for name in ("discrete", "continuous", "format"):
            values = [getattr(parts, name) for parts in flat if getattr(parts, name) is not None]
            sums |= {f"reward_{name}": sum(values), f"num_reward_{name}": len(values)}
        return Ranking(ranks, scores=scores, sums=sums)


class FunctionOracle:
    """A user's own ranker: f(question, texts, *, video, reference) -> competition ranks, 0 = best.

    A function that takes a parameter `item` is also given the whole Question (id, category, options, spans).
    It is called once for each group, with the distinct texts. If it raises anything, or returns something
    that is no ranking, its group fails.
    """

    def __init__(self, function):
        self.function = function
        self.takes_item = "item" in inspect.signature(function).parameters

    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks (P, G). Identical texts are ranked once and tie."""
        ranks, notes = [], []
        for question, group in zip(batch, checked_groups(batch, texts), strict=True):
            distinct, note = list(dict.fromkeys(group)), ""
            places = [0] * len(distinct)
            try:
                places = self._ask(question, distinct) if len(distinct) > 1 else places
            except (Exception, SystemExit) as error:  # a user's code may raise anything
                note = one_line(f"function: {type(error).__name__}: {error}")
            ranks.append(ranks_by_text(group, dict(zip(distinct, places, strict=True))))
            notes.append(note)
        return Ranking(torch.tensor(ranks), torch.tensor([not note for note in notes]), notes)

    def _ask(self, question: Question, distinct: list[str]) -> list[int]:
        asked = {"video": question.video, "reference": question.answer}
        asked |= {"item": question} if self.takes_item else {}
        places = [operator.index(x) for x in self.function(prompt_text(question), list(distinct), **asked)]
        if len(places) != len(distinct):
            raise ValueError(f"{len(places)} ranks for {len(distinct)} texts")
        if places != competition_ranks(places):
            raise ValueError(f"{places} are no competition ranks, it should be {competition_ranks(places)}")
        return places


def load_function(spec: str):
    """The function that "module:function" names. Raises BadInput if there is none."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # the module is the user's: whatever its import raises is shown
        words = one_line(f"{type(error).__name__}: {error}")
        raise BadInput(f"--oracle {spec}: {words}; put its folder on PYTHONPATH") from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise BadInput(f"--oracle {spec}: {module} has no plain function {name!r}; define it there")
    try:
        signature = inspect.signature(function)
        item = {"item": 0} if "item" in signature.parameters else {}
        signature.bind("", [], video="", reference="", **item)
    except (TypeError, ValueError) as error:
        raise BadInput(f"--oracle {spec}: {error}; define f(question, texts, *, video, reference)") from error
    return function


def weighed(advantages: Tensor, ranking: Ranking) -> Tensor:
    """Advantages (P, G) times the judge's agreement with itself; then none is above 0 below the gold answer.

    Where the gold answer is ranked too, a group's advantages need not sum to zero: if all answers are worse
    than the gold answer, none of them is reinforced.
    """
    if ranking.agreement is not None:
        advantages = advantages * ranking.agreement[:, None]
    if ranking.below_anchor is not None:
        advantages = torch.where(ranking.below_anchor, advantages.clamp(max=0.0), advantages)
    return advantages
