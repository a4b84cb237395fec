"""The oracle that the options name. What an oracle needs is imported only where it is chosen."""

import os
import time

import torch
from tqdm import tqdm

from oracle import FunctionOracle, Ranking, RewardOracle, RuleOracle, load_function
from oracles import combine


def by_reward(cfg) -> bool:
    return cfg.oracle in ("sum", "lexicographic") or cfg.objective == "grpo"


def reward_oracle(cfg) -> RewardOracle:
    by = "lexicographic" if cfg.oracle == "lexicographic" else "sum"
    weights = (cfg.discrete_coef, cfg.continuous_coef, cfg.format_coef)
    return RewardOracle(by, weights, cfg.overlap, cfg.think)


def choose_oracle(cfg, generator: torch.Generator, device: torch.device):
    """The oracle that the options name. A judge is asked something first, so that a wrong address, key or
    model ends the run before anything is written."""
    oracle = RuleOracle()
    if by_reward(cfg):
        oracle = reward_oracle(cfg)
    elif cfg.oracle in ("llm", "replay"):
        cache = cfg.oracle_cache or os.path.join(cfg.out, "judge.sqlite")
        options = {k.removeprefix("oracle_"): v for k, v in vars(cfg).items() if k.startswith("oracle_")}
        options |= {"cache": cache, "key": os.environ.get("ORACLE_API_KEY", ""), "seed": cfg.seed}
        del options["patience"]
        from oracles.cache import ReplayOracle, is_cache

        if cfg.oracle == "replay" and not is_cache(cache):
            oracle = ReplayOracle(cache)
        else:
            from oracles.judge import LLMOracle

            oracle = LLMOracle(**options, replay=cfg.oracle == "replay")
            oracle.check()
    elif cfg.oracle == "trained":
        from oracles.ranker import TrainedOracle, load_ranker

        oracle = TrainedOracle(load_ranker(cfg.ranker, device), cfg.ranker_margin)
    elif cfg.oracle != "rule":
        oracle = FunctionOracle(load_function(cfg.oracle))
    if cfg.swap_prob or cfg.position_bias:
        oracle = combine.NoisyOracle(oracle, generator, cfg.swap_prob, cfg.position_bias)
    if cfg.oracle_permutations > 1 and cfg.oracle not in ("llm", "replay"):  # the judge permutes by itself
        oracle = combine.PermutedOracle(oracle, cfg.oracle_permutations, cfg.oracle_agreement, cfg.seed)
    return combine.AnchoredOracle(oracle, cfg.anchor, cfg.canary) if cfg.anchor or cfg.canary else oracle


def rank_patiently(oracle, batch, texts, patience: float, interrupted) -> Ranking:
    """oracle.rank; while the judge is dead, again every few seconds, for `patience` seconds at most.

    What was ranked before the judge died comes from its cache. interrupted(): gives up at once.
    """
    ranking, until, pause = oracle.rank(batch, texts), time.monotonic() + patience, 1.0
    while ranking.dead and not ranking.dead.startswith("budget") and time.monotonic() < until:
        left = until - time.monotonic()
        tqdm.write(f"the judge is silent ({ranking.dead}); waiting {left:.0f} s at most (--oracle_patience)")
        resume, pause = time.monotonic() + min(pause, left), min(2 * pause, 30.0)
        while time.monotonic() < resume and not interrupted():
            time.sleep(0.1)
        if interrupted():
            break
        ranking = oracle.rank(batch, texts)
    return ranking
