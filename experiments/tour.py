"""One step of Oracle-RLAIF with one prompt, each tensor printed with its shape. docs/tour.md walks along.

python -m experiments.tour [--clip 2000006] [--policy weights] [--seed 0]
"""

import os
import tempfile
from dataclasses import dataclass

import torch

import lora
import train
from checkpoints.policies import load_policy
from data import PromptSet
from grpo_rank import dcg, rank_advantages, ranks_from_scores
from oracle import RuleOracle
from plumbing.options import BadInput, Count, Options, Seed, parse_args, run_script
from rollout import Sampling, answer, completion_states, reference_states
from videoqa import world
from videoqa.questions import load_questions
from videoqa.video import read_frames


@dataclass
class TourOptions(Options):
    """The tour"""

    policy: str = "weights"  # folder that pretrain.py wrote
    clip: Count = 2000006  # seed of the scene that is drawn and asked about
    question: str = ""  # one of the scene's own; "": what color appears last, or its last question
    group_size: Count = 5  # G
    seed: Seed = 0  # of the sampled answers


def show(name: str, value, meaning: str) -> None:
    """A line: name, shape, type, meaning; a short tensor of one or two dimensions is printed below."""
    if not isinstance(value, torch.Tensor):
        print(f"  {name:<16} {meaning}: {value}")
        return
    shape = "(" + ", ".join(map(str, value.shape)) + ")"
    print(f"  {name:<16} {shape:<15} {str(value.dtype)[6:]:<8} {meaning}")
    if value.numel() <= 8 and value.dim():
        numbers = value.detach().flatten().tolist()
        print(f"  {'':<16} {' '.join(f'{x:.4g}' for x in numbers)}")


def main() -> int:
    options = parse_args(TourOptions)
    cfg = train.Config(policy=options.policy, group_size=options.group_size, num_steps=1, dtype="float32")
    G, T = cfg.group_size, cfg.max_new_tokens
    policy, tokenizer = load_policy(cfg)
    learner = lora.Learner(policy.decoder, cfg.lora_r, cfg.lora_alpha, cfg.seed)

    with tempfile.TemporaryDirectory() as folder:
        asked = load_questions(world.make_world(folder, [options.clip], workers=1), folder)
        own = {q.question: q for q in asked}
        if options.question and options.question not in own:
            raise BadInput(f"--question {options.question}: the scene of --clip has others: {', '.join(own)}")
        question = own.get(options.question or "what color appears last", asked[-1])
        print(f"\n1. The prompt: {question.question!r} about {os.path.basename(question.video)}")
        frames, times = read_frames(question.video, policy.cfg.num_frames, policy.clip_cfg.image_size)
        prompts = PromptSet(policy, tokenizer, [question])
    show("frames", frames, "(K, 3, H, W) pixels")
    show("frame_times", times, "(K,) seconds")
    show("patch_tokens", policy.patch_tokens(frames[None]), "(P, K, N, CLIP width), frozen")
    rows = torch.tensor([0])
    prompt = prompts[rows]
    show("video_embeds", prompt.video_embeds, "(P, tokens, D) from the bridge")
    show("prompt_ids", prompt.prompt_ids, "(P, S) tokens")

    print(f"\n2. The policy answers {G} times")
    uniforms = torch.rand(1, G, T, generator=torch.Generator().manual_seed(options.seed))
    sampling = Sampling.of(policy, tokenizer, max_new_tokens=T)
    rollout, texts = answer(policy, prompts, rows, G, sampling, uniforms)
    show("completion_ids", rollout.completion_ids, "(B, T) sampled tokens")
    show("completion_mask", rollout.completion_mask, "(B, T) True up to the end")
    show("logprobs", rollout.logprobs, "(B, T) log pi_old")
    show("texts", " | ".join(texts[0]), "for the oracle")

    print(f"\n3. The oracle ranks them; the right answer is {question.answer!r}")
    ranking = RuleOracle().rank([question], texts)
    policy_ranks = ranks_from_scores(rollout.logprobs.sum(dim=1).view(1, G).round(decimals=4))
    show("oracle ranks", ranking.ranks, "(P, G) how many are better")
    show("policy_ranks", policy_ranks, "(P, G) by log-probability")

    print("\n4. Ranks become advantages")
    show("gains", dcg(ranking.ranks), "(P, G) DCG; ties will share")
    advantages = rank_advantages(ranking.ranks, policy_ranks)
    show("advantages", advantages, "(P, G) they sum to zero")

    if not ranking.live.all():
        print("\nAll answers tie: the group is dead. It leaves the step, and nothing is learned from it.")
        return 0

    print("\n5. The update")
    lora.freeze_reference(policy.decoder)
    show("states", completion_states(policy, prompt, rollout), "(B, T, D) with gradient")
    show("head", policy.decoder.head, "(V, D), states @ head.T: logits")
    layer = next(iter(lora.layers(policy.decoder).values()))
    show("lora_A", layer.lora_A, "(r, in) of the first layer")
    show("lora_B", layer.lora_B, "(out, r) zero at the start")
    reference = reference_states(policy, prompt, rollout, 1)
    show("reference states", reference[0], "(B, T, D) of pi_ref")
    batch = dict(prompts=prompt, rollout=rollout, advantages=advantages)
    numbers = train.update(cfg, policy, learner, ref_states=reference, step=0, **batch)
    for name in ("loss", "ratio", "kl", "entropy"):
        show(name, f"{numbers[name]:.5f}", "mean over the two updates")
    show("grad_norm", f"{numbers['grad_norm']:.5f}", "of the second update")

    again = completion_states(policy, prompt, rollout)
    logprobs = (again @ policy.decoder.head.T).log_softmax(dim=-1)  # (B, T, V)
    logprobs = logprobs.gather(2, rollout.completion_ids[..., None]).squeeze(2) * rollout.completion_mask
    print("\n6. What one step did to the probability of each answer")
    before, after = rollout.logprobs.sum(dim=1).exp(), logprobs.sum(dim=1).exp()
    for text, old, new, a in zip(texts[0], before, after, advantages[0], strict=True):
        print(f"  {text[:24]:<24} advantage {a:+.3f}   {old:.4f} -> {new:.4f}")
    return 0


if __name__ == "__main__":
    run_script(main)
