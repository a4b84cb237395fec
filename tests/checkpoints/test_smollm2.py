"""A real language model where its folder is named: SMOLLM2=DIR, SmolLM2-135M-Instruct in the Hugging Face
layout. Skipped without."""

import os
from types import SimpleNamespace

import pytest
import torch

from checkpoints.chat_tokenizer import ChatTokenizer
from checkpoints.huggingface import load_decoder
from data import Prompts
from rollout import Sampling, generate

FOLDER = os.environ.get("SMOLLM2", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SMOLLM2 names no folder")
transformers = pytest.importorskip("transformers")


@torch.no_grad()
def test_smollm2_answers_and_ends_its_turns_as_in_transformers():
    auto = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    decoder, ours = load_decoder(FOLDER), ChatTokenizer(FOLDER, "auto", None, model.config.vocab_size)
    V, end = model.config.vocab_size, auto.convert_tokens_to_ids("<|im_end|>")
    assert ours.end_ids[0] == end and not ours.banned_ids(V)[end]
    policy = SimpleNamespace(decoder=decoder, embed_prompt=lambda ids, mask, video: decoder.embed_tokens(ids))
    for question in ("What is the capital of France?", "Name a colour.", "Say hello in five words or fewer."):
        messages = [{"role": "user", "content": f"\n{question}"}]
        ids = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert [i for i in ours.prompt(question, 1) if i != ours.placeholder_id] == ids
        prompt = torch.tensor([ids])
        state = decoder(decoder.embed_tokens(prompt), torch.ones_like(prompt).bool())[:, 0, 0]
        assert (state @ decoder.head.T - model(prompt).logits[:, -1]).abs().max() <= 1e-4
        wanted = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=list(ours.end_ids))
        sampling = Sampling(24, torch.tensor(ours.end_ids), ours.banned_ids(V))
        prompts = Prompts(prompt, torch.ones_like(prompt).bool(), torch.zeros(1, 0, 1))
        found = generate(policy, prompts, 1, sampling)
        assert found.completion_ids[0].tolist() == wanted[0, len(ids) :].tolist()
