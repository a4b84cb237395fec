"""Oracle-RLAIF (arXiv:2510.02561): fine-tune a video-language policy with nothing but an oracle's ranks.

    python train.py                                       # the embedded world, from weights/
    python train.py --data FILE.jsonl --videos DIR        # real videos and questions
    torchrun --nproc_per_node=2 train.py                  # more processes, the same update

A run folder holds config.json, metrics.jsonl (a row a step), rollouts.jsonl, results.json, adapter/ and what
`--resume` needs to continue bit for bit (on CPU).
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import lora
from answers import is_correct, kendall_tau, ndcg_agreement
from data import EOS_ID, DataError, PromptSet, parse_args, run_script, write_json
from eval import draw_world, evaluate, gains, load_policy, load_sets, table
from grpo_rank import completion_logprobs, policy_loss, rank_advantages, ranks_from_scores
from oracle import NoisyOracle, RuleOracle
from rollout import completion_states, generate


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
    num_steps: int = 120  # optimiser rounds: sample, rank, update
    batch_prompts: int = 48  # P: prompts a step, over all processes
    micro_batch_prompts: int = 48  # prompts of one forward and backward; smaller saves memory, changes nothing
    group_size: int = 5  # G: completions a prompt, ranked against each other
    max_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    oracle: str = "rule"  # rule
    swap_prob: float = 0.0  # oracle noise: chance that two neighbours in its order swap
    position_bias: float = 0.0  # oracle noise: chance that the first candidate is put on top
    advantage_form: str = "ideal"  # ideal | printed | inverted: README, "What the paper leaves open"
    gain: str = "divided"  # divided | appendix
    updates_per_rollout: int = 2  # optimiser steps on the same rollout; with 1 the ratio is 1 and the clip never binds
    clip_eps: float = 0.2
    norm: str = "sequence"  # sequence | token | constant (by max_new_tokens)
    kl_coef: float = 0.02  # weight of KL(reference || policy), exact over the vocabulary
    entropy_coef: float = 0.0  # weight of the entropy bonus
    lora_r: int = 16
    lora_alpha: float = 32.0
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    save_every: int = 20  # steps between checkpoints
    max_bad_steps: int = 3  # non-finite losses in a row before the run stops
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16: of the matrix products (autocast)
    compile: bool = False  # torch.compile for the log-probabilities and the decoding step

    def __post_init__(self):
        if self.group_size < 2:
            raise DataError(f"--group_size {self.group_size}: a ranking needs at least 2 candidates")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"--{name} {getattr(self, name)}: choose one of {', '.join(choices)}")
        if bool(self.data) != bool(self.videos):
            raise DataError("--data and --videos go together: a JSONL file and the folder its paths are relative to")


CHOICES = {
    "preset": ("tiny", "smoke"),
    "oracle": ("rule",),
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


# ------------------------------------------------------------------------------------------------ machine, processes


def pick_dtype(device: torch.device, wanted: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it at least twice as fast as float32, by measurement; says why."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a  # warm-up
        began = time.perf_counter()
        a @ a
        seconds[dtype] = time.perf_counter() - began
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    dtype = torch.bfloat16 if speedup >= 2 else torch.float32
    print(f"dtype {dtype}: a bfloat16 matrix product took {1 / speedup:.2f} of float32's time here (--dtype overrides)")
    return dtype


def reduce_sum(*values: torch.Tensor | float, device) -> list[float]:
    """Sums over all processes; with one process the values themselves."""
    packed = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(packed)
    return packed.tolist()


def process_info() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# --------------------------------------------------------------------------------------------------- data and policy


def load_everything(cfg: Config, device: torch.device):
    """(policy with adapters, trainable parameters, training prompts, held-out prompts). Every video is decoded and
    embedded here, once, so a broken file ends the run before anything is written."""
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


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(cfg):
    return os.path.join(cfg.out, "checkpoint.safetensors")


def save_checkpoint(cfg, policy, trainable, optimizer, progress: dict):
    """Adapters, frozen reference, optimiser moments and progress in one file, renamed into place."""
    if process_info()[0] != 0:
        return
    tensors = {}
    for name, layer in lora.layers(policy.decoder).items():
        parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
        parts |= {"reference_A": layer.reference_A, "reference_B": layer.reference_B}
        tensors |= {f"{name}.{part}": x.detach().cpu() for part, x in parts.items()}
    for i, p in enumerate(trainable):
        tensors |= {f"optimizer.{i}.{k}": v.detach().cpu() for k, v in optimizer.state[p].items()}
    path = checkpoint_path(cfg)
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{path}.tmp", metadata={"progress": json.dumps(progress)})
    os.replace(f"{path}.tmp", path)
    lora.save_adapter(policy.decoder, os.path.join(cfg.out, "adapter"))


def load_checkpoint(cfg, policy, trainable, optimizer) -> dict:
    """Restores what save_checkpoint wrote; returns the progress."""
    with safe_open(checkpoint_path(cfg), "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    for name, layer in lora.layers(policy.decoder).items():
        for part in ("lora_A", "lora_B", "reference_A", "reference_B"):
            stored = tensors.get(f"{name}.{part}")
            if stored is None or stored.shape != getattr(layer, part[-1:] and f"lora_{part[-1]}").shape:
                raise DataError(f"{checkpoint_path(cfg)}: {name}.{part} is missing or of another shape: resume with the run's own options")
            if part.startswith("lora"):
                getattr(layer, part).data.copy_(stored)
            else:
                setattr(layer, part, stored.to(layer.lora_A.device))
    for i, p in enumerate(trainable):
        state = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"optimizer.{i}.")}
        if state:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return progress


# ---------------------------------------------------------------------------------------------------------- one step


def update(cfg, policy, trainable, optimizer, prompts, rollout, advantages, live, banned) -> dict:
    """Clipped GRPO_rank updates on one rollout. Returns the step's numbers; "bad" if a loss was not finite."""
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
                entropy=entropy, entropy_coef=cfg.entropy_coef, num_tokens=num_tokens, num_sequences=num_sequences,
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
    """Sums the gradients over processes (the loss is already divided by the whole step's counts), clips, returns
    the norm before clipping."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in trainable])
        dist.all_reduce(flat)
        for p, grad in zip(trainable, flat.split([p.numel() for p in trainable]), strict=True):
            p.grad.copy_(grad.view_as(p))
    return torch.nn.utils.clip_grad_norm_(trainable, max_norm)


def feedback_numbers(questions, texts, ranking, policy_ranks, advantages, live, rollout, device) -> dict:
    """What the oracle said of this step and how the policy's own order agrees with it (README, glossary)."""
    P, G = ranking.ranks.shape
    right = torch.tensor([is_correct(text, questions[i // G]) for i, text in enumerate(texts)]).view(P, G)
    orders = [(p, o) for p, o, ok in zip(policy_ranks.tolist(), ranking.ranks.tolist(), ranking.ok.tolist(), strict=True) if ok]
    ndcg = [x for x in (ndcg_agreement(p, o) for p, o in orders) if x is not None]
    tau = [x for x in (kendall_tau(p, o) for p, o in orders) if x is not None]
    sums = {
        "prompts": P, "completions": P * G, "right": right.sum(), "tokens": rollout.completion_mask.sum(),
        "best_right": (right & (ranking.ranks.to(right.device) == 0)).any(dim=1).sum(), "ended": rollout.ended.sum(),
        "failed": (~ranking.ok).sum(), "dead": (ranking.ok & ~live).sum(), "squares": (advantages**2).sum(),
        "ndcg": sum(ndcg), "num_ndcg": len(ndcg), "tau": sum(tau), "num_tau": len(tau),
    }  # fmt: skip
    n = dict(zip(sums, reduce_sum(*sums.values(), device=device), strict=True))
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


# ----------------------------------------------------------------------------------------------------------- the loop


def learn(cfg: Config, policy, trainable, train_set, optimizer, options, progress: dict) -> str:
    """Oracle-RLAIF, the paper's algorithm. Returns "done", "interrupted" or "bad" (too many non-finite losses)."""
    device, G, (process, num_processes) = train_set.video_embeds.device, cfg.group_size, process_info()
    P = min(cfg.batch_prompts, len(train_set)) // num_processes * num_processes  # prompts a step, over all processes
    mine, steps_per_epoch = slice(process * P // num_processes, (process + 1) * P // num_processes), len(train_set) // P
    generator, interrupted = torch.Generator(), catch_interrupt()
    oracle = make_oracle(cfg, torch.Generator().manual_seed(cfg.seed + process))
    bar = tqdm(total=cfg.num_steps, initial=progress["step"], disable=process != 0, file=sys.stdout)
    for step in range(progress["step"], cfg.num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:  # the reference is frozen at each epoch's start
            lora.freeze_reference(policy.decoder)
        order = torch.randperm(len(train_set), generator=generator.manual_seed(cfg.seed * 2**20 + epoch))
        chosen = order[place * P : (place + 1) * P][mine]
        questions, prompts, clock = [train_set.questions[i] for i in chosen], train_set[chosen], [time.perf_counter()]

        # 1) sample G answers a prompt; every process draws all uniforms and uses its own, so their number is no matter
        generator.manual_seed(cfg.seed * 2**20 + 2**19 + step)
        uniforms = torch.rand(P, G, cfg.max_new_tokens, generator=generator)[mine].to(device)
        rollout = generate(policy, prompts, G, uniforms=uniforms, temperature=cfg.temperature, top_p=cfg.top_p, **options)
        texts = train_set.texts(rollout)
        clock.append(time.perf_counter())

        # 2) the oracle ranks them: it sees questions and texts, never log-probabilities
        ranking = oracle.rank(questions, texts)
        clock.append(time.perf_counter())

        # 3) rank advantages; groups that are all tied, or whose ranking failed, carry no signal
        policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(-1, G).cpu().round(decimals=4))
        advantages = rank_advantages(ranking.ranks, policy_ranks, cfg.advantage_form, cfg.gain, ranking.ok)  # (P, G)
        live = ranking.ok & (ranking.ranks != ranking.ranks[:, :1]).any(dim=1)
        row_live, row_advantages = live.repeat_interleave(G).to(device), advantages.flatten().to(device)

        # 4) clipped update, with KL to the frozen reference and an entropy bonus
        numbers = update(cfg, policy, trainable, optimizer, prompts, rollout, row_advantages, row_live, options["banned"])
        clock.append(time.perf_counter())

        # 5) report, save
        numbers |= feedback_numbers(questions, texts, ranking, policy_ranks, advantages, live, rollout, device)
        numbers |= dict(zip(("sampling_s", "oracle_s", "update_s"), (b - a for a, b in zip(clock, clock[1:])), strict=False))
        numbers["tokens_per_s"] = numbers["tokens"] / (clock[-1] - clock[0])
        progress |= {"step": step + 1, "bad_steps": progress["bad_steps"] + numbers["bad"]}
        progress["bad_in_a_row"] = numbers["bad"] * (progress["bad_in_a_row"] + 1)
        report(cfg, bar, step, numbers, questions, texts, ranking, policy_ranks, advantages)
        if numbers["bad"]:
            save_bad_batch(cfg, step, prompts, rollout, row_advantages)
        stop = "bad" if progress["bad_in_a_row"] >= cfg.max_bad_steps else "interrupted" if interrupted() else ""
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.num_steps:
            save_checkpoint(cfg, policy, trainable, optimizer, progress)
        if stop:
            return stop
    return "done"


def make_oracle(cfg: Config, generator: torch.Generator):
    if cfg.swap_prob or cfg.position_bias:
        return NoisyOracle(RuleOracle(), generator, cfg.swap_prob, cfg.position_bias)
    return RuleOracle()


def catch_interrupt():
    """After this Ctrl-C no longer kills: the returned function says whether it came. A second one kills as ever."""
    came = []

    def handler(signum, frame):
        came.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return lambda: reduce_sum(len(came), device="cpu")[0] > 0 if not dist.is_initialized() else bool(came)


def report(cfg, bar, step, numbers, questions, texts, ranking, policy_ranks, advantages):
    """A row of metrics.jsonl, two prompts in rollouts.jsonl, the progress bar."""
    if process_info()[0] != 0:
        return
    with open(os.path.join(cfg.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, **numbers}) + "\n")
    with open(os.path.join(cfg.out, "rollouts.jsonl"), "a") as file:
        for i in range(min(2, len(questions))):
            row = {"step": step, "id": questions[i].id, "question": questions[i].question, "answer": questions[i].answer}
            row |= {"candidates": texts[i * cfg.group_size : (i + 1) * cfg.group_size], "oracle_ok": bool(ranking.ok[i])}
            row |= {"oracle_ranks": ranking.ranks[i].tolist(), "policy_ranks": policy_ranks[i].tolist()}
            file.write(json.dumps(row | {"advantages": [round(a, 6) for a in advantages[i].tolist()]}) + "\n")
    shown = {"acc": "accuracy", "best": "oracle_best_accuracy", "ndcg": "ndcg", "tau": "kendall_tau", "kl": "kl"}
    shown |= {"H": "entropy", "clip": "clip_frac"}
    text = " ".join(f"{k} {numbers[v]:.3f}" for k, v in shown.items() if v in numbers)
    seconds = "/".join(f"{numbers[k]:.2f}" for k in ("sampling_s", "oracle_s", "update_s"))
    text += f" dead {numbers['dead_groups']} failed {numbers['failed_groups']} {numbers['tokens_per_s']:.0f} tok/s {seconds} s"
    bar.set_postfix_str(text)
    bar.update(1)


def save_bad_batch(cfg, step, prompts, rollout, advantages):
    """What a skipped step was made of, to look into: bad_batches/step_N_process_M.safetensors."""
    folder = os.path.join(cfg.out, "bad_batches")
    os.makedirs(folder, exist_ok=True)
    tensors = {"prompt_ids": prompts.prompt_ids, "prompt_mask": prompts.prompt_mask, "advantages": advantages}
    tensors |= {"video_embeds": prompts.video_embeds, "completion_ids": rollout.completion_ids}
    tensors |= {"completion_mask": rollout.completion_mask, "old_logprobs": rollout.logprobs}
    path = os.path.join(folder, f"step_{step}_process_{process_info()[0]}.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
    tqdm.write(f"step {step}: loss or gradient not finite; step skipped, batch saved in {path}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------- start and finish


def stored_options(given: dict) -> dict:
    """With --resume: the run's own options. Those given again must be the same, but --num_steps."""
    if not given.get("resume"):
        return {}
    out = given.get("out", Config.out)
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file, so --resume has nothing to continue; leave --resume out to start")
    with open(path) as file:
        stored = json.load(file)
    for name, value in given.items():
        if name not in ("resume", "out", "num_steps") and stored[name] != value:
            raise DataError(f"--{name} {value}: the run in {out} has {stored[name]!r}; leave it out to resume")
    return stored | {"out": out, "resume": True}


def start_processes(cfg: Config) -> torch.device:
    """The device of this process; under torchrun also joins the group (NCCL on GPUs, gloo on CPU)."""
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(index)
    return torch.device("cuda", index) if cuda else torch.device("cpu")


def open_run(cfg: Config, policy, trainable, optimizer) -> dict:
    """A new run folder with config.json, or the old one cut back to its checkpoint. Returns the progress."""
    if not cfg.resume:
        if process_info()[0] == 0:
            os.makedirs(cfg.out)
            write_json(os.path.join(cfg.out, "config.json"), asdict(cfg))
        return {"step": 0, "bad_steps": 0, "bad_in_a_row": 0, "wall_s": 0.0}
    progress = load_checkpoint(cfg, policy, trainable, optimizer)
    for name in ("metrics.jsonl", "rollouts.jsonl") if process_info()[0] == 0 else ():
        path = os.path.join(cfg.out, name)
        with open(path) as file:
            kept = [line for line in file if json.loads(line)["step"] < progress["step"]]
        with open(f"{path}.tmp", "w") as file:
            file.writelines(kept)
        os.replace(f"{path}.tmp", path)
    return progress


def main() -> int:
    cfg = parse_args(Config, PRESETS, stored_options)
    if not cfg.resume and os.path.exists(cfg.out):
        raise DataError(f"--out {cfg.out}: exists already; add --resume to continue it, or name another folder")
    if cfg.resume and not os.path.exists(checkpoint_path(cfg)):
        raise DataError(f"{checkpoint_path(cfg)}: no such file; the run ended before its first checkpoint, start it anew")
    began, device = time.time(), start_processes(cfg)
    policy, trainable, train_set, eval_set = load_everything(cfg, device)
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=0.0)
    banned = train_set.tokenizer.banned_ids(policy.cfg.vocab_size).to(device)
    options = dict(end_ids=torch.tensor([EOS_ID], device=device), banned=banned,
                   max_new_tokens=cfg.max_new_tokens)  # fmt: skip
    judge = dict(samples=cfg.eval_samples, seed=cfg.seed)
    progress = open_run(cfg, policy, trainable, optimizer)
    if "before" not in progress:
        progress["before"], progress["before_values"] = evaluate(policy, eval_set, **judge, **options)
        lora.freeze_reference(policy.decoder)
        save_checkpoint(cfg, policy, trainable, optimizer, progress)
    if process_info()[0] == 0:
        print(f"{len(train_set)} questions to learn from, {len(eval_set)} held out; set up in {time.time() - began:.1f} s")
    ended = learn(cfg, policy, trainable, train_set, optimizer, options, progress)
    if ended == "interrupted":
        print(f"\nsaved at step {progress['step']}; go on with: python train.py --out {cfg.out} --resume")
        return 1
    if ended == "bad":
        print(f"\n{cfg.max_bad_steps} non-finite losses in a row: stopped at step {progress['step']}; see {cfg.out}/bad_batches; a lower --lr or --dtype float32 may help", file=sys.stderr)
        return 1
    after, after_values = evaluate(policy, eval_set, **judge, **options)
    gain = gains(eval_set.questions, progress["before_values"], after_values)
    if process_info()[0] == 0:
        results = {"seed": cfg.seed, "steps": cfg.num_steps, "wall_s": round(progress["wall_s"] + time.time() - began, 1)}
        results |= {"device": describe(device), "bad_steps": progress["bad_steps"]}
        write_json(os.path.join(cfg.out, "results.json"), results | {"before": progress["before"], "after": after, "gain": gain})
        print("\n" + table(progress["before"], after))
        for name, g in gain.items():
            print(f"{name}: {100 * g['accuracy']:+.1f} points, 95 % interval {100 * g['ci95'][0]:+.1f} to {100 * g['ci95'][1]:+.1f}")
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
