import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from model import Decoder, ModelConfig

CFG = ModelConfig(vocab_size=40, dim=32, num_layers=2, ffn_dim=48)
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 5, dtype=torch.bool)


def build(r=4, alpha=8.0, adapters=True):
    torch.manual_seed(0)
    decoder = Decoder(CFG)
    return decoder, lora.add_adapters(decoder, r, alpha) if adapters else []


def learn(parameters, seed=2):
    """As if trained: B no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def out(decoder):
    with torch.no_grad():
        return decoder(X, MASK)


def test_only_adapters_learn_and_all_of_them_do():
    decoder, trainable = build()
    assert len(trainable) == 2 * 7 * CFG.num_layers
    assert {id(p) for p in trainable} == {id(p) for p in decoder.parameters() if p.requires_grad}
    learn(trainable)
    decoder(X, MASK).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable)
    assert all(p.grad is None for p in decoder.parameters() if not p.requires_grad)


def test_an_adapter_is_scaled_by_alpha_over_r():
    layer = lora.LoRALinear(torch.nn.Linear(3, 2, bias=False), r=4, alpha=8.0)
    learn([layer.lora_A, layer.lora_B])
    x = torch.tensor([1.0, -2.0, 0.5])
    wanted = (layer.base.weight + 2 * layer.lora_B @ layer.lora_A) @ x
    torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=0)


def test_merge_gives_the_adapted_output_and_plain_layers():
    decoder, trainable = build()
    learn(trainable)
    adapted = out(decoder)
    lora.merge(decoder)
    assert decoder.state_dict().keys() == build(adapters=False)[0].state_dict().keys()
    assert (adapted - out(build()[0])).abs().max() > 0.1
    torch.testing.assert_close(out(decoder), adapted, atol=1e-5, rtol=1e-5)


def test_fresh_adapters_and_off_are_the_start_and_using_restores_even_after_an_error():
    decoder, trainable = build()
    start = out(decoder)
    assert torch.equal(start, out(build(adapters=False)[0]))
    learn(trainable)
    policy = out(decoder)
    with pytest.raises(KeyError), lora.using(decoder, "off"):
        assert torch.equal(out(decoder), start)
        with lora.using(decoder, "policy"):
            assert torch.equal(out(decoder), policy)
        assert torch.equal(out(decoder), start)
        raise KeyError
    assert torch.equal(out(decoder), policy) and not torch.equal(policy, start)


def test_the_reference_is_the_policy_when_frozen_and_then_stays():
    decoder, trainable = build()
    start = out(decoder)
    learn(trainable)
    with lora.using(decoder, "reference"):
        assert torch.equal(out(decoder), start)  # nothing frozen yet: the supervised start
    then = out(decoder)
    lora.freeze_reference(decoder)
    learn(trainable, seed=3)
    with lora.using(decoder, "reference"):
        assert torch.equal(out(decoder), then) and not decoder(X, MASK).requires_grad
    assert not torch.equal(out(decoder), then)


def test_a_saved_adapter_comes_back(tmp_path):
    decoder, trainable = build()
    learn(trainable)
    lora.save_adapter(decoder, tmp_path)
    fresh, _ = build()
    assert not torch.equal(out(fresh), out(decoder))
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(out(fresh), out(decoder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")


@pytest.mark.parametrize("fault", ["prefix", "missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_is_an_error_never_a_silent_zero(tmp_path, fault):
    decoder, trainable = build()
    learn(trainable)
    lora.save_adapter(decoder, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    if fault == "prefix":
        tensors = {k.removeprefix(lora.PREFIX): v for k, v in tensors.items()}
    elif fault == "extra":
        tensors["more"] = tensors[key].clone()
    else:
        tensor = tensors.pop(key)
        tensors |= {key: tensor[:1].clone()} if fault == "shape" else {}
    save_file(tensors, path)
    fresh, parameters = build()
    before = [p.clone() for p in parameters]
    with pytest.raises(ValueError, match="has shape" if fault == "shape" else "names differ"):
        lora.load_adapter(fresh, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))  # nothing half loaded


def test_adapters_on_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing to adapt"):
        lora.add_adapters(build(adapters=False)[0], 4, 8.0, targets=("query",))


def test_llama_2_7b_has_159907840_trainable_parameters_at_r_64():
    sizes = dict(vocab_size=32000, dim=4096, num_heads=32, num_kv_heads=32, ffn_dim=11008)
    with torch.device("meta"):
        layer = Decoder(ModelConfig(num_layers=1, **sizes))
    assert 32 * sum(p.numel() for p in lora.add_adapters(layer, 64, 16.0)) == 159_907_840


def test_peft_loads_our_file_and_gives_our_output(tmp_path):
    peft = pytest.importorskip("peft")
    decoder, trainable = build()
    learn(trainable)
    lora.save_adapter(decoder, tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.task_type = None  # our decoder has no generate() for PEFT to wrap
    theirs = peft.PeftModel.from_pretrained(build(adapters=False)[0], tmp_path, config=config)
    torch.testing.assert_close(out(theirs), out(decoder), atol=1e-5, rtol=1e-5)
