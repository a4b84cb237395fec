"""The oracle that the options name. What an oracle needs is imported only where it is chosen."""

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from oracle import READS, FunctionOracle, Ranking, RewardOracle, RuleOracle, load_function
from plumbing.machine import process_info, reduce_sum, say
from plumbing.options import (
    BadInput,
    Bounds,
    Count,
    CountOrNone,
    NotNegative,
    Options,
    Share,
    one_line,
    shipped,
)
from plumbing.run_folder import fingerprint

ORACLES = ("rule", "sum", "lexicographic", "llm", "trained", "replay")
# Options that do nothing with any other oracle; a replay repeats those of its judge
JUDGES = "url model body frames gold concurrency timeout patience max_calls max_tokens".split()
BELONG = {f"oracle_{name}": ("llm", "replay") for name in [*JUDGES, "cache"]}
BELONG |= dict.fromkeys(("ranker", "ranker_margin"), ("trained",))
Limited = Annotated[float, Bounds(0, 10**6)]  # no sum or product of such numbers leaves a float's range


@dataclass
class OracleOptions(Options):
    """The oracle: who ranks the answers, and how it is asked"""

    oracle: str = "rule"  # rule | sum | lexicographic | llm | trained | replay | module:function
    oracle_asks: Literal["lists", "pairs", "tournament", "scores"] = "lists"  # scores: llm, 0 to 10 each
    oracle_permutations: Count = 1  # rankings asked for a group, each with the answers in another order
    oracle_gold: bool = False  # show the judge the gold answer
    oracle_url: str = ""  # llm: http://HOST:PORT/v1 of an OpenAI-compatible server; key in ORACLE_API_KEY
    oracle_model: str = ""  # llm: the model's name at that server
    oracle_body: str = ""  # llm: JSON merged into every request; null takes a field out
    oracle_frames: CountOrNone = 0  # llm: pictures of the video that the judge is shown
    oracle_concurrency: Count = 64  # llm: calls in flight
    oracle_timeout: Annotated[float, Bounds(0, 10**6, above=True)] = 120.0  # llm: seconds for a whole reply
    oracle_patience: Limited = 600.0  # seconds to wait for a judge that died, before the run stops
    oracle_max_calls: CountOrNone = 0  # llm: budget until the run is started or resumed again; 0: no limit
    oracle_max_tokens: CountOrNone = 0  # llm: the same in tokens
    oracle_cache: str = ""  # llm: sqlite file, empty: judge.sqlite in --out; replay: the file, or a JSONL
    ranker: str = "weights/ranker"  # trained: folder of the ranker (pretrain.py --stage ranker)
    ranker_margin: NotNegative = 0.5  # trained: log-odds below the best of a level that still tie with it
    discrete_coef: Limited = 1.0  # dual reward (sum, objectives by scores): of the right answer
    continuous_coef: Limited = 1.0  # dual reward: weight of the spans' overlap
    format_coef: Limited = 0.1  # dual reward: weight of the form
    overlap: Literal["iou", "iop"] = "iou"  # dual reward: how the overlap is measured

    def __post_init__(self):
        super().__post_init__()
        if self.oracle not in ORACLES and ":" not in self.oracle:
            raise BadInput(f"--oracle {self.oracle}: choose one of {', '.join(ORACLES)}, module:function")
        for name, oracles in BELONG.items():
            value = getattr(self, name)
            if self.oracle not in oracles and value != getattr(OracleOptions, name):
                raise BadInput(f"--{name} {value}: needs --oracle {oracles[0]}; choose it, or leave it out")
        if self.ranker == OracleOptions.ranker:
            self.ranker = shipped(self.ranker)
        if self.oracle == "llm" and not (self.oracle_url and self.oracle_model):
            raise BadInput("--oracle llm needs --oracle_url and --oracle_model; give both")
        if self.oracle_asks == "scores" and self.oracle not in ("llm", "replay"):
            raise BadInput("--oracle_asks scores: only a judge is asked for scores; choose --oracle llm")
        if self.oracle == "replay" and not os.path.isfile(self.oracle_cache):
            raise BadInput(f"--oracle_cache {self.oracle_cache}: no such file to replay; name one")
        if self.oracle == "llm" and self.oracle_cache:
            from oracles.cache import check_cache

            check_cache(self.oracle_cache, "oracle")
        if not (self.discrete_coef or self.continuous_coef or self.format_coef):
            raise BadInput("--discrete_coef, --continuous_coef, --format_coef: all are 0; raise one of them")


