import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
from checkpoints import peft_files
from model import Decoder, ModelConfig
from plumbing.machine import hold, joined

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


@pytest.mark.parametrize("which", ["policy", "reference", "off"])
def test_joined_products_give_what_the_layers_give_and_leave_no_trace(which):
    decoder, parameters = build()
    lora.freeze_reference(decoder)
    learn(parameters)
    names = [name for name, _ in decoder.named_parameters()]
    with lora.using(decoder, which):
        plain = out(decoder)
        with joined(decoder):
            assert all(len(layer.mlp.joined[0].sizes) == 2 for layer in decoder.layers)
            torch.testing.assert_close(out(decoder), plain, atol=1e-5, rtol=0)
        assert torch.equal(out(decoder), plain)
        decoder.compute_dtype = torch.bfloat16  # the roundings of the training pass, not those of W + B A
        plain = out(decoder)
        with joined(decoder):
            assert (out(decoder) - plain).abs().max() <= 0.01
    with joined(decoder):
        assert names == [name for name, _ in decoder.named_parameters()]


def test_the_gradients_of_an_adapted_layer_are_those_of_its_formula():
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(6, 5), r=2, alpha=3.0).double()
    layer.lora_B.data.normal_()
    x, weights = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5).double()
    W, A, B = layer.base.weight, layer.lora_A, layer.lora_B
    plain = x @ W.T + layer.base.bias + 3.0 / 2 * (x @ A.T) @ B.T
    for y, learn in ((layer(x), [A, B, x]), (layer(x.detach()), [A, B])):  # a first layer's x learns nothing
        torch.testing.assert_close(y, plain, atol=1e-12, rtol=0)
        ours, wanted = (
            torch.autograd.grad((z * weights).sum(), learn, retain_graph=True) for z in (y, plain)
        )
        for pair in zip(ours, wanted, strict=True):
            torch.testing.assert_close(*pair, atol=1e-12, rtol=0)


def test_weights_held_in_16_bits_give_the_same_bits_and_are_not_copied_when_joined():
    """Products in bfloat16 round the frozen weights anyway; held so, they are rounded once."""
    decoder, parameters = build()
    learn(parameters)
    decoder.compute_dtype, results = torch.bfloat16, []
    for holding in (False, True):
        if holding:
            hold(decoder, torch.bfloat16)
        states = decoder(X, MASK)
        gradients = torch.autograd.grad(states.square().sum(), parameters)
        with joined(decoder):
            results.append([states, *gradients, out(decoder)])
            joins = decoder.layers[0].mlp.joined[0].weight, decoder.layers[0].mlp.gate_proj.base.weight
            assert (joins[0].data_ptr() == joins[1].data_ptr()) == holding
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_learners_steps_are_those_of_torchs_adamw_and_go_on_after_a_resume():
    ours, resumed = (lora.Learner(build(adapters=False)[0], 4, 8.0) for _ in range(2))
    trainable, noise = ours.optimizer.param_groups[0]["params"], torch.Generator().manual_seed(0)
    theirs = [p.detach().clone().requires_grad_() for p in trainable]
    peer = torch.optim.AdamW(theirs, weight_decay=0.0, fused=True)
    for step in range(6):
        if step == 3:
            resumed.restore({name: x.clone() for name, x in ours.tensors().items()})
            ours, trainable = resumed, resumed.optimizer.param_groups[0]["params"]
        for p, q in zip(trainable, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=noise)
        for optimizer in (ours.optimizer, peer):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
        assert all(map(torch.equal, trainable, theirs))


