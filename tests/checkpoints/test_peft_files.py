"""An adapter whose files cannot be one is refused, and the model stays as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import build, learn

import lora
from checkpoints import peft_files
from plumbing.options import BadInput


@pytest.fixture
def saved(tmp_path):
    decoder, trainable = build()
    learn(trainable)
    peft_files.save_adapter(decoder, tmp_path)
    return tmp_path


def refused(folder, words):
    decoder, _ = build(adapters=False)
    with pytest.raises(BadInput, match=words) as caught:
        peft_files.load_adapter(decoder, folder)
    assert str(caught.value).startswith(str(folder)) and not lora.layers(decoder)


@pytest.mark.parametrize(
    "name, value", [("lora_alpha", 0), ("lora_alpha", -8), ("lora_alpha", 1e300), ("lora_alpha", True),
                    ("r", 0), ("use_rslora", "false"), ("use_rslora", [])],
)  # fmt: skip
def test_a_setting_of_an_adapter_that_is_out_of_bounds_or_of_another_kind_is_refused(saved, name, value):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(saved, f"adapter_config.json: .*{name}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_an_adapter_without_floating_point_numbers_is_refused(saved, dtype):
    path = saved / "adapter_model.safetensors"
    save_file({name: x.to(dtype) for name, x in load_file(path).items()}, path)
    refused(saved, "adapter_model.safetensors: .* not stored as floats")


@pytest.mark.parametrize("size", [1e12, 1e30])
def test_an_adapter_whose_update_would_overflow_is_refused(saved, size):
    path = saved / "adapter_model.safetensors"
    save_file({name: torch.full_like(x, size) for name, x in load_file(path).items()}, path)
    refused(saved, "adapter_model.safetensors: .* below 1e12; use a sound copy")
