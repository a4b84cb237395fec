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
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

import lora
from checkpoints import memory, nf4
from checkpoints.policies import OPTIONS, load_policy, load_tokenizer, policy_configs
from config import PRESETS, Config
from data import PromptSet, longest_text
from eval import draw_world, evaluate, gains, load_sets, table
from grpo_rank import (
    compiled,
    completion_logprobs,
    group_zscores,
    policy_loss,
    rank_advantages,
    ranks_from_scores,
)
from oracle import feedback_means, feedback_sums, weighed
from oracles.cache import check_replay
from oracles.choose import by_reward, choose_oracle, rank_patiently, reward_oracle
from plumbing.options import BadInput, parse_args, run_script, write_json
from plumbing.run_folder import (
    checkpoint_path,
    open_run,
    oracle_summary,
    pick_device,
    process_info,
    report,
    save_bad_batch,
    save_checkpoint,
    stored_options,
)
from rollout import completion_states, generate_in_parts
from videoqa.answers import is_correct, kendall_tau, ndcg_agreement

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
    chosen = dict(clip=cfg.clip, num_frames=cfg.num_frames, video_tokens=cfg.video_tokens)
    sizes = policy_configs(cfg.policy, **chosen)
    if process_info()[0] == 0 and not cfg.data:
        draw_world(cfg)
    if dist.is_initialized():
        dist.barrier()
    train_questions, eval_questions = load_sets(cfg)
    dtype = pick_dtype(device, cfg.dtype)
    if cfg.memory_plan and process_info()[0] == 0:
        sets = (train_questions, eval_questions)
        num_videos = sum(len({question.shown for question in questions}) for questions in sets)
        tokenizer = load_tokenizer(cfg.policy, sizes[0].vocab_size, cfg.template, cfg.think)
        text_tokens = max(longest_text(tokenizer, questions, sizes[0].num_frames) for questions in sets)
        plan = memory.plan(*sizes, cfg, dtype, num_videos, text_tokens)
        print(f"memory plan, before anything is allocated, for {text_tokens} tokens of text:", flush=True)
        print(memory.table(plan), flush=True)
    policy, tokenizer = load_policy(cfg.policy, device, **{k: getattr(cfg, k) for k in OPTIONS})
    policy.decoder.compute_dtype, policy.decoder.checkpointing = dtype, cfg.checkpointing
    if cfg.compile and cfg.base == "nf4":
        nf4.dequantise = compiled(nf4.dequantise, device.type)  # one pass instead of eight small ones
    train_set = PromptSet(policy, tokenizer, train_questions)
    eval_set = PromptSet(policy, tokenizer, eval_questions)
    generator = torch.Generator().manual_seed(cfg.seed)
    trainable = lora.add_adapters(policy.decoder, cfg.lora_r, cfg.lora_alpha, generator=generator)
    return policy, trainable, train_set, eval_set


# --------------------------------------------------------------------------------------------------- one step


def micro_batches(cfg, P: int) -> list[slice]:
    return [slice(i, i + cfg.micro_batch_prompts) for i in range(0, P, cfg.micro_batch_prompts)]


def reference_states(cfg, policy, prompts, rollout) -> list[torch.Tensor]:
    """The frozen reference's states of the completions, per micro-batch; they need no ranks. In host memory:
    in the 7b preset they are 4.7 GB."""
    with lora.using(policy.decoder, "reference"), lora.folded(policy.decoder):
        micro = micro_batches(cfg, len(prompts.prompt_ids))
        return [completion_states(policy, prompts[p], rollout[rows(p, cfg.group_size)]).cpu() for p in micro]


def update(cfg, policy, trainable, optimizer, prompts, rollout, ref_states, advantages, live, banned) -> dict:
    """Clipped GRPO_rank updates on one rollout. Returns the step's numbers; "bad": a loss was not finite."""
    P, G, device = len(prompts.prompt_ids), cfg.group_size, prompts.prompt_ids.device
    micro = micro_batches(cfg, P)
    counted = rollout.completion_mask & live[:, None]
    num_tokens, num_sequences = reduce_sum(counted.sum(), counted.any(dim=1).sum(), device=device)
    numbers, gap, head = {}, 0.0, policy.decoder.head.float()  # logits in float32, whatever the base is in
    for u in range(cfg.updates_per_rollout):
        for p, ref_hidden in zip(micro, ref_states, strict=True):
            part = rollout[rows(p, G)]
            logprobs, entropy, kl = completion_logprobs(
                completion_states(policy, prompts[p], part), head, part.completion_ids,
                part.completion_mask, temperature=cfg.temperature, banned=banned, support=part.support,
                ref_hidden=ref_hidden.to(device), compile=cfg.compile,
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
    } | feedback_sums(texts, ranking)  # fmt: skip
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
    } | feedback_means(n)


