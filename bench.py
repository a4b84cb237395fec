"""Seconds of one whole step (sample, rank, update) here and in TRL's GRPOTrainer, on the same model and prompts.

    pip install -r requirements-dev.txt
    python bench.py                                     # float32, then bfloat16, against TRL
    python bench.py --dtype float32 --peer none         # this code alone

Both sides: 8 prompts of 96 tokens, 5 completions of exactly 32 tokens, a decoder of random weights with LoRA on all
seven linear layers, one update with KL to the start, no gradient checkpointing, AdamW. The two take turns in one
process with the same number of threads; the median of each counts. Last line: the result as one JSON object.
"""

import json
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from torch import nn

import lora
import train
from data import DataError, Prompts, parse_args, run_script, write_json
from grpo_rank import rank_advantages, ranks_from_scores
from model import Decoder, KVCache, ModelConfig, VideoLM
from rollout import completion_states, generate

MODEL = ModelConfig(dim=256, num_layers=6, num_heads=8, num_kv_heads=8, ffn_dim=688, vocab_size=512)
PAD_ID, EOS_ID, FIRST_ID = 0, 1, 2  # TRL's tokenizer needs the first two; prompts are drawn from the rest
P, G, S, T = 8, 5, 96, 32
HYPER = train.Config(
    batch_prompts=P, micro_batch_prompts=P, group_size=G, max_new_tokens=T, updates_per_rollout=1, clip_eps=0.2,
    kl_coef=0.04, entropy_coef=0.0, lora_r=16, lora_alpha=32.0, lr=1e-4, max_grad_norm=1.0,
)  # fmt: skip


@dataclass
class Config:
    dtype: str = "both"  # float32 | bfloat16 | both
    repeats: int = 10  # timed steps a side
    warmup: int = 2  # steps a side before them
    peer: str = "trl"  # trl | none
    json: str = ""  # file for the results; empty: only the last line printed

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "both") or self.peer not in ("trl", "none"):
            raise DataError(f"--dtype {self.dtype} --peer {self.peer}: float32 | bfloat16 | both, trl | none")
        if self.repeats < 1 or self.warmup < 1:
            raise DataError(f"--repeats {self.repeats} --warmup {self.warmup}: at least 1 each")


class Stopwatch:
    """Seconds by name, one entry a step."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str):
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def medians(self, warmup: int) -> dict[str, float]:
        return {name: statistics.median(values[warmup:]) for name, values in self.seconds.items()}


def score(completion_ids: list[int]) -> float:
    """What both sides are rewarded by, a function of the ids alone: the share of even ones."""
    return sum(i % 2 == 0 for i in completion_ids) / len(completion_ids)


# --------------------------------------------------------------------------------------------------------------- ours


class TextLM(nn.Module):
    """A VideoLM without eyes: its prompts are text alone."""

    embed_prompt = VideoLM.embed_prompt

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.decoder = Decoder(cfg)


def our_step(prompt_ids: torch.Tensor, dtype: str, watch: Stopwatch):
    """A function that takes one step of this repository's training. prompt_ids (P, S) int64."""
    policy = TextLM(MODEL)
    policy.decoder.compute_dtype = getattr(torch, dtype)
    trainable = lora.add_adapters(policy.decoder, HYPER.lora_r, HYPER.lora_alpha)
    lora.freeze_reference(policy.decoder)
    optimizer = torch.optim.AdamW(trainable, lr=HYPER.lr, weight_decay=0.0)
    prompts = Prompts(prompt_ids, torch.ones_like(prompt_ids).bool(), torch.zeros(P, 0, MODEL.dim))
    no_end = torch.empty(0, dtype=torch.int64)

    def step():
        with watch("step"):
            with watch("sample"):
                rollout = generate(
                    policy, prompts, G, T, end_ids=no_end, pad_id=PAD_ID, uniforms=torch.rand(P, G, T)
                )
            with watch("rank"):
                scores = torch.tensor([score(ids) for ids in rollout.completion_ids.tolist()]).view(P, G)
                ranks = ranks_from_scores(scores)
                advantages = rank_advantages(ranks).flatten()
                live = (ranks != ranks[:, :1]).any(dim=1).repeat_interleave(G)
            with watch("update"):
                numbers = train.update(
                    HYPER, policy, trainable, optimizer, prompts, rollout, advantages, live, None
                )
        # Parts of the above again, outside the step's clock
        with torch.no_grad(), watch("  prefill, in sample"):
            policy.decoder(
                policy.decoder.embed_tokens(prompt_ids),
                prompts.prompt_mask,
                cache=KVCache(prompts.prompt_mask, G, T),
            )
        with torch.no_grad(), lora.using(policy.decoder, "reference"), watch("  reference, in update"):
            completion_states(policy, prompts, rollout)
        assert rollout.completion_mask.sum() == P * G * T and not numbers["bad"]

    return step


