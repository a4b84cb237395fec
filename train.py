"""Oracle-RLAIF (arXiv:2510.02561): fine-tune a video-language policy with nothing but an oracle's ranks.

    python train.py                                       # the embedded world, from weights/
    python train.py --data FILE.jsonl --videos DIR        # real videos and questions
    torchrun --nproc_per_node=2 train.py                  # more processes, the same update

Read `learn` first: it is the paper's algorithm. What a run folder holds: plumbing/run_folder.py.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

import lora
import rollout as rollouts
from checkpoints.policies import PolicyOptions, load_policy
from data import DataOptions, Prompts, PromptSet, draw_world, load_sets
from eval import evaluate, gains, table
from grpo_rank import completion_logprobs, group_zscores, policy_loss, rank_advantages, ranks_from_scores
from model import VideoLM
from oracle import Ranking, feedback_numbers, reward_numbers, rewards_of, weighed
from oracles.choose import OracleExperiments, OracleOptions, by_reward, choose_oracle, rank_patiently
from plumbing import report
from plumbing.machine import (
    MachineOptions,
    describe,
    first_process,
    optimizer_step,
    pick_dtype,
    process_info,
    reduce_sum,
    say,
    start_processes,
)  # fmt: skip
from plumbing.options import (
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


@dataclass
class Config(PolicyOptions, DataOptions, OracleOptions, RunOptions, MachineOptions, OracleExperiments):
    """The algorithm: Oracle-RLAIF and GRPO_rank"""

    preset: Literal["tiny", "smoke", "7b"] = "tiny"  # smoke: seconds, to see all run; 7b: the paper's
    num_steps: CountOrNone = 100  # optimiser rounds: sample, order, update; 0: as many as num_epochs make
    num_epochs: CountOrNone = 0  # passes over the questions, where num_steps is 0
    batch_prompts: Count = 48  # P: prompts a step, over all processes
    group_size: Annotated[int, Bounds(2)] = 5  # G: completions a prompt, ordered by the oracle
    max_new_tokens: Count = 10  # tokens of an answer at most
    temperature: Positive = 1.0
    top_p: PositiveShare = 1.0
    objective: Literal["grpo_rank", "grpo"] = "grpo_rank"  # grpo: z-scored groups of the summed dual reward
    advantage_form: Literal["ideal", "printed", "inverted"] = "ideal"  # README, "What the paper leaves open"
    gain: Literal["divided", "appendix"] = "divided"
    updates_per_rollout: Count = 2  # optimiser steps on a rollout; with 1 the clip never binds
    clip_eps: Positive = 0.2
    norm: Literal["sequence", "token", "constant"] = "sequence"  # constant: max_new_tokens a completion
    kl_coef: NotNegative = 0.02  # weight of KL(reference || policy), exact over the vocabulary
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus
    lora_r: Count = 16
    lora_alpha: Positive = 32.0
    lr: Positive = 1e-3  # of the first step; it falls in equal steps towards 0 at num_steps
    max_grad_norm: Positive = 1.0  # a longer gradient is scaled down to this
    eval_samples: Count = 4  # drawn answers a question in the sampled accuracy

    def __post_init__(self):
        super().__post_init__()
        if not self.policy:
            raise BadInput(f"--preset {self.preset} brings no weights: name a folder with --policy")
        if not self.num_steps and not self.num_epochs:
            raise BadInput("--num_steps 0 --num_epochs 0: there is nothing to do; give one of them")
        wraps = self.swap_prob or self.position_bias or self.oracle_permutations > 1 or self.anchor
        if self.objective == "grpo" and (self.oracle not in ("rule", "sum") or wraps or self.canary):
            wrong = "--objective grpo takes the summed reward: --oracle sum, no noise, permutations, anchor"
            raise BadInput(f"{wrong}; choose these, or --objective grpo_rank")


PRESETS = {
    "smoke": dict(num_train_clips=24, num_eval_clips=16, num_steps=3, batch_prompts=8, micro_batch_prompts=4),
    # Oracle-RLAIF as far as it is published: 5 answers, r 64, alpha 16, all linear layers, 50 frames, 4
    # epochs, 64 prompts a rollout. The rest is VLM-RLAIF's: NF4, answer length, learning rate, two passes,
    # clip, KL weight.
    "7b": dict(
        policy="", base="nf4", num_frames=50, num_steps=0, num_epochs=4, batch_prompts=64, sample_prompts=2,
        micro_batch_prompts=1, group_size=5, eval_samples=1, max_new_tokens=896, lora_r=64, lora_alpha=16.0,
        lr=3e-5, updates_per_rollout=2, clip_eps=0.2, kl_coef=0.1, max_grad_norm=1.0, dtype="bfloat16",
        checkpointing=True, memory_plan=True, save_every=5,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- the loop


def learn(cfg: Config, learner: "Learner", oracle, noise, train_set: PromptSet, sampling, run: RunFolder):
    """Oracle-RLAIF, the paper's algorithm. noise: the generator of the oracle's noise. Raises EndedEarly."""
    policy, G = learner.policy, cfg.group_size
    for step in run.steps(cfg.num_steps):
        # 0) P questions; as an epoch begins, the policy as it is now becomes the frozen reference
        if step % steps_an_epoch(cfg, train_set) == 0:
            lora.freeze_reference(policy.decoder)
        rows, uniforms = draws_of_step(cfg, train_set, step, noise)
        questions = [train_set.questions[i] for i in rows]

        # 1) the policy answers each question G times
        with run.clock("sampling"):
            rollout, texts = rollouts.answer(policy, train_set, rows, G, sampling, uniforms)

        # 2) the oracle ranks the answers: it sees questions and texts, never log-probabilities
        with run.clock("oracle"):
            ranking = rank_patiently(oracle, questions, texts, cfg.oracle_patience, run.interrupted)
        run.stop_if(bool(ranking.dead), ranking.dead and f"the judge is dead ({ranking.dead})")

        # 3) the ranks become advantages; groups that carry no signal leave the step here
        policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(-1, G).cpu().round(decimals=4))
        advantages = advantages_of(cfg, ranking, policy_ranks)  # (P, G)
        prompts, live = train_set[rows[ranking.live]], rollout.of_prompts(ranking.live)

        # 4) clipped updates on the live groups, with KL to the frozen reference and an entropy bonus
        with run.clock("reference"):
            ref_states = reference_states(policy, prompts, live, cfg.micro_batch_prompts)
        with run.clock("update"):
            numbers = update(cfg, learner, prompts, live, ref_states, advantages[ranking.live], step)

        # 5) report, save
        if numbers["bad"]:
            run.save_bad_batch(batch_tensors(prompts, live, advantages[ranking.live]))
        numbers |= feedback_numbers(questions, texts, ranking, policy_ranks, advantages, rollout)
        if by_reward(cfg):
            rewards = rewards_of(questions, texts, cfg.overlap, cfg.think)
            numbers |= reward_numbers(rewards, policy.decoder.head.device)
        run.report(numbers, examples_of(questions, texts, ranking, policy_ranks, advantages))


def steps_an_epoch(cfg: Config, train_set: PromptSet) -> int:
    return len(train_set) // prompts_a_step(cfg, train_set)


def prompts_a_step(cfg: Config, train_set: PromptSet) -> int:
    """P, over all processes."""
    num_processes = process_info()[1]
    return min(cfg.batch_prompts, len(train_set)) // num_processes * num_processes


def draws_of_step(cfg: Config, train_set: PromptSet, step: int, noise) -> tuple[Tensor, Tensor]:
    """This process's numbers of questions, int64 (P,), and uniforms (P, G, max_new_tokens); seeds `noise`.

    Every epoch has an order of its own. All processes draw the same and take their part, so the number of
    processes changes nothing. All is seeded by the step: a resume has no state of a generator to restore.
    """
    (process, num_processes), P = process_info(), prompts_a_step(cfg, train_set)
    epoch, place = divmod(step, len(train_set) // P)
    shuffle = torch.Generator().manual_seed(cfg.seed * 2**20 + epoch)
    rows = torch.randperm(len(train_set), generator=shuffle)[place * P : (place + 1) * P]
    draws = torch.Generator().manual_seed(cfg.seed * 2**20 + 2**19 + step)
    uniforms = torch.rand(P, cfg.group_size, cfg.max_new_tokens, generator=draws)
    noise.manual_seed((cfg.seed * 2**20 + step) * num_processes + process)
    mine = slice(process * P // num_processes, (process + 1) * P // num_processes)
    return rows[mine], uniforms[mine]


def advantages_of(cfg: Config, ranking: Ranking, policy_ranks: Tensor) -> Tensor:
    """(P, G) float32 of the chosen objective."""
    if cfg.objective == "grpo":
        return group_zscores(ranking.scores)
    form, gain = cfg.advantage_form, cfg.gain
    return weighed(rank_advantages(ranking.ranks, policy_ranks, form, gain, ranking.ok), ranking)


# ------------------------------------------------------------------------------------------------ the update


def micro_batches(P: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, P, size)] if size else [slice(0, P)][: min(P, 1)]


def rows_of(prompts: slice, G: int) -> slice:
    """The completions of these prompts: prompt p owns rows p * G .. p * G + G - 1."""
    return slice(prompts.start * G, prompts.stop * G)


def reference_states(policy: VideoLM, prompts: Prompts, rollout, size: int) -> list[Tensor]:
    """The frozen reference's states of the completions, (b * G, T, D) for each micro-batch of `size` prompts.
    They wait in host memory: in the 7b preset they are 4.7 GB."""
    G = len(rollout.ended) // max(len(prompts.prompt_ids), 1)
    with lora.using(policy.decoder, "reference"), lora.folded(policy.decoder):
        micro = micro_batches(len(prompts.prompt_ids), size)
        return [rollouts.completion_states(policy, prompts[p], rollout[rows_of(p, G)]).cpu() for p in micro]


STATS = ("tokens", "sequences", "loss", "ratio", "surrogate", "clipped", "kl", "entropy")


def update(cfg: Config, learner, prompts: Prompts, rollout, ref_states, advantages, step: int) -> dict:
    """GRPO_rank's clipped updates on one rollout, of which only live groups are left; a process without any
    takes part with a gradient of zero. advantages (P, G). Returns the step's numbers, kl and entropy None if
    no process had a live group; "bad": a loss or gradient was not finite, and nothing was learned."""
    policy, G, device = learner.policy, cfg.group_size, prompts.prompt_ids.device
    micro, advantages = micro_batches(len(prompts.prompt_ids), cfg.micro_batch_prompts), advantages.to(device)
    mask = rollout.completion_mask
    num_tokens, num_sequences = reduce_sum(mask.sum(), mask.any(dim=1).sum(), device=device)
    sums, gap, head = dict.fromkeys(STATS, 0.0), 0.0, policy.decoder.head.float()  # logits in float32
    for u in range(cfg.updates_per_rollout):
        for p, ref_hidden in zip(micro, ref_states, strict=True):
            part = rollout[rows_of(p, G)]
            logprobs, entropy, kl = completion_logprobs(
                rollouts.completion_states(policy, prompts[p], part), head, part.completion_ids,
                part.completion_mask, temperature=part.temperature, banned=part.banned, support=part.support,
                ref_hidden=ref_hidden.to(device), compile=cfg.compile,
            )  # fmt: skip
            loss, stats = policy_loss(
                logprobs, part.logprobs, advantages[p].flatten(), part.completion_mask, clip_eps=cfg.clip_eps,
                norm=cfg.norm, constant=cfg.max_new_tokens, kl=kl, kl_coef=cfg.kl_coef, entropy=entropy,
                entropy_coef=cfg.entropy_coef, num_tokens=num_tokens, num_sequences=num_sequences,
            )  # fmt: skip
            loss.backward()
            sums = {name: value + stats[name] for name, value in sums.items()}
            if u == 0:
                gap = max(gap, (logprobs - part.logprobs).abs().max().item())
        lr = cfg.lr * (1 - step / cfg.num_steps)
        grad_norm = optimizer_step(learner.optimizer, lr, cfg.max_grad_norm)
        if not grad_norm < float("inf"):  # in one process or another
            return {"bad": True}
    totals = dict(zip(sums, reduce_sum(*sums.values(), device=device), strict=True))
    means = {name: totals[name] / totals["tokens"] if totals["tokens"] else None for name in STATS[3:]}
    return {
        "bad": False, "loss": totals["loss"] / cfg.updates_per_rollout, "kl": means["kl"],
        "entropy": means["entropy"], "clip_frac": means["clipped"], "ratio": means["ratio"],
        "grad_norm": grad_norm, "logprob_gap": gap,
    }  # fmt: skip


def batch_tensors(prompts: Prompts, rollout, advantages: Tensor) -> dict[str, Tensor]:
    return (
        vars(prompts) | {name: getattr(rollout, name) for name in rollouts.GRIDS} | {"advantages": advantages}
    )


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


# ------------------------------------------------------------------------------------------- start and finish


class Learner:
    """What learns: the policy's adapters and their optimizer. What a resume needs of them."""

    def __init__(self, policy: VideoLM, cfg: Config):
        generator = torch.Generator().manual_seed(cfg.seed)
        trainable = lora.add_adapters(policy.decoder, cfg.lora_r, cfg.lora_alpha, generator=generator)
        self.policy, self.optimizer = policy, torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=0.0)
        lora.freeze_reference(policy.decoder)

    def moments(self) -> dict[int, dict]:
        return self.optimizer.state_dict()["state"]

    def tensors(self) -> dict[str, Tensor]:
        moments = {f"optimizer.{i}.{k}": x for i, part in self.moments().items() for k, x in part.items()}
        return lora.state(self.policy.decoder) | moments

    def restore(self, tensors: dict[str, Tensor]):
        lora.restore(self.policy.decoder, tensors)
        whole, state = self.optimizer.state_dict(), {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict(whole | {"state": state})

    def save_adapter(self, folder: str):
        from checkpoints.peft_files import save_adapter

        llava = self.policy.cfg.bridge.startswith("llava")  # PEFT's names for what it would wrap
        save_adapter(self.policy.decoder, folder, "model.language_model." if llava else "model.")


def load_everything(cfg: Config, device: torch.device) -> tuple[VideoLM, PromptSet, PromptSet]:
    """(policy, training questions, held-out questions). Every video is decoded and embedded here, once, so a
    broken file ends the run before anything is written. Sets cfg.dtype to what `auto` became."""
    if not cfg.data:
        first_process(draw_world, cfg)
    sets = load_sets(cfg, cfg.seed)
    if cfg.memory_plan:
        from checkpoints import memory

        memory.print_plan(cfg, device, sets)
    policy, tokenizer = load_policy(cfg, device)
    cfg.dtype = pick_dtype(cfg.dtype, device, policy.cfg.dim)
    policy.decoder.compute_dtype = getattr(torch, cfg.dtype)
    policy.decoder.checkpointing = cfg.checkpointing
    return policy, *(PromptSet(policy, tokenizer, questions) for questions in sets)


def made_from(cfg: Config, *sets: PromptSet) -> dict[str, str]:
    """Fingerprints of all that a run depends on: a resume on anything else is refused."""
    questions = hashlib.sha256(repr([prompts.questions for prompts in sets]).encode()).hexdigest()
    return {"the data": questions, "--policy": fingerprint(cfg.policy, cfg.clip, cfg.adapter)}


def main() -> int:
    cfg = parse_args(Config, PRESETS, lambda given: stored_options(given, Config))
    check_folder(cfg)
    device, noise = start_processes(cfg.device), torch.Generator()
    oracle = choose_oracle(cfg, noise, device)
    policy, train_set, eval_set = load_everything(cfg, device)
    cfg.num_steps = cfg.num_steps or cfg.num_epochs * steps_an_epoch(cfg, train_set)
    learner = Learner(policy, cfg)
    run = RunFolder(cfg, learner, device, made_from(cfg, train_set, eval_set))
    sampling = rollouts.Sampling.of(
        policy, train_set.tokenizer, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        top_p=cfg.top_p, prompts_at_once=cfg.sample_prompts,
    )  # fmt: skip
    if cfg.memory_plan:
        from checkpoints import memory

        memory.rehearse(cfg, learner, train_set, sampling, reference_states, update)
    if "before" not in run.progress:
        before, values = evaluate(policy, eval_set, sampling, samples=cfg.eval_samples, seed=cfg.seed)
        run.progress |= {"before": before, "before_values": values}
        run.save()
    both = {q.video for q in train_set.questions} & {q.video for q in eval_set.questions}
    seen = f"; {len(both)} videos are in both: the tables do not show what is new" if both else ""
    say(f"{len(train_set)} questions to learn from, {len(eval_set)} held out{seen}")
    learn(cfg, learner, oracle, noise, train_set, sampling, run)
    after, values = evaluate(policy, eval_set, sampling, samples=cfg.eval_samples, seed=cfg.seed)
    gain = gains(eval_set.questions, run.progress["before_values"], values)
    if run.writes:
        report.finish(run, describe(device), after, gain, table(run.progress["before"], after))
    return 0


if __name__ == "__main__":
    run_script(main)
