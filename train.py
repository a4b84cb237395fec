"""Oracle-RLAIF (arXiv:2510.02561): fine-tune a video-language policy with nothing but an oracle's ranks.

    python train.py                                       # the embedded world, from weights/
    python train.py --data FILE.jsonl --videos DIR        # real videos and questions
    torchrun --nproc_per_node=2 train.py                  # more processes, the same update

Read `learn` first: it is the paper's algorithm. What a run folder holds: plumbing/run_folder.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from checkpoints.policies import PolicyOptions, data_of, load_adapter_of, load_policy, save_adapter_of
from data import Batches, DataOptions, Prompts, PromptSet, draw_world, load_sets
from eval import evaluate, gains, table
from grpo_rank import Objective, rank_advantages, ranks_from_scores, rollout_loss
from lora import Learner, freeze_reference
from model import VideoLM
from oracle import Ranking, weighed
from oracles import choose
from oracles.feedback import Groups, examples_of, feedback_numbers
from plumbing.machine import (
    MachineOptions,
    compiled,
    describe,
    first_process,
    optimizer_step,
    process_info,
    reduce_sum,
    say,
    set_up,
    start_processes,
    steady_products,
)  # fmt: skip
from plumbing.options import (
    Alpha,
    BadInput,
    Bounds,
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    PositiveShare,
    parse_args,
    run_script,
)  # fmt: skip
from plumbing.run_folder import RunFolder, RunOptions, check_folder, fingerprint, stored_options
from rollout import Sampling, answer, completion_states, micro_batches, reference_states, rows_of
from videoqa.video import frame_strip


@dataclass
class Config(
    PolicyOptions, DataOptions, choose.OracleOptions, RunOptions, MachineOptions, choose.OracleExperiments
):
    """The algorithm: Oracle-RLAIF and GRPO_rank"""

    preset: Literal["tiny", "smoke", "lm", "7b"] = (
        "tiny"  # smoke: seconds; lm: up to 1B; 7b: the paper's (docs/checkpoints.md)
    )
    num_steps: CountOrNone = 100  # optimiser rounds: sample, order, update; 0: as many as num_epochs make
    num_epochs: CountOrNone = 0  # passes over the questions, where num_steps is 0
    batch_prompts: Count = 48  # P: prompts a step, over all processes
    fill: Count = 1  # batches a step may ask until batch_prompts groups carry a signal (DAPO); 1: no more
    group_size: Annotated[int, Bounds(2, 10**9)] = 5  # G: completions a prompt, ordered by the oracle
    max_new_tokens: Count = 10  # tokens of an answer at most
    temperature: Positive = 1.0
    top_p: PositiveShare = 1.0
    objective: Literal["grpo_rank", "grpo", "dr_grpo", "rloo", "ppo", "dpo", "plackett_luce", "best_of"] = (
        "grpo_rank"  # the others: baselines.py, the rivals on the same rollouts
    )
    advantage_form: Literal["ideal", "printed", "inverted"] = "ideal"  # README, "What the paper leaves open"
    gain: Literal["divided", "appendix"] = "divided"
    updates_per_rollout: Count = 2  # optimiser steps on a rollout; with 1 the clip never binds
    clip_eps: Positive = 0.2
    norm: Literal["sequence", "token", "constant"] = "sequence"  # constant: max_new_tokens a completion
    kl_coef: NotNegative = 0.02  # weight of KL(reference || policy), exact over the vocabulary
    beta: Positive = 0.5  # dpo, plackett_luce: what a nat of difference from the reference is worth
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus
    lora_r: Count = 16
    lora_alpha: Alpha = 32.0
    lr: Positive = 1e-3  # of the first step; it falls in equal steps towards 0 at num_steps
    max_grad_norm: Positive = 1.0  # a longer gradient is scaled down to this
    eval_samples: Count = 4  # drawn answers a question in the sampled accuracy

    def __post_init__(self):
        super().__post_init__()
        if not self.policy:
            raise BadInput(f"--preset {self.preset} brings no weights: name a folder with --policy")
        if not self.num_steps and not self.num_epochs:
            raise BadInput("--num_steps 0 --num_epochs 0: there is nothing to do; give one of them")
        if self.objective != "grpo_rank":
            rivals().check_objective(self)


PRESETS = {
    "smoke": dict(num_train_clips=24, num_eval_clips=16, num_steps=3, batch_prompts=8, micro_batch_prompts=4),
    # A pretrained decoder up to about 1B on a CPU or a small GPU. At the rate of 1e-3 it drifts 0.8 nats a
    # token from its reference in one step.
    "lm": dict(
        policy="", num_frames=8, num_steps=60, batch_prompts=12, max_new_tokens=8, eval_samples=1, lr=1e-4,
        num_train_clips=200, num_eval_clips=60, sample_prompts=12, micro_batch_prompts=6, save_every=10,
    ),
    # Oracle-RLAIF as far as it is published: 5 answers, r 64, alpha 16, all linear layers, 50 frames, 4
    # epochs, 64 prompts a rollout. NF4, length, rate, two passes, clip and KL weight are VLM-RLAIF's.
    "7b": dict(
        policy="", base="nf4", num_frames=50, num_steps=0, num_epochs=4, batch_prompts=64, sample_prompts=2,
        micro_batch_prompts=1, group_size=5, eval_samples=1, max_new_tokens=896, lora_r=64, lora_alpha=16.0,
        lr=3e-5, updates_per_rollout=2, clip_eps=0.2, kl_coef=0.1, max_grad_norm=1.0, dtype="bfloat16",
        checkpointing=True, memory_plan=True, save_every=5,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- the loop


def learn(cfg: Config, policy: VideoLM, learner: Learner, oracle, batches: Batches, sampling, run: RunFolder):
    """Oracle-RLAIF, the paper's algorithm. Raises EndedEarly where a run stops before its last step."""
    G = cfg.group_size
    for step in run.steps(cfg.num_steps):
        # 0) as an epoch begins, the policy as it is now becomes the frozen reference
        if step % batches.steps_an_epoch == 0:
            freeze_reference(policy.decoder)

        groups = None
        for attempt in range(batches.fill):  # --fill: further questions until P groups carry a signal
            # 1) the policy answers each of P questions G times
            rows, uniforms = batches.of_step(step, G, cfg.max_new_tokens, attempt)
            with run.clock("sampling"), steady_products(policy.decoder):
                rollout, texts = answer(policy, batches.asked, rows, G, sampling, uniforms)
            # 2) the oracle ranks the answers: it sees questions and texts, never log-probabilities
            with run.clock("oracle"):
                questions = [batches.asked.questions[i] for i in rows]
                ranking = oracle.rank(questions, texts)
            run.stop_if(ranking.dead)
            groups = Groups(rows, questions, texts, rollout, ranking).after(groups)
            if groups.fill(batches.P):
                break

        # 3) the ranks become advantages; groups that carry no signal leave the step here
        ranking, rollout = groups.ranking, groups.rollout
        policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(-1, G).cpu().round(decimals=4))
        advantages = advantages_of(cfg, ranking, policy_ranks)  # (P, G)
        prompts, live = batches.asked[groups.rows[ranking.live]], rollout.of_prompts(ranking.live)

        # 4) clipped updates on the live groups, with KL to the frozen reference and an entropy bonus
        with run.clock("reference"):
            ref_states = reference_states(policy, prompts, live, cfg.micro_batch_prompts)
        with run.clock("update"):
            signal = dict(advantages=advantages[ranking.live], ranks=ranking.ranks[ranking.live])
            batch = dict(prompts=prompts, rollout=live, **signal)
            numbers = update(cfg, policy, learner, ref_states=ref_states, step=step, **batch)

        # 5) report, save
        numbers |= feedback_numbers(groups, policy_ranks, advantages)
        run.report(numbers, examples_of(groups, policy_ranks, advantages), batch)