# -------------------------------------------------------------------------------------------------------------- theirs


def their_trainer(
    prompt_ids: torch.Tensor, dtype: str, watch: Stopwatch, num_steps: int, between, folder: str
):
    """A GRPOTrainer of the same sizes; its train() takes num_steps steps and calls between() after each."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(MODEL.vocab_size)}, unk_token=f"w{PAD_ID}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"w{PAD_ID}", eos_token=f"w{EOS_ID}", padding_side="left"
    )
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.dim, num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads, num_key_value_heads=MODEL.num_kv_heads,
        intermediate_size=MODEL.ffn_dim, rms_norm_eps=MODEL.norm_eps, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    ))  # fmt: skip
    plain_generate = model.generate

    def timed_generate(*args, **kwargs):
        with watch("sample"):
            return plain_generate(*args, **kwargs)

    model.generate = timed_generate

    def reward(completion_ids, **kwargs):
        assert all(len(ids) == T for ids in completion_ids), [len(ids) for ids in completion_ids]
        return [score(ids) for ids in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.timer = watch("step")
            self.timer.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.timer.__exit__(None, None, None)
            between()

    text = [" ".join(f"w{i}" for i in ids) for ids in prompt_ids.tolist()]
    options = GRPOConfig(
        output_dir=folder, max_steps=num_steps, per_device_train_batch_size=P * G, num_generations=G,
        max_completion_length=T, generation_kwargs={"min_new_tokens": T}, temperature=HYPER.temperature, top_k=0,
        beta=HYPER.kl_coef, epsilon=HYPER.clip_eps, loss_type="grpo", num_iterations=1, learning_rate=HYPER.lr,
        weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=HYPER.max_grad_norm, use_cpu=True,
        bf16=dtype == "bfloat16", gradient_checkpointing=False, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=options, train_dataset=Dataset.from_dict({"prompt": text}),
        processing_class=tokenizer, callbacks=[Turns()],
        peft_config=LoraConfig(r=HYPER.lora_r, lora_alpha=HYPER.lora_alpha, target_modules=list(lora.DECODER_LINEARS)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


# ------------------------------------------------------------------------------------------------------------ compare


def compare(cfg: Config, dtype: str) -> dict:
    """Takes the steps of both sides in turn and prints a table of medians."""
    torch.manual_seed(0)
    prompt_ids = torch.randint(FIRST_ID, MODEL.vocab_size, (P, S))
    num_steps, ours, theirs = cfg.warmup + cfg.repeats, Stopwatch(), Stopwatch()
    step = our_step(prompt_ids, dtype, ours)
    if cfg.peer == "trl":
        with tempfile.TemporaryDirectory() as folder:
            their_trainer(prompt_ids, dtype, theirs, num_steps, step, folder).train()
    else:
        for _ in range(num_steps):
            step()
    sides = {"ours": ours.medians(cfg.warmup), "trl": theirs.medians(cfg.warmup)}
    print(f"\n{dtype}, median of {cfg.repeats} steps")
    for name, seconds in sides.items():
        for part, s in seconds.items():
            rate = f"{P * G * T / s:8.0f} new tokens/s" if part in ("step", "sample") else ""
            print(f"  {name:5s} {part:24s} {s:8.3f} s {rate}")
    result = {"dtype": dtype, **{k: {p.strip(): round(s, 4) for p, s in v.items()} for k, v in sides.items()}}
    if cfg.peer == "trl":
        result["ratio"] = round(sides["ours"]["step"] / sides["trl"]["step"], 4)
        print(f"  ours / trl {result['ratio']:.3f}")
    return result


def cpu_model() -> str:
    """As the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    cfg = parse_args(Config)
    machine = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    packages = ("torch", "trl", "transformers", "peft") if cfg.peer == "trl" else ("torch",)
    machine |= {name: version(name) for name in packages}
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    dtypes = ("float32", "bfloat16") if cfg.dtype == "both" else (cfg.dtype,)
    result = {"machine": machine, "prompts": P, "group_size": G, "prompt_tokens": S, "new_tokens": T}
    result |= {
        "repeats": cfg.repeats,
        "model": asdict(MODEL),
        "runs": [compare(cfg, dtype) for dtype in dtypes],
    }
    if cfg.json:
        write_json(cfg.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_script(main)