@dataclass
class OracleExperiments(Options):
    """Experiments: faults of an oracle, and remedies that RESULTS.md shows to change little"""

    swap_prob: Share = 0.0  # chance that two neighbours in the oracle's order swap
    position_bias: Share = 0.0  # chance that the first candidate is put on top
    score_bend: Share = 0.0  # sum, and objectives by scores: how far apart the scales of two questions are
    score_noise: Limited = 0.0  # the same: noise of a score, as a share of the scale
    oracle_agreement: Literal["off", "scale", "tie"] = "off"  # scale advantages by Kendall's W | tie disputes
    anchor: bool = False  # the gold answer is ranked too: no positive advantage below it
    canary: bool = False  # a known-bad answer is ranked too, which measures the judge's errors


def choose_oracle(cfg, generator: torch.Generator, device: torch.device):
    """The oracle of train.py's options. `generator` draws the noise. A judge is asked something first, so
    that a wrong address, key or model ends the run before anything is written."""
    name = "sum" if cfg.oracle == "rule" and cfg.objective in READS else cfg.oracle
    weights = cfg.discrete_coef, cfg.continuous_coef, cfg.format_coef
    bends = cfg.score_bend or cfg.score_noise
    if bends and name != "sum":
        raise BadInput("--score_bend, --score_noise: bend the scores of --oracle sum; choose it")
    if name in ("sum", "lexicographic"):
        oracle = RewardOracle(name, weights, cfg.overlap, cfg.think)
    elif name == "rule":
        oracle = RuleOracle()
    elif name in ("llm", "replay"):
        oracle = choose_judge(cfg)
    elif name == "trained":
        from oracles.ranker import TrainedOracle, load_ranker

        oracle = TrainedOracle(load_ranker(cfg.ranker, device), cfg.ranker_margin)
    else:
        oracle = FunctionOracle(load_function(cfg.oracle))
    # A judge is always shown a seeded order, so that it cannot favour the place of an answer in the batch
    duels = cfg.oracle_asks in ("pairs", "tournament")
    permutes = cfg.oracle_permutations > 1 or duels or cfg.oracle in ("llm", "replay")
    noisy, gold = cfg.swap_prob or cfg.position_bias, cfg.anchor or cfg.canary
    if not (bends or noisy or permutes or gold):
        return oracle
    from oracles import combine

    if bends:
        bend = (cfg.score_bend, cfg.score_noise)
        oracle = combine.BentOracle(oracle, generator, *bend, sum(weights), cfg.seed)
    if noisy:
        oracle = combine.NoisyOracle(oracle, generator, cfg.swap_prob, cfg.position_bias)
    if permutes:
        oracle = combine.PermutedOracle(oracle, cfg.oracle_permutations, cfg.oracle_agreement, cfg.seed)
    if duels:
        oracle = combine.DuelOracle(oracle, cfg.oracle_asks, cfg.seed)
    return combine.AnchoredOracle(oracle, cfg.anchor, cfg.canary) if gold else oracle


def choose_judge(cfg):
    """The language model that judges, or the file that its rankings are replayed from."""
    from oracles.cache import ReplayOracle, is_cache
    from oracles.judge import LETTERS, LLMOracle

    num_letters = len(LETTERS) - cfg.anchor - cfg.canary
    if cfg.group_size > num_letters and cfg.oracle_asks in ("lists", "scores"):
        words = f"a judge has letters for {num_letters}; give at most that"
        raise BadInput(f"--group_size {cfg.group_size}: {words}")
    cache = cfg.oracle_cache or os.path.join(cfg.out, "judge.sqlite")
    if cfg.oracle == "replay" and not is_cache(cache):
        if cfg.oracle_asks == "scores":
            raise BadInput(f"--oracle_cache {cache}: a JSONL has ranks, no scores; name an sqlite file")
        return ReplayOracle(cache)
    options = {name: getattr(cfg, f"oracle_{name}") for name in JUDGES}
    options |= {"scored": cfg.oracle_asks == "scores", "replay": cfg.oracle == "replay", "cache": cache}
    judge = LLMOracle(**options, key=os.environ.get("ORACLE_API_KEY", ""))
    judge.check()
    return judge


def made_from(cfg) -> dict[str, str]:
    """The fingerprint of the files that the oracle is made of: a resume on others is refused."""
    paths = {"trained": [cfg.ranker], "replay": [cfg.oracle_cache]}.get(cfg.oracle, [])
    if ":" in cfg.oracle:
        paths = [getattr(sys.modules.get(cfg.oracle.partition(":")[0]), "__file__", None) or ""]
    return {"--oracle": fingerprint(*paths)}


