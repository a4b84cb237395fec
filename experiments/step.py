"""One whole step (sample, rank, update) here and in TRL's GRPOTrainer: same sizes, same prompts, in turn.

A step, both sides: P prompts of S tokens, G completions of exactly T tokens, a decoder of random weights with
LoRA on all seven linear layers, one AdamW update with KL to the start, no gradient checkpointing.
"""

import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

import lora
import train
from checkpoints.policies import freeze_base
from data import Prompts
from grpo_rank import rank_advantages, ranks_from_scores
from model import Decoder, ModelConfig, VideoLM
from plumbing.machine import MachineOptions, set_up
from rollout import Sampling, generate, reference_states

MODEL = ModelConfig(dim=256, num_layers=6, num_heads=8, num_kv_heads=8, ffn_dim=688, vocab_size=512)
P, G, S, T = 8, 5, 96, 32
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1}  # TRL wants them; prompts are drawn from the other ids
STEP = train.Config(updates_per_rollout=1, kl_coef=0.04, lora_r=16, lr=1e-4)


def now() -> float:
    """Seconds, once all that is queued on a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds of each part, one entry a step."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, part: str):
        began = now()
        yield
        self.seconds.setdefault(part, []).append(now() - began)

    def medians(self, warmup: int) -> dict[str, float]:
        return {part: round(statistics.median(s[warmup:]), 6) for part, s in self.seconds.items()}


def score(completion_ids: list[int]) -> float:
    """Both sides' feedback, from the ids alone: the share of even ones."""
    return sum(i % 2 == 0 for i in completion_ids) / len(completion_ids)


def our_step(prompt_ids: torch.Tensor, model: ModelConfig, dtype: str, watch: Stopwatch, G: int, T: int):
    """prompt_ids (P, S) int64 -> a function that takes one step of train.py with them, on their device."""
    P, device = len(prompt_ids), prompt_ids.device
    policy, cfg = text_policy(model, dtype, device), replace(STEP, group_size=G, max_new_tokens=T)
    learner = lora.Learner(policy.decoder, STEP.lora_r, STEP.lora_alpha)
    prompts, no_end = text_prompts(prompt_ids, model), prompt_ids[0, :0]

    def step():
        with watch("step"):
            with watch("sample"):
                uniforms = torch.rand(P, G, T, device=device)
                rollout = generate(policy, prompts, G, Sampling(T, no_end), uniforms)
            with watch("rank"):
                scores = torch.tensor([score(ids) for ids in rollout.completion_ids.tolist()]).view(P, G)
                advantages = rank_advantages(ranks_from_scores(scores))
            with watch("update"):
                with watch("reference, part of update"):
                    ref_states = reference_states(policy, prompts, rollout, size=0)
                numbers = train.update(
                    cfg, policy, learner, prompts=prompts, rollout=rollout, advantages=advantages,
                    ref_states=ref_states, step=0,
                )  # fmt: skip
        assert rollout.completion_mask.sum() == P * G * T and not numbers["bad"], numbers
        # A part of the step once more, by itself
        with watch("prefill, part of sample"):
            generate(policy, prompts, G, Sampling(1, no_end))

    return step


def text_policy(cfg: ModelConfig, dtype: str, device) -> SimpleNamespace:
    """A VideoLM without eyes, of random weights: text alone. It computes as train.py's does (set_up)."""
    policy = SimpleNamespace(cfg=cfg, decoder=Decoder(cfg).to(device))
    policy.embed_prompt = partial(VideoLM.embed_prompt, policy)
    set_up(policy.decoder, MachineOptions(dtype=dtype))
    return policy


def text_prompts(ids: torch.Tensor, cfg: ModelConfig) -> Prompts:
    """Prompts of these ids (P, S), without a video."""
    return Prompts(ids, torch.ones_like(ids).bool(), torch.zeros(len(ids), 0, cfg.dim, device=ids.device))


def sampler(model: ModelConfig, dtype: str, device: str):
    """(policy of random weights, ids (P, S) of random prompts, a function that samples so many tokens of each
    prompt's G answers)."""
    policy = text_policy(model, dtype, device)
    freeze_base(policy.decoder, dtype)
    ids = torch.randint(2, model.vocab_size, (P, S), device=device)
    prompts = text_prompts(ids, model)

    def sample(tokens: int):
        uniforms = torch.rand(P, G, tokens, device=device)
        return generate(policy, prompts, G, Sampling(tokens, ids[0, :0]), uniforms)

    return policy, ids, sample


def run_trl(prompt_ids: torch.Tensor, dtype: str, watch: Stopwatch, num_steps: int, between, folder: str):
    """prompt_ids (P, S): GRPOTrainer takes num_steps steps with them and calls between() after each."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({str(i): i for i in range(MODEL.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.dim, num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads, num_key_value_heads=MODEL.num_kv_heads,
        intermediate_size=MODEL.ffn_dim, tie_word_embeddings=True, bos_token_id=None, **SPECIAL_IDS,
    ))  # fmt: skip
    model.generate = watch("sample")(model.generate)

    def reward(completion_ids, **kwargs):
        assert [len(ids) for ids in completion_ids] == [T] * P * G, list(map(len, completion_ids))
        return [score(ids) for ids in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.timer = watch("step")
            self.timer.__enter__()

        def on_step_end(self, *args, **kwargs):
            self.timer.__exit__(None, None, None)
            between()

    options = GRPOConfig(
        output_dir=folder, max_steps=num_steps, per_device_train_batch_size=P * G, num_generations=G, top_k=0,
        max_completion_length=T, generation_kwargs={"min_new_tokens": T}, temperature=STEP.temperature,
        beta=STEP.kl_coef, epsilon=STEP.clip_eps, loss_type="grpo", num_iterations=1, learning_rate=STEP.lr,
        weight_decay=0.0, max_grad_norm=STEP.max_grad_norm, bf16=dtype == "bfloat16",
        use_cpu=not prompt_ids.is_cuda, gradient_checkpointing=False, save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    adapters = LoraConfig(r=STEP.lora_r, lora_alpha=STEP.lora_alpha, target_modules=[*lora.DECODER_LINEARS])
    texts = Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in prompt_ids.tolist()]})
    kit = dict(processing_class=tokenizer, callbacks=[Turns()], peft_config=adapters)
    trainer = GRPOTrainer(model, reward, options, texts, **kit)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def compare(cfg, dtype: str) -> dict:
    """cfg: bench's Config. Lets the two sides take steps in turn and prints the medians."""
    torch.manual_seed(0)
    prompt_ids = torch.randint(len(SPECIAL_IDS), MODEL.vocab_size, (P, S)).to(cfg.device)
    ours, theirs, num_steps = Stopwatch(), Stopwatch(), cfg.warmup + cfg.repeats
    step = our_step(prompt_ids, MODEL, dtype, ours, G, T)
    if cfg.peer == "trl":
        with tempfile.TemporaryDirectory() as folder:
            run_trl(prompt_ids, dtype, theirs, num_steps, step, folder)
    else:
        for _ in range(num_steps):
            step()
    result = {"dtype": dtype, "ours": ours.medians(cfg.warmup), "trl": theirs.medians(cfg.warmup)}
    print(f"\n{dtype}, medians of {cfg.repeats}")
    for side in ("ours", "trl"):
        for part, s in result[side].items():
            print(f"  {side:4} {part:26} {s:9.4f} s {P * G * T / s:10.0f} tokens/s")
    if cfg.peer == "trl":
        result["ratio"] = round(result["ours"]["step"] / result["trl"]["step"], 4)
        print(f"  ours / trl {result['ratio']:.3f}")
    return result
