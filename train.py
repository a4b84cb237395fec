"""Oracle-RLAIF (arXiv:2510.02561): fine-tune a video-language policy with nothing but an oracle's ranks.

    python train.py                                       # the embedded world, from weights/
    python train.py --data FILE.jsonl --videos DIR        # real videos and questions
    torchrun --nproc_per_node=2 train.py                  # more processes, the same update

A run folder holds config.json, metrics.jsonl (a row a step), rollouts.jsonl, results.json, adapter/ and what
`--resume` needs to continue bit for bit (on CPU).
"""

import itertools
import os
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

import lora
from answers import is_correct, kendall_tau, ndcg_agreement
from cli import BadInput, parse_args, run_script, write_json
from data import EOS_ID, PromptSet
from eval import draw_world, evaluate, gains, load_policy, load_sets, table
from grpo_rank import completion_logprobs, group_zscores, policy_loss, rank_advantages, ranks_from_scores
from oracle import NoisyOracle, RewardOracle, RuleOracle
from rollout import completion_states, generate
from runs import (
    checkpoint_path,
    open_run,
    process_info,
    report,
    save_bad_batch,
    save_checkpoint,
    stored_options,
)


@dataclass
class Config:
    preset: str = "tiny"  # tiny | smoke (seconds, to see that everything runs)
    out: str = "runs/default"  # run folder; it must not exist, unless --resume
    resume: bool = False  # continue the run in --out from its last checkpoint
    seed: int = 0
    policy: str = "weights"  # folder of the supervised start (pretrain.py)
    data: str = ""  # JSONL of questions; empty: the embedded world
    videos: str = ""  # folder that the JSONL's video paths are relative to
    world_dir: str = "world/rl"  # folder of the embedded world's drawn clips
    num_train_clips: int = 500  # embedded world: clips to learn from
    num_eval_clips: int = 250  # embedded world: held-out clips
    eval_share: float = 0.25  # --data: share of the videos held out
    eval_samples: int = 4  # drawn answers a question in the sampled accuracy
    num_steps: int = 150  # optimiser rounds: sample, rank, update
    batch_prompts: int = 48  # P: prompts a step, over all processes
    micro_batch_prompts: int = 48  # prompts of one forward and backward; smaller saves memory alone
    group_size: int = 5  # G: completions a prompt, ranked against each other
    max_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    objective: str = "grpo_rank"  # grpo_rank | grpo: z-scored groups of the summed dual reward
    oracle: str = "rule"  # rule | sum | lexicographic: ranks by the grade, or by the dual reward
    discrete_coef: float = 1.0  # weights of the dual reward's parts: the right answer,
    continuous_coef: float = 1.0  # the overlap of the spans,
    format_coef: float = 0.1  # the form; more is never paid for form alone
    overlap: str = "iou"  # iou | iop: the dual reward's continuous part
    think: bool = False  # whether the form asks for a <think> part
    swap_prob: float = 0.0  # oracle noise: chance that two neighbours in its order swap
    position_bias: float = 0.0  # oracle noise: chance that the first candidate is put on top
    advantage_form: str = "ideal"  # ideal | printed | inverted: README, "What the paper leaves open"
    gain: str = "divided"  # divided | appendix
    updates_per_rollout: int = 2  # optimiser steps on a rollout; with 1 the clip never binds
    clip_eps: float = 0.2
    norm: str = "sequence"  # sequence | token | constant (by max_new_tokens)
    kl_coef: float = 0.02  # weight of KL(reference || policy), exact over the vocabulary
    entropy_coef: float = 0.0  # weight of the entropy bonus
    lora_r: int = 16
    lora_alpha: float = 32.0
    lr: float = 1e-3  # of the first step; it falls in equal steps towards 0 at num_steps
    max_grad_norm: float = 1.0
    save_every: int = 20  # steps between checkpoints
    max_bad_steps: int = 3  # non-finite losses in a row before the run stops
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16: of the matrix products (autocast)
    compile: bool = False  # torch.compile for the log-probabilities of the update

    def __post_init__(self):
        if self.group_size < 2:
            raise BadInput(f"--group_size {self.group_size}: a ranking needs at least 2 candidates")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadInput(f"--{name} {getattr(self, name)}: choose one of {', '.join(choices)}")
        if self.objective == "grpo" and (self.swap_prob or self.position_bias):
            raise BadInput("--swap_prob and --position_bias disturb ranks; --objective grpo has none")
        if self.objective == "grpo" and self.oracle == "lexicographic":
            raise BadInput("--oracle lexicographic is an order, no number; give --objective grpo_rank")
        if bool(self.data) != bool(self.videos):
            raise BadInput(
                "--data and --videos go together: a JSONL file and the folder its paths are relative to"
            )