def check_replayed(cfg, batches):
    """Raises BadInput for the first question of the run of which a replayed JSONL has no group. cfg:
    train.Config with num_steps; batches: data.Batches.

    Which answers will be given is known only in training, and an sqlite file holds no group whose answers are
    all one; so neither is checked here.
    """
    if cfg.oracle != "replay":
        return
    from oracles.cache import ReplayOracle, is_cache

    if is_cache(cfg.oracle_cache):
        return
    known = {id for id, _ in ReplayOracle(cfg.oracle_cache).groups}
    rows = {row for step in range(cfg.num_steps) for row in batches.rows(step).tolist()}
    for id in (batches.asked.questions[row].id for row in sorted(rows)):
        if id not in known:
            words = f"lacks any group of question {id}; replay the run it is of"
            raise BadInput(f"{cfg.oracle_cache}: {words}")


class PatientOracle:
    """An oracle in training: waits for a judge that died, and lets no failure pass unseen.

    objective: reads the ranking in its own way (oracle.READS). patience: seconds to wait for a dead judge.
    interrupted(): whether to give up at once. The first failure of each cause is printed. Raises BadInput if
    all groups of the first step failed, over all processes.
    """

    def __init__(self, oracle, objective: str, patience: float, interrupted, device: torch.device):
        self.oracle, self.patience, self.interrupted, self.device = oracle, patience, interrupted, device
        self.reads = READS.get(objective, "order")
        self.reported, self.first = set(), True

    @property
    def judge(self):
        """The language model that is asked, None if there is none; in the first process only, so that several
        do not ask for the same verdicts."""
        oracle = self.oracle
        while oracle and not getattr(oracle, "chat", None):
            oracle = vars(oracle).get("oracle")
        return oracle if process_info()[0] == 0 else None

    def announce(self, cfg, batches):
        """Says what a judge can cost in the whole run. cfg: train.Config; batches: data.Batches."""
        if cfg.oracle != "llm":
            return
        G = cfg.group_size + cfg.anchor + cfg.canary
        a_group = {"pairs": G * (G - 1) // 2, "tournament": 2 * (G - 1)}.get(cfg.oracle_asks, 1)
        calls = cfg.num_steps * batches.fill * batches.P * cfg.oracle_permutations * a_group
        tokens = self.judge.request.get("max_tokens") if self.judge else None
        say(
            f"the judge is called at most {calls:,} times in training, twice that if no reply is clear; a"
            f" reply has at most {tokens or 'as many as the server lets it have'} tokens; an evaluation asks"
            " for a verdict on each open answer that is not the right one word by word"
        )

    def rank(self, batch, texts) -> Ranking:
        """The other oracle's ranking. While its judge is dead, it is asked again every few seconds; what was
        ranked before the judge died comes from its cache."""
        ranking, until, pause = self.oracle.rank(batch, texts), time.monotonic() + self.patience, 1.0
        while ranking.dead and not ranking.dead.startswith("budget") and time.monotonic() < until:
            left = until - time.monotonic()
            line = f"the judge is silent ({ranking.dead}); waiting {left:.0f} s at most (--oracle_patience)"
            tqdm.write(line)
            resume, pause = time.monotonic() + min(pause, left), min(2 * pause, 30.0)
            while time.monotonic() < resume and not self.interrupted():
                time.sleep(0.1)
            if self.interrupted():
                break
            ranking = self.oracle.rank(batch, texts)
        self._tell(ranking, texts)
        return replace(ranking, reads=self.reads)

    def _tell(self, ranking: Ranking, texts):
        from oracles.remedies import remedy_of

        failures = [note for note in ranking.notes if note]
        for note in failures:
            cause, remedy = note.partition(":")[0], remedy_of(note)
            if (cause, remedy) not in self.reported:
                tqdm.write(f"a ranking failed ({one_line(note)}); {remedy}", file=sys.stderr)
                self.reported.add((cause, remedy))
        if not self.first:
            return
        self.first = False
        to_order = torch.tensor([len({text.strip() for text in group}) > 1 for group in texts])
        counts = (~ranking.ok).sum(), (ranking.ok & to_order).sum(), bool(ranking.dead)
        num_failed, num_good, num_dead = reduce_sum(*counts, device=self.device)
        if num_failed and not num_good and not num_dead:
            note = failures[0] if failures else "in another process"
            words = f"all {num_failed:.0f} groups of the first step failed, the first with {note}"
            raise BadInput(f"--oracle: {words}; {remedy_of(note)}")
