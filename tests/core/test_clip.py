import math
from dataclasses import replace

import pytest
import torch

from clip import Clip, ClipConfig, Layer, contrastive_loss, preprocess

SIZES = dict(image_size=16, patch_size=8, width=32, num_layers=2, text_width=32, text_layers=1)
CFG = ClipConfig(**SIZES, text_length=6, vocab_size=40, embed_dim=16)


def build(cfg=CFG):
    torch.manual_seed(0)
    return Clip(cfg)


def pairs(n):
    generator = torch.Generator().manual_seed(1)
    captions = torch.randint(1, 40, (n, 6), generator=generator)
    lengths = torch.randint(2, 7, (n,), generator=generator)
    return torch.randn(n, 3, 16, 16, generator=generator), captions, lengths


def test_shapes_and_unit_length():
    clip, (pixels, captions, lengths) = build(), pairs(5)
    image, text = clip.vision_model(pixels), clip.text_model(captions, lengths)
    assert clip.patch_tokens(pixels).shape == (5, 4, 32) and image.shape == text.shape == (5, 16)
    for x in (image, text):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(5), atol=1e-5, rtol=0)
    similarity = clip.similarity(pixels, captions, lengths)
    torch.testing.assert_close(similarity[2, 3], image[2] @ text[3] / 0.07, atol=1e-3, rtol=0)
    clip.logit_scale.data.fill_(9.0)
    capped = clip.similarity(pixels, captions, lengths)
    torch.testing.assert_close(
        capped, similarity * 7, atol=0.01, rtol=0
    )  # scale at most 100, as in the paper


def test_preprocess_is_zscore_of_pixels_over_255():
    frames = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    # (0/255 - .48145466)/.26862954, (128/255 - .4578275)/.26130258, (255/255 - .40821073)/.27577711
    wanted = torch.tensor([-1.792263, 0.168889, 2.145897])
    torch.testing.assert_close(preprocess(frames).flatten(), wanted, atol=1e-5, rtol=0)


def test_text_tower_cannot_see_behind_the_end_token():
    clip, (_, captions, lengths) = build(), pairs(8)
    behind = torch.arange(6) >= lengths[:, None]
    text = clip.text_model(captions, lengths)
    assert torch.equal(clip.text_model(captions.masked_fill(behind, 7), lengths), text)
    start = captions.clone()
    start[:, 0] = 0
    changed = (clip.text_model(start, lengths) - text).abs().amax(dim=1)
    assert changed.min() > 1e-3  # it does see what is before


def test_hidden_layers_count_from_the_end_like_a_list():
    tower, pixels = build().vision_model, pairs(2)[0]
    first, second = tower.hidden(pixels, 1), tower.hidden(pixels, 2)
    torch.testing.assert_close(tower.hidden(pixels, -2), first)
    torch.testing.assert_close(tower.hidden(pixels, -1), second)
    torch.testing.assert_close(tower.layers[1](first), second)
    torch.testing.assert_close(tower.layers[0](tower.hidden(pixels, 0)), first)


def test_contrastive_loss_by_hand():
    similarity = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    # rows: log(1 + e^-2), log(1 + e^-2); columns: log(1 + e^-1), log(1 + e^-3)
    wanted = (2 * math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 4
    loss = contrastive_loss(similarity, torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(loss.item(), wanted, atol=1e-6, rtol=0)
    # a hard negative of score 1 joins each row's sum of exponentials, and no column: it has no image
    more = math.log1p(math.exp(-2) + math.exp(-1)) + math.log1p(2 * math.exp(-2))
    more -= 2 * math.log1p(math.exp(-2))
    harder = torch.cat([similarity, torch.ones(2, 1)], dim=1)
    loss = contrastive_loss(harder, torch.eye(2, 3, dtype=torch.bool))
    torch.testing.assert_close(loss.item(), wanted + more / 4, atol=1e-6, rtol=0)


def test_equal_captions_share_the_target():
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    similarity = torch.zeros(3, 3).requires_grad_()
    contrastive_loss(similarity, same).backward()
    assert similarity.grad[0, 0] == similarity.grad[0, 1] < 0 < similarity.grad[0, 2]  # both pulled alike
    best = torch.where(same, 20.0, -20.0)  # the two stay undecided: log 2 in 2 of 3 rows
    torch.testing.assert_close(contrastive_loss(best, same).item(), 2 / 3 * math.log(2), atol=1e-6, rtol=0)


def test_a_tiny_clip_learns_16_pairs_by_heart():
    clip, batch, same = build(), pairs(16), torch.eye(16, dtype=torch.bool)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = contrastive_loss(clip.similarity(*batch), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2 and losses[-1] < 0.1  # chance is log 16 = 2.77


def test_quick_gelu_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = Layer(32, 4, False, "quick_gelu")
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)  # gains of 1 and biases of 0 would hide an error
    x = torch.randn(3, 5, 32)

    def plain(x):
        x = x + layer.self_attn(layer.layer_norm1(x))
        y = layer.fc1(layer.layer_norm2(x))
        return x + layer.fc2(y * torch.sigmoid(1.702 * y))

    assert torch.equal(layer(x), plain(x))
    weights = list(layer.parameters())
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), weights) for f in (layer, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_image_tower_is_transformers_clip():
    transformers = pytest.importorskip("transformers")
    clip = build(replace(CFG, activation="quick_gelu"))
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=16, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    names = {
        "class_embedding": "embeddings.class_embedding", "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding.weight", "pre_layernorm": "pre_layrnorm",
        "layers": "encoder.layers", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    }  # fmt: skip
    weights = {"visual_projection.weight": clip.vision_model.projection.weight}
    for name, tensor in clip.vision_model.state_dict().items():
        if not name.startswith("projection"):
            weights["vision_model." + ".".join(names.get(part, part) for part in name.split("."))] = tensor
    theirs.load_state_dict(weights)
    pixels = pairs(3)[0]
    with torch.no_grad():
        wanted = theirs(pixels, output_hidden_states=True)
        patches = wanted.hidden_states[-2][:, 1:]
        torch.testing.assert_close(clip.patch_tokens(pixels), patches, atol=1e-5, rtol=1e-5)
        embeds = wanted.image_embeds / wanted.image_embeds.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(clip.vision_model(pixels), embeds, atol=1e-5, rtol=1e-5)


def test_the_text_tower_reads_the_end_token_itself():
    clip, (_, captions, lengths) = build(), pairs(8)
    text, rows = clip.text_model(captions, lengths), torch.arange(8)
    captions[rows, lengths - 1] = (captions[rows, lengths - 1] + 1) % 40
    assert (clip.text_model(captions, lengths) - text).abs().amax(dim=1).min() > 1e-3


def test_a_caption_finds_the_images_that_it_is_right_for_not_those_that_have_it():
    same = torch.tensor([[True, True], [False, True]])  # caption 1 is right for both images, 0 for the first
    similarity = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    rows = torch.nn.functional.cross_entropy(similarity, torch.tensor([[0.5, 0.5], [0, 1]]))
    columns = torch.nn.functional.cross_entropy(similarity.T, torch.tensor([[1, 0], [0.5, 0.5]]))
    torch.testing.assert_close(contrastive_loss(similarity, same), (rows + columns) / 2)