def test_learning_does_not_load_torchs_compiler():
    code = """if True:
        import sys, torch, lora
        from plumbing.machine import optimizer_step
        learner = lora.Learner(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}), 2, 4.0)
        learner.model["q_proj"](torch.ones(1, 4)).sum().backward()
        optimizer_step(learner.optimizer, 0.1, 1.0)
        assert learner.optimizer.steps[0] == 1 and "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lora.__file__).parent)


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
    peft_files.save_adapter(decoder, tmp_path)
    fresh, _ = build()
    assert not torch.equal(out(fresh), out(decoder))
    peft_files.load_adapter(fresh, tmp_path)
    assert torch.equal(out(fresh), out(decoder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("fault", ["prefix", "missing", "extra", "shape", "nothing", "twice"])
def test_an_adapter_that_does_not_fit_is_an_error_never_a_silent_zero(tmp_path, fault, adapted):
    decoder, trainable = build()
    learn(trainable)
    peft_files.save_adapter(decoder, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    if fault == "prefix":
        tensors = {k.removeprefix(peft_files.PREFIX): v for k, v in tensors.items()}
    elif fault == "extra":
        tensors["more"] = tensors[key].clone()
    elif fault == "nothing":
        tensors = {k.replace("layers", "blocks"): v for k, v in tensors.items()}
    elif fault == "twice":
        tensors[key.replace("model.model.", "model.")] = tensors[key].clone()
    else:
        tensor = tensors.pop(key)
        tensors |= {key: tensor[:1].clone()} if fault == "shape" else {}
    save_file(tensors, path)
    fresh, parameters = build(adapters=adapted)
    before = [p.clone() for p in parameters]
    with pytest.raises(peft_files.BadInput, match="has shape" if fault == "shape" else "names differ"):
        peft_files.load_adapter(fresh, tmp_path)
    assert len(lora.layers(fresh)) == len(before) / 2
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))  # nothing half loaded


def test_adapters_on_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing to adapt"):
        lora.add_adapters(build(adapters=False)[0], 4, 8.0, targets=("query",))


def test_llama_2_7b_has_159907840_trainable_parameters_at_r_64():
    sizes = dict(vocab_size=32000, dim=4096, num_heads=32, num_kv_heads=32, ffn_dim=11008)
    with torch.device("meta"):
        layer = Decoder(ModelConfig(num_layers=1, **sizes))
    assert 32 * sum(p.numel() for p in lora.add_adapters(layer, 64, 16.0)) == 159_907_840


# ---- PEFT reads our files and we read PEFT's ----

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True)
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(4))


def llama():
    """A LlamaForCausalLM of transformers with the weights of `build`'s decoder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.model.load_state_dict(build(adapters=False)[0].state_dict())
    return model


def logits(decoder):
    """(2, 6, V): our logits behind the tokens 2 .. 7 of IDS."""
    x = decoder.embed_tokens(IDS)
    with torch.no_grad():
        states = decoder(x[:, :3], MASK[:, :3], x[:, None, 3:])[:, 0]
    return states @ decoder.head.T