CHOICES = {
    "preset": ("tiny", "smoke"),
    "objective": ("grpo_rank", "grpo"),
    "oracle": ("rule", "sum", "lexicographic"),
    "overlap": ("iou", "iop"),
    "advantage_form": ("ideal", "printed", "inverted"),
    "gain": ("divided", "appendix"),
    "norm": ("sequence", "token", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
}
PRESETS = {
    "tiny": {},
    "smoke": dict(num_train_clips=24, num_eval_clips=16, num_steps=3, batch_prompts=8, micro_batch_prompts=4),
}


# ----------------------------------------------------------------------------------------- machine, processes


def pick_dtype(device: torch.device, wanted: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it at least twice as fast as float32,
    by measurement; says why."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {torch.float32: [], torch.bfloat16: []}
    for dtype in 3 * list(seconds):
        a = torch.ones(512, 512, dtype=dtype)
        began = time.perf_counter()
        a @ a
        seconds[dtype].append(time.perf_counter() - began)
    share = min(seconds[torch.bfloat16]) / min(seconds[torch.float32])
    dtype = torch.bfloat16 if share <= 0.5 else torch.float32
    if process_info()[0] == 0:
        print(f"{dtype}: a bfloat16 product takes {share:.2f} of float32's time here (--dtype overrides)")
    return dtype


def reduce_sum(*values: torch.Tensor | float, device) -> list[float]:
    """Sums over all processes; with one process the values themselves."""
    packed = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(packed)
    return packed.tolist()


# -------------------------------------------------------------------------------------------- data and policy


def load_everything(cfg: Config, device: torch.device):
    """(policy with adapters, trainable parameters, training prompts, held-out prompts). Every video is
    decoded and embedded here, once, so a broken file ends the run before anything is written."""
    policy, tokenizer = load_policy(cfg.policy, device)
    policy.decoder.compute_dtype = pick_dtype(device, cfg.dtype)
    if process_info()[0] == 0 and not cfg.data:
        draw_world(cfg)
    if dist.is_initialized():
        dist.barrier()
    train_questions, eval_questions = load_sets(cfg)
    train_set = PromptSet(policy, tokenizer, train_questions)
    eval_set = PromptSet(policy, tokenizer, eval_questions)
    generator = torch.Generator().manual_seed(cfg.seed)
    trainable = lora.add_adapters(policy.decoder, cfg.lora_r, cfg.lora_alpha, generator=generator)
    return policy, trainable, train_set, eval_set


# --------------------------------------------------------------------------------------------------- one step


def update(cfg, policy, trainable, optimizer, prompts, rollout, advantages, live, banned) -> dict:
    """Clipped GRPO_rank updates on one rollout. Returns the step's numbers; "bad" if a
    loss was not finite."""
    P, G, device = len(prompts.prompt_ids), cfg.group_size, prompts.prompt_ids.device
    micro = [slice(i, i + cfg.micro_batch_prompts) for i in range(0, P, cfg.micro_batch_prompts)]
    counted = rollout.completion_mask & live[:, None]
    num_tokens, num_sequences = reduce_sum(counted.sum(), counted.any(dim=1).sum(), device=device)
    with torch.no_grad(), lora.using(policy.decoder, "reference"):
        ref_states = [completion_states(policy, prompts[p], rollout[rows(p, G)]) for p in micro]
    numbers, gap = {}, 0.0
    for u in range(cfg.updates_per_rollout):
        for p, ref_hidden in zip(micro, ref_states, strict=True):
            part = rollout[rows(p, G)]
            logprobs, entropy, kl = completion_logprobs(
                completion_states(policy, prompts[p], part), policy.decoder.head, part.completion_ids,
                part.completion_mask, temperature=cfg.temperature, banned=banned, support=part.support,
                ref_hidden=ref_hidden, compile=cfg.compile,
            )  # fmt: skip
            loss, stats = policy_loss(
                logprobs, part.logprobs, advantages[rows(p, G)], part.completion_mask, clip_eps=cfg.clip_eps,
                norm=cfg.norm, constant=cfg.max_new_tokens, live=live[rows(p, G)], kl=kl, kl_coef=cfg.kl_coef,
                entropy=entropy, entropy_coef=cfg.entropy_coef,
                num_tokens=num_tokens, num_sequences=num_sequences,
            )  # fmt: skip
            loss.backward()
            for key, value in stats.items():
                numbers[key] = numbers.get(key, 0.0) + value
            if u == 0:
                gap = max(gap, (logprobs - part.logprobs).abs().max().item())
        grad_norm = all_reduce_gradients(trainable, cfg.max_grad_norm)
        if not torch.isfinite(grad_norm):  # a non-finite loss anywhere, in any process, ends here
            optimizer.zero_grad(set_to_none=True)
            return {"bad": True}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    totals = dict(zip(numbers, reduce_sum(*numbers.values(), device=device), strict=True))
    tokens = max(totals["tokens"], 1)
    return {
        "bad": False,
        "loss": totals["loss"] / cfg.updates_per_rollout,
        "kl": totals["kl"] / tokens,
        "entropy": totals["entropy"] / tokens,
        "clip_frac": totals["clipped"] / tokens,
        "ratio": totals["ratio"] / tokens,
        "grad_norm": grad_norm.item(),
        "logprob_gap": gap,
    }


def rows(prompts: slice, G: int) -> slice:
    """The completions of these prompts: prompt p owns rows p * G .. p * G + G - 1."""
    return slice(prompts.start * G, prompts.stop * G)


def all_reduce_gradients(trainable, max_norm: float) -> torch.Tensor:
    """Sums the gradients over processes (the loss is already divided by the whole step's counts), clips,
    returns the norm before clipping."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in trainable])
        dist.all_reduce(flat)
        for p, grad in zip(trainable, flat.split([p.numel() for p in trainable]), strict=True):
            p.grad.copy_(grad.view_as(p))
    return torch.nn.utils.clip_grad_norm_(trainable, max_norm)


def feedback_numbers(questions, texts, ranking, policy_ranks, advantages, live, rollout) -> dict:
    """What the oracle said of this step and how the policy's own order agrees with it (README, glossary)."""
    P, G = ranking.ranks.shape
    right = torch.tensor([is_correct(text, questions[i // G]) for i, text in enumerate(texts)]).view(P, G)
    orders = list(zip(policy_ranks[ranking.ok].tolist(), ranking.ranks[ranking.ok].tolist(), strict=True))
    ndcg = [x for x in (ndcg_agreement(p, o) for p, o in orders) if x is not None]
    tau = [x for x in (kendall_tau(p, o) for p, o in orders) if x is not None]
    sums = {
        "prompts": P, "completions": P * G, "right": right.sum(), "tokens": rollout.completion_mask.sum(),
        "best_right": (right & (ranking.ranks == 0)).any(dim=1).sum(), "ended": rollout.ended.sum(),
        "failed": (~ranking.ok).sum(), "dead": (ranking.ok & ~live).sum(), "squares": (advantages**2).sum(),
        "ndcg": sum(ndcg), "num_ndcg": len(ndcg), "tau": sum(tau), "num_tau": len(tau),
    }  # fmt: skip
    n = dict(zip(sums, reduce_sum(*sums.values(), device=rollout.completion_ids.device), strict=True))
    return {
        "accuracy": n["right"] / n["completions"],
        "oracle_best_accuracy": n["best_right"] / n["prompts"],
        "ndcg": n["ndcg"] / max(n["num_ndcg"], 1),
        "kendall_tau": n["tau"] / max(n["num_tau"], 1),
        "dead_groups": int(n["dead"]),
        "failed_groups": int(n["failed"]),
        "advantage_rms": (n["squares"] / n["completions"]) ** 0.5,
        "mean_tokens": n["tokens"] / n["completions"],
        "cut_share": 1 - n["ended"] / n["completions"],
        "tokens": int(n["tokens"]),
    }


# --------------------------------------------------------------------------------------------------- the loop


def learn(cfg: Config, policy, trainable, train_set, optimizer, limits: dict, progress: dict, began) -> str:
    """Oracle-RLAIF, the paper's algorithm. `began`: the run's start, time.time() less earlier sessions.

    Returns "done", "interrupted" or "bad": too many non-finite losses in a row.
    """
    device, G, (process, num_processes) = train_set.video_embeds.device, cfg.group_size, process_info()
    P = min(cfg.batch_prompts, len(train_set)) // num_processes * num_processes  # a step, over all processes
    mine = slice(process * P // num_processes, (process + 1) * P // num_processes)
    steps_per_epoch, interrupted = len(train_set) // P, catch_interrupt()
    generator, noise = torch.Generator(), torch.Generator()  # seeded anew in every step: no state to save
    oracle = make_oracle(cfg, noise)
    bar = tqdm(total=cfg.num_steps, initial=progress["step"], disable=process != 0, file=sys.stdout)
    for step in range(progress["step"], cfg.num_steps):
        # 0) the next prompts; at an epoch's start they are shuffled, and the reference is frozen
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            lora.freeze_reference(policy.decoder)
        order = torch.randperm(len(train_set), generator=generator.manual_seed(cfg.seed * 2**20 + epoch))
        chosen = order[place * P : (place + 1) * P][mine]
        questions, prompts = [train_set.questions[i] for i in chosen], train_set[chosen]
        clock = [time.perf_counter()]

        # 1) sample G answers a prompt. Every process draws all uniforms and uses those of its own prompts
        generator.manual_seed(cfg.seed * 2**20 + 2**19 + step)
        uniforms = torch.rand(P, G, cfg.max_new_tokens, generator=generator)[mine].to(device)
        heat = {"temperature": cfg.temperature, "top_p": cfg.top_p}
        rollout = generate(policy, prompts, G, uniforms=uniforms, **heat, **limits)
        texts = train_set.texts(rollout)
        clock.append(time.perf_counter())

        # 2) the oracle ranks them: it sees questions and texts, never log-probabilities
        noise.manual_seed((cfg.seed * 2**20 + step) * num_processes + process)
        ranking = oracle.rank(questions, texts)
        clock.append(time.perf_counter())

        # 3) ranks become advantages; groups that are all tied, or whose ranking failed, carry no signal
        policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(-1, G).cpu().round(decimals=4))
        if cfg.objective == "grpo":
            advantages = group_zscores(oracle.totals(questions, texts))
        else:
            advantages = rank_advantages(
                ranking.ranks, policy_ranks, cfg.advantage_form, cfg.gain, ranking.ok
            )
        live = ranking.ok & (ranking.ranks != ranking.ranks[:, :1]).any(dim=1)  # (P,)

        # 4) clipped update, with KL to the frozen reference and an entropy bonus
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.num_steps)
        signal = advantages.flatten().to(device), live.repeat_interleave(G).to(device)  # (B,) each
        numbers = update(cfg, policy, trainable, optimizer, prompts, rollout, *signal, limits["banned"])
        clock.append(time.perf_counter())

        # 5) report, save
        numbers |= feedback_numbers(questions, texts, ranking, policy_ranks, advantages, live, rollout)
        if cfg.oracle != "rule" or cfg.objective == "grpo":
            numbers |= reward_numbers(reward_oracle(cfg).rewards(questions, texts), device)
        seconds = (b - a for a, b in itertools.pairwise(clock))
        numbers |= dict(zip(("sampling_s", "oracle_s", "update_s"), seconds, strict=True))
        numbers["tokens_per_s"] = numbers["tokens"] / (clock[-1] - clock[0])
        progress |= {"step": step + 1, "bad_steps": progress["bad_steps"] + numbers["bad"]}
        progress["bad_in_a_row"] = numbers["bad"] * (progress["bad_in_a_row"] + 1)
        report(cfg, bar, step, numbers, questions, texts, ranking, policy_ranks, advantages)
        if numbers["bad"]:
            save_bad_batch(cfg, step, prompts, rollout, signal[0])
        ended = "interrupted" if interrupted() else ""
        if progress["bad_in_a_row"] >= cfg.max_bad_steps:
            ended = "bad"
        if ended or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.num_steps:
            progress["wall_s"] = time.time() - began
            save_checkpoint(cfg, policy, trainable, optimizer, progress)
        if ended:
            return ended
    return "done"


def reward_numbers(rewards, device) -> dict:
    """Means of the dual reward's parts, each over the answers to tasks that have it; None without any."""
    names = ("discrete", "continuous", "format")
    parts = [[getattr(r, name) for r in rewards if getattr(r, name) is not None] for name in names]
    sums = reduce_sum(*map(sum, parts), *map(len, parts), device=device)
    return {f"reward_{name}": sums[i] / sums[i + 3] if sums[i + 3] else None for i, name in enumerate(names)}


def reward_oracle(cfg: Config) -> RewardOracle:
    by = "lexicographic" if cfg.oracle == "lexicographic" else "sum"
    weights = (cfg.discrete_coef, cfg.continuous_coef, cfg.format_coef)
    return RewardOracle(by, weights, cfg.overlap, cfg.think)


def make_oracle(cfg: Config, generator: torch.Generator):
    by_reward = cfg.oracle != "rule" or cfg.objective == "grpo"
    oracle = reward_oracle(cfg) if by_reward else RuleOracle()
    if cfg.swap_prob or cfg.position_bias:
        return NoisyOracle(oracle, generator, cfg.swap_prob, cfg.position_bias)
    return oracle


def catch_interrupt():
    """After this Ctrl-C no longer kills: the returned function says whether it came. A
    second one kills as ever."""
    came = []

    def handler(signum, frame):
        came.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return lambda: bool(came)


# ------------------------------------------------------------------------------------------- start and finish


def start_processes(cfg: Config) -> torch.device:
    """The device of this process; under torchrun also joins the group (NCCL on GPUs, gloo on CPU)."""
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(index)
    return torch.device("cuda", index) if cuda else torch.device("cpu")


def main() -> int:
    cfg = parse_args(Config, PRESETS, lambda given: stored_options(given, Config.out))
    if not cfg.resume and os.path.exists(cfg.out):
        raise BadInput(
            f"--out {cfg.out}: exists already; add --resume to continue it, or name another folder"
        )
    if cfg.resume and not os.path.exists(checkpoint_path(cfg)):
        raise BadInput(f"{checkpoint_path(cfg)}: no such file; the run never saved anything, start it anew")
    began, device = time.time(), start_processes(cfg)
    policy, trainable, train_set, eval_set = load_everything(cfg, device)
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=0.0)
    limits = {
        "max_new_tokens": cfg.max_new_tokens,
        "end_ids": torch.tensor([EOS_ID], device=device),
        "banned": train_set.tokenizer.banned_ids(policy.cfg.vocab_size).to(device),
    }
    progress = open_run(cfg, policy, trainable, optimizer)
    if "before" not in progress:
        start, values = evaluate(policy, eval_set, samples=cfg.eval_samples, seed=cfg.seed, **limits)
        progress |= {"before": start, "before_values": values}
        lora.freeze_reference(policy.decoder)
        save_checkpoint(cfg, policy, trainable, optimizer, progress)
    if process_info()[0] == 0:
        print(f"{len(train_set)} questions to learn from, {len(eval_set)} held out", flush=True)
    began -= progress["wall_s"]  # a resumed run goes on counting
    ended = learn(cfg, policy, trainable, train_set, optimizer, limits, progress, began)
    if ended == "interrupted":
        print(f"\nsaved at step {progress['step']}; go on with: python train.py --out {cfg.out} --resume")
        return 1
    if ended == "bad":
        print(
            f"\n{cfg.max_bad_steps} non-finite losses in a row: stopped at step {progress['step']}",
            file=sys.stderr,
        )
        print(f"see {cfg.out}/bad_batches; a lower --lr or --dtype float32 may help", file=sys.stderr)
        return 1
    after, values = evaluate(policy, eval_set, samples=cfg.eval_samples, seed=cfg.seed, **limits)
    if process_info()[0] == 0:
        gain = gains(eval_set.questions, progress["before_values"], values)
        results = {
            "seed": cfg.seed,
            "steps": cfg.num_steps,
            "wall_s": round(time.time() - began, 1),
        }
        results |= {"device": describe(device), "bad_steps": progress["bad_steps"]}
        results |= {"before": progress["before"], "after": after, "gain": gain}
        write_json(os.path.join(cfg.out, "results.json"), results)
        print("\n" + table(progress["before"], after))
        for name, g in gain.items():
            low, high = (100 * x for x in g["ci95"])
            print(f"{name}: {100 * g['accuracy']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
        print(f"{results['wall_s']} s on {results['device']}; results and adapter in {cfg.out}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {process_info()[1]} process(es)"


if __name__ == "__main__":
    run_script(main)