def rivals():
    """baselines.py, loaded only for another objective than grpo_rank."""
    import baselines

    return baselines


def advantages_of(cfg: Config, ranking: Ranking, policy_ranks: Tensor) -> Tensor:
    """(P, G) float32 of the chosen objective."""
    if cfg.objective != "grpo_rank":
        return rivals().advantages(cfg.objective, ranking)
    form, gain = cfg.advantage_form, cfg.gain
    return weighed(rank_advantages(ranking.ranks, policy_ranks, form, gain, ranking.ok), ranking)


# ------------------------------------------------------------------------------------------------ the update

MEANS = ("kl", "entropy", "clipped", "ratio")  # over the tokens of all updates


def update(
    cfg: Config, policy: VideoLM, learner: Learner, *, prompts: Prompts, rollout,
    advantages: Tensor, ref_states: list[Tensor], step: int, ranks: Tensor | None = None,
) -> dict:  # fmt: skip
    """GRPO_rank's clipped updates on one rollout, of which only live groups are left; a process without any
    takes part with a gradient of zero. advantages, ranks (P, G). Returns the step's numbers, the MEANS None
    if no process had a live group. "bad": an update's gradient was not finite, so it and all after it were
    left out."""
    G, device = cfg.group_size, prompts.prompt_ids.device
    micro, advantages = micro_batches(len(prompts.prompt_ids), cfg.micro_batch_prompts), advantages.to(device)
    mask = rollout.completion_mask
    num_tokens, num_sequences = reduce_sum(mask.sum(), mask.any(dim=1).sum(), device=device)
    sums, gap = dict.fromkeys(("tokens", "loss", *MEANS), 0.0), 0.0
    head = policy.decoder.head.float()  # logits in float32
    kl_coef = 0.0 if cfg.objective == "ppo" else cfg.kl_coef  # ppo has it in the rewards
    objective = Objective(cfg.clip_eps, cfg.norm, cfg.max_new_tokens, kl_coef, cfg.entropy_coef)
    rival = None  # of baselines.py: computes a micro-batch's advantages again at each update
    if cfg.objective != "grpo_rank":
        rival = rivals().rival(cfg, policy, learner, prompts, rollout, advantages, ranks, ref_states)
    compile = compiled if cfg.compile or device.type == "cuda" else None
    for u in range(cfg.updates_per_rollout):
        for p, ref_hidden in zip(micro, ref_states, strict=True):
            part, signal, ref_hidden = rollout[rows_of(p, G)], advantages[p].flatten(), ref_hidden.to(device)
            hidden = completion_states(policy, prompts[p], part)
            if rival:
                part, signal = rival.signal(p, part, hidden, ref_hidden, head)
            loss, stats = rollout_loss(
                hidden, head, part, signal, objective, ref_hidden=ref_hidden,
                num_tokens=num_tokens, num_sequences=num_sequences, compile=compile,
            )  # fmt: skip
            loss.backward()
            sums = {name: value + stats[name] for name, value in sums.items()}
            gap = max(gap, stats["gap"].item()) if u == 0 else gap
        lr = cfg.lr * (1 - step / cfg.num_steps)
        grad_norm = optimizer_step(learner.optimizer, lr, cfg.max_grad_norm)
        if not grad_norm < float("inf"):  # in one process or another
            return {"bad": True}
    totals = dict(zip(sums, reduce_sum(*sums.values(), device=device), strict=True))
    means = {name: totals[name] / totals["tokens"] if totals["tokens"] else None for name in MEANS}
    return {
        "bad": False, "loss": totals["loss"] / cfg.updates_per_rollout, "kl": means["kl"],
        "entropy": means["entropy"], "clip_frac": means["clipped"], "ratio": means["ratio"],
        "grad_norm": grad_norm, "logprob_gap": gap,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- start and finish


def load_everything(cfg: Config, device: torch.device) -> tuple[VideoLM, PromptSet, PromptSet]:
    """(policy, training questions, held-out questions). Every video is decoded and embedded here, once, so a
    broken file ends the run before anything is written. Sets cfg.dtype to what `auto` became."""
    if not cfg.data:
        first_process(draw_world, cfg)
    sets = load_sets(cfg, cfg.seed)
    if cfg.memory_plan:
        from checkpoints import memory

        memory.print_plan(cfg, device, sets)
    say(f"loading {cfg.policy}")
    policy, tokenizer = load_policy(cfg, device)
    set_up(policy.decoder, cfg)
    return policy, *(PromptSet(policy, tokenizer, questions) for questions in sets)


def made_from(cfg: Config, *sets: PromptSet) -> dict[str, str]:
    """Fingerprints of all that a run depends on: a resume on anything else is refused."""
    made = choose.made_from(cfg) | {"--policy": fingerprint(cfg.policy, cfg.clip, cfg.adapter)}
    return made | data_of(*(prompts.questions for prompts in sets))


def main() -> int:
    cfg = parse_args(Config, PRESETS, lambda given: stored_options(given, Config))
    check_folder(cfg)
    device, noise = start_processes(cfg.device), torch.Generator()
    oracle = choose.choose_oracle(cfg, noise, device)
    policy, train_set, eval_set = load_everything(cfg, device)
    batches = Batches(train_set, cfg.batch_prompts, cfg.seed, noise, process_info(), cfg.fill)
    cfg.num_steps = cfg.num_steps or cfg.num_epochs * batches.steps_an_epoch
    choose.check_replayed(cfg, batches)
    critic = rivals().Critic(policy.cfg.dim).to(device) if cfg.objective == "ppo" else None
    learner = Learner(policy.decoder, cfg.lora_r, cfg.lora_alpha, cfg.seed, critic)
    made = made_from(cfg, train_set, eval_set)
    run = RunFolder(cfg, learner, partial(save_adapter_of, policy), device, made)
    sampling = Sampling.of(
        policy, train_set.tokenizer, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        top_p=cfg.top_p, prompts_at_once=cfg.sample_prompts,
    )  # fmt: skip
    if cfg.memory_plan:
        from checkpoints import memory

        memory.rehearse(cfg, policy, learner, batches, sampling, update)
    strips = {name: partial(frame_strip, *shown) for name, shown in batches.watched(cfg.num_steps).items()}
    oracle = choose.PatientOracle(oracle, cfg.objective, cfg.oracle_patience, run.interrupted, device)
    oracle.announce(cfg, batches)
    options = dict(samples=cfg.eval_samples, seed=cfg.seed, judge=oracle.judge)
    run.begin(partial(evaluate, policy, eval_set, sampling, **options), strips)
    say(f"{len(train_set)} questions to learn from, {len(eval_set)} held out")
    learn(cfg, policy, learner, oracle, batches, sampling, run)
    after, values = run.end(partial(load_adapter_of, policy))
    gain = gains(eval_set.questions, run.progress["before_values"], values)
    run.finish(describe(device), after, gain, table(run.progress["before"], after))
    return 0


if __name__ == "__main__":
    run_script(main)