def their_logits(model):
    with torch.no_grad():
        return model(IDS).logits[:, 2:-1]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_our_adapter_and_gives_our_logits(tmp_path, rslora):
    theirs = llama()
    from peft import PeftModel

    decoder, _ = build(adapters=False)
    learn(lora.add_adapters(decoder, 4, 8.0, rslora=rslora))
    peft_files.save_adapter(decoder, tmp_path)
    start = their_logits(theirs)
    torch.testing.assert_close(start, logits(build(adapters=False)[0]), atol=1e-5, rtol=0)
    theirs = PeftModel.from_pretrained(theirs, tmp_path)
    assert all(p.abs().max() > 0 for name, p in theirs.named_parameters() if "lora_B" in name)
    torch.testing.assert_close(their_logits(theirs), logits(decoder), atol=1e-5, rtol=0)
    assert (their_logits(theirs) - start).abs().max() > 0.1
    merged = their_logits(theirs.merge_and_unload())
    lora.merge(decoder)
    torch.testing.assert_close(merged, logits(decoder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts_adapter_and_give_its_logits(tmp_path, rslora):
    theirs = llama()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    options = dict(r=3, lora_alpha=5, use_rslora=rslora, lora_dropout=0.1, task_type="CAUSAL_LM")
    some = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    theirs = get_peft_model(theirs, some).eval()
    theirs.save_pretrained(tmp_path)
    decoder, _ = build(adapters=False)
    start = logits(decoder)
    peft_files.load_adapter(decoder, tmp_path)
    trainable = [p for layer in lora.layers(decoder).values() for p in (layer.lora_A, layer.lora_B)]
    assert sorted({name.split(".")[-1] for name in lora.layers(decoder)}) == ["down_proj", "q_proj"]
    assert len(trainable) == 2 * 2 * CFG.num_layers and all(p.abs().max() > 0 for p in trainable)
    torch.testing.assert_close(logits(decoder), their_logits(theirs), atol=1e-5, rtol=0)
    assert (logits(decoder) - start).abs().max() > 0.1


def test_our_files_are_the_files_that_peft_writes_of_the_same_adapter(tmp_path):
    theirs = llama()
    from peft import LoraConfig, get_peft_model

    options = dict(r=4, lora_alpha=8, target_modules=list(lora.DECODER_LINEARS), task_type="CAUSAL_LM")
    get_peft_model(theirs, LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    peft_files.save_adapter(build()[0], tmp_path / "ours")
    ours, wanted = (peft_files.read_adapter(tmp_path / name) for name in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours[1].items()} == {k: v.shape for k, v in wanted[1].items()}
    assert ours[0].items() <= (wanted[0] | {"target_modules": sorted(wanted[0]["target_modules"])}).items()
    for name in ("ours", "theirs"):
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_an_adapter_of_a_llava_leaves_its_image_tower_alone(tmp_path):
    theirs = llama()
    from peft import PeftModel
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tower = CLIPVisionConfig(image_size=8, patch_size=4, **tower)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=theirs.config, image_token_id=39)
    ).eval()
    llava.model.language_model.load_state_dict(theirs.model.state_dict())
    llava.lm_head.weight = theirs.lm_head.weight
    decoder, trainable = build()
    learn(trainable)
    peft_files.save_adapter(decoder, tmp_path, path="model.language_model.")
    llava = PeftModel.from_pretrained(llava, tmp_path)
    adapted = {name for name, _ in llava.named_parameters() if "lora_B" in name}
    assert len(adapted) == 7 * CFG.num_layers and not any("vision" in name for name in adapted)
    ids = IDS.clamp(max=38)  # 39 is the image's placeholder
    with torch.no_grad():
        wanted, x = llava(ids).logits[:, 2:-1], decoder.embed_tokens(ids)
        ours = decoder(x[:, :3], MASK[:, :3], x[:, None, 3:])[:, 0] @ decoder.head.T
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    fresh, _ = build(adapters=False)
    peft_files.load_adapter(fresh, tmp_path)
    assert torch.equal(out(fresh), out(decoder))


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 8}}, {"peft_type": "IA3"}, {"r": 0},
     {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, change):
    peft_files.save_adapter(build()[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(peft_files.BadInput, match=next(iter(change))):
        peft_files.load_adapter(build(adapters=False)[0], tmp_path)


def test_files_that_are_missing_broken_or_pickled_are_named(tmp_path):
    decoder, _ = build(adapters=False)
    with pytest.raises(peft_files.BadInput, match="adapter_config.json"):
        peft_files.load_adapter(decoder, tmp_path)
    peft_files.save_adapter(build()[0], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(peft_files.BadInput, match="adapter_model.safetensors"):
        peft_files.load_adapter(decoder, tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(peft_files.BadInput, match="pickle"):
        peft_files.load_adapter(decoder, tmp_path)
    assert not lora.layers(decoder)


def test_an_adapter_of_another_scale_is_refused_not_rescaled(tmp_path):
    peft_files.save_adapter(build(alpha=16.0)[0], tmp_path)
    with pytest.raises(peft_files.BadInput, match="alpha 16"):
        peft_files.load_adapter(build(alpha=8.0)[0], tmp_path)


def test_off_is_the_start_also_when_a_later_policy_is_the_reference():
    decoder, trainable = build()
    start = out(decoder)
    learn(trainable)
    lora.freeze_reference(decoder)
    with lora.using(decoder, "off"):
        assert torch.equal(out(decoder), start)
    with lora.using(decoder, "reference"):
        assert not torch.equal(out(decoder), start)


def test_fresh_adapters_are_drawn_by_the_seed_evenly_around_zero():
    def drawn(seed):
        return lora.Learner(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(100, 7)}), 50, 4.0, seed)

    first, again, other = (drawn(seed).model["q_proj"] for seed in (1, 1, 2))
    assert first.lora_A.equal(again.lora_A) and not first.lora_A.equal(other.lora_A)
    assert first.lora_B.eq(0).all() and first.reference_A.equal(first.lora_A)
    low, high = first.lora_A.aminmax()  # kaiming uniform with a = sqrt(5): the bound is 1 / sqrt(in)
    assert -0.1 <= low < -0.099 and 0.099 < high <= 0.1 and first.lora_A.mean().abs() < 0.005


def test_a_resume_brings_the_frozen_reference_back_and_refuses_another_dtype():
    ours, resumed = (lora.Learner(build(adapters=False)[0], 4, 8.0, seed) for seed in (0, 1))
    learn(ours.optimizer.param_groups[0]["params"])
    lora.freeze_reference(ours.model)
    learn(ours.optimizer.param_groups[0]["params"], seed=3)
    stored = {name: x.clone() for name, x in ours.tensors().items()}
    resumed.restore(stored)
    for which in ("policy", "reference"):
        with lora.using(ours.model, which), lora.using(resumed.model, which):
            assert torch.equal(out(ours.model), out(resumed.model)), which
    name = next(iter(stored))
    with pytest.raises(ValueError, match="does not fit"):
        resumed.restore(stored | {name: stored[name].double()})


def test_a_gradient_longer_than_the_bound_is_scaled_to_it_and_a_shorter_one_stays():
    from plumbing.machine import optimizer_step

    for gradient, moved in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        p = torch.zeros(2, requires_grad=True)
        p.grad = torch.tensor(gradient)
        norm = optimizer_step(torch.optim.SGD([p], lr=9.0), 2.0, 1.0)
        torch.testing.assert_close(p.detach(), -2 * torch.tensor(moved), atol=1e-5, rtol=0)
        assert norm == pytest.approx(torch.tensor(gradient).norm().item()) and p.grad is None