def rehearse(cfg, policy, trainable, train_set, limits) -> dict[str, int]:
    """The largest step that can come, first: the longest prompts, answers without an end. What does not
    fit ends here, in the first minute. Nothing is learnt. Returns the peak bytes of sampling and update,
    {} on a CPU."""
    device, G, peaks = train_set.video_embeds.device, cfg.group_size, {}
    P = prompts_a_step(cfg, train_set) // process_info()[1]
    at_once = cfg.sample_prompts or P
    longest = sorted(range(len(train_set)), key=lambda i: -len(train_set.prompts[i]))
    prompts = train_set[torch.tensor(longest[: min(P, max(at_once, cfg.micro_batch_prompts))])]
    endless = limits | {"end_ids": limits["end_ids"][:0]}
    uniforms = torch.full((len(prompts.prompt_ids), G, cfg.max_new_tokens), 0.5, device=device)
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)  # with moments as large as the true
    for name in ("sampling", "update"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if name == "sampling":
            rollout = generate_in_parts(policy, prompts, G, at_once, uniforms, **endless)
        else:
            size = cfg.micro_batch_prompts
            advantages = torch.ones(len(rollout.ended[: size * G]), device=device)
            batch = prompts[:size], rollout[: size * G]
            signal = advantages, advantages.bool(), limits["banned"]
            update(cfg, policy, trainable, optimizer, *batch, reference_states(cfg, policy, *batch), *signal)
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device)
    return peaks


# --------------------------------------------------------------------------------------------------- the loop


def prompts_a_step(cfg: Config, train_set) -> int:
    """P, over all processes."""
    num_processes = process_info()[1]
    return min(cfg.batch_prompts, len(train_set)) // num_processes * num_processes


def rows_of_step(cfg: Config, train_set, step: int) -> torch.Tensor:
    """The numbers of the questions of a step, int64 (P,): every epoch in an order of its own."""
    P = prompts_a_step(cfg, train_set)
    epoch, place = divmod(step, len(train_set) // P)
    generator = torch.Generator().manual_seed(cfg.seed * 2**20 + epoch)
    return torch.randperm(len(train_set), generator=generator)[place * P : (place + 1) * P]


def learn(cfg, policy, trainable, train_set, optimizer, oracle, noise, limits, progress, began) -> str:
    """Oracle-RLAIF, the paper's algorithm. `began`: the run's start, time.time() less earlier sessions;
    `noise`: the generator of the oracle's noise.

    Returns "done", "interrupted" or "bad": too many non-finite losses in a row.
    """
    device, G, (process, num_processes) = train_set.video_embeds.device, cfg.group_size, process_info()
    P = prompts_a_step(cfg, train_set)
    mine = slice(process * P // num_processes, (process + 1) * P // num_processes)
    interrupted = catch_interrupt()
    generator = torch.Generator()  # seeded anew in every step, as noise is: no state to save
    judge = ThreadPoolExecutor(1, "oracle")
    bar = tqdm(total=cfg.num_steps, initial=progress["step"], disable=process != 0, file=sys.stdout)
    for step in range(progress["step"], cfg.num_steps):
        # 0) the next prompts; at an epoch's start they are shuffled, and the reference is frozen
        if step % (len(train_set) // P) == 0:
            lora.freeze_reference(policy.decoder)
        chosen = rows_of_step(cfg, train_set, step)[mine]
        questions, prompts = [train_set.questions[i] for i in chosen], train_set[chosen]
        clock = [time.perf_counter()]

        # 1) sample G answers a prompt. Every process draws all uniforms and uses those of its own prompts
        generator.manual_seed(cfg.seed * 2**20 + 2**19 + step)
        uniforms = torch.rand(P, G, cfg.max_new_tokens, generator=generator)[mine].to(device)
        heat = {"temperature": cfg.temperature, "top_p": cfg.top_p}
        at_once = cfg.sample_prompts or P
        rollout = generate_in_parts(policy, prompts, G, at_once, uniforms, **heat, **limits)
        texts = train_set.texts(rollout)
        clock.append(time.perf_counter())

        # 2) the oracle ranks them: it sees questions and texts, never log-probabilities. It does so in a
        # thread, while the frozen reference passes over the answers
        noise.manual_seed((cfg.seed * 2**20 + step) * num_processes + process)
        judged = judge.submit(rank_patiently, oracle, questions, texts, cfg.oracle_patience, interrupted)
        ref_states = reference_states(cfg, policy, prompts, rollout)
        clock.append(time.perf_counter())
        ranking = judged.result()
        clock.append(time.perf_counter())
        if any(reduce_sum(bool(ranking.dead), device=device)):  # in any process: all stop before the update
            tqdm.write(f"the judge is dead ({ranking.dead or 'in another process'})", file=sys.stderr)
            progress["wall_s"] = time.time() - began
            save_checkpoint(cfg, policy, trainable, optimizer, progress)
            return "interrupted"

        # 3) ranks become advantages; groups that are all tied, or whose ranking failed, carry no signal
        policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(-1, G).cpu().round(decimals=4))
        if cfg.objective == "grpo":
            advantages = group_zscores(oracle.totals(questions, texts))
        else:
            ranks = ranking.ranks, policy_ranks
            advantages = weighed(rank_advantages(*ranks, cfg.advantage_form, cfg.gain, ranking.ok), ranking)
        live = ranking.ok & (ranking.ranks != ranking.ranks[:, :1]).any(dim=1)  # (P,)

        # 4) clipped update, with KL to the frozen reference and an entropy bonus
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.num_steps)
        signal = advantages.flatten().to(device), live.repeat_interleave(G).to(device)  # (B,) each
        asked = prompts, rollout, ref_states, *signal, limits["banned"]
        numbers = update(cfg, policy, trainable, optimizer, *asked)
        clock.append(time.perf_counter())

        # 5) report, save
        numbers |= feedback_numbers(questions, texts, ranking, policy_ranks, advantages, live, rollout)
        if by_reward(cfg):
            numbers |= reward_numbers(reward_oracle(cfg).rewards(questions, texts), device)
        seconds = (b - a for a, b in itertools.pairwise(clock))
        numbers |= dict(zip(("sampling_s", "reference_s", "oracle_s", "update_s"), seconds, strict=True))
        numbers["oracle_share"] = numbers["oracle_s"] / (clock[-1] - clock[0])  # of the step: time it waits
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
    cuda = pick_device(cfg.device) == "cuda"
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
    noise = torch.Generator()
    oracle = choose_oracle(cfg, noise, device)
    policy, trainable, train_set, eval_set = load_everything(cfg, device)
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=0.0)
    limits = {
        "max_new_tokens": cfg.max_new_tokens,
        "end_ids": torch.tensor(train_set.tokenizer.end_ids, device=device),
        "banned": train_set.tokenizer.banned_ids(policy.cfg.vocab_size).to(device),
    }
    cfg.num_steps = cfg.num_steps or cfg.num_epochs * (len(train_set) // prompts_a_step(cfg, train_set))
    if cfg.oracle == "replay":
        numbers = {i for step in range(cfg.num_steps) for i in rows_of_step(cfg, train_set, step).tolist()}
        check_replay(cfg.oracle_cache, [train_set.questions[i] for i in sorted(numbers)])
    progress = open_run(cfg, policy, trainable, optimizer)
    if "before" not in progress:
        lora.freeze_reference(policy.decoder)
    if cfg.memory_plan:
        peaks = rehearse(cfg, policy, trainable, train_set, limits)
        measured = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items())
        print(f"measured in a rehearsal of the longest step: {measured or 'on a GPU alone'}", flush=True)
    batch = cfg.sample_prompts or memory.TESTED
    testing = {"samples": cfg.eval_samples, "seed": cfg.seed, "batch": batch} | limits
    if "before" not in progress:
        start, values = evaluate(policy, eval_set, **testing)
        progress |= {"before": start, "before_values": values}
        save_checkpoint(cfg, policy, trainable, optimizer, progress)
    if process_info()[0] == 0:
        both = {q.video for q in train_set.questions} & {q.video for q in eval_set.questions}
        seen = f"; {len(both)} videos are in both: the tables do not show what is new" if both else ""
        print(f"{len(train_set)} questions to learn from, {len(eval_set)} held out{seen}", flush=True)
    began -= progress["wall_s"]  # a resumed run goes on counting
    ended = learn(cfg, policy, trainable, train_set, optimizer, oracle, noise, limits, progress, began)
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
    after, values = evaluate(policy, eval_set, **testing)
    if process_info()[0] == 0:
        gain = gains(eval_set.questions, progress["before_values"], values)
        results = {
            "seed": cfg.seed,
            "steps": cfg.num_steps,
            "wall_s": round(time.time() - began, 1),
        }
        results |= {"device": describe(device), "bad_steps": progress["bad_steps"]}
        results |= {"before": progress["before"], "after": after, "gain": gain}
        results["oracle"] = oracle_summary(cfg.out)
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
