"""CLIP from scratch (Radford et al., arXiv:2103.00020): an image tower, a text tower, a contrastive loss.

Trained once by `pretrain.py` and frozen ever after. The video-language model reads patch tokens of a hidden
layer before the last (`layer=-2`, as LLaVA does): the last layer's patches serve only the class token.

Shape letters (grpo_rank.py): K frames, N patches of a frame. Here F_ is a number of frames or captions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of RGB in 0..1 that every public CLIP uses.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MOST_LAYERS = 1000  # a file that says more is damaged; building them would never end


@dataclass(frozen=True)
class ClipConfig:
    image_size: int = 48  # pixels, square
    patch_size: int = 8  # pixels, square: N = (image_size / patch_size) ** 2
    width: int = 96
    num_layers: int = 4
    num_heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 24  # tokens, the end token included
    vocab_size: int = 512
    embed_dim: int = 96  # of the space that both towers share; 0: the image tower alone (LLaVA)
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # quick_gelu: x * sigmoid(1.702 x) (OpenAI's weights)
    mlp_width: int = 0  # of the image tower's layers; 0: 4 * width
    text_mlp_width: int = 0  # 0: 4 * text_width

    def __post_init__(self):
        towers = [(self.width, self.num_heads), (self.text_width, self.text_heads)]
        for width, heads in towers[: 1 + bool(self.embed_dim)]:
            if width % heads:
                raise ValueError(f"a CLIP of width {width}, which is no multiple of its {heads} heads")
        if max(self.num_layers, self.text_layers) > MOST_LAYERS:
            raise ValueError(f"a CLIP of {self.num_layers} and {self.text_layers} layers")
        if self.patch_size > self.image_size:
            raise ValueError(f"CLIP's patch_size {self.patch_size} is above its image_size {self.image_size}")

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    def has_layer(self, layer: int) -> bool:
        """Whether `ImageTower.hidden` knows this layer."""
        return -self.num_layers - 1 <= layer <= self.num_layers


def preprocess(frames: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) RGB, already at the tower's size -> float32, normalised as CLIP's."""
    mean = torch.tensor(PIXEL_MEAN, device=frames.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=frames.device).view(3, 1, 1)
    return (frames.float() / 255 - mean) / std


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y):
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (F_, heads, L, width / heads)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, num_heads: int, causal: bool, activation: str, mlp_width: int = 0):
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.quick = activation == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, num_heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(self.layer_norm1(x)).add_(x)  # in place: new memory is costly
        y = self.fc1(self.layer_norm2(x))
        return self.fc2(y.mul_((1.702 * y).sigmoid_()) if self.quick else F.gelu(y)).add_(x)


class ImageTower(nn.Module):
    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * cfg.width**-0.5)
        self.position_embedding = nn.Parameter(torch.randn(1 + cfg.num_patches, cfg.width) * 0.1)
        self.pre_layernorm = nn.LayerNorm(cfg.width)
        sizes = dict(causal=False, activation=cfg.activation, mlp_width=cfg.mlp_width)
        self.layers = nn.ModuleList(Layer(cfg.width, cfg.num_heads, **sizes) for _ in range(cfg.num_layers))
        self.post_layernorm = nn.LayerNorm(cfg.width)
        if cfg.embed_dim:
            self.projection = nn.Linear(cfg.width, cfg.embed_dim, bias=False)

    def hidden(self, pixel_values: Tensor, layer: int) -> Tensor:
        """(F_, 3, H, W) -> (F_, 1 + N, width) after `layer` layers. A negative number counts from the end:
        -1 is the last layer's output, -2 that of the layer before it."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (F_, N, width)
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.pre_layernorm(torch.cat([cls, patches], dim=1) + self.position_embedding)
        for block in self.layers[: layer % (len(self.layers) + 1)]:
            x = block(x)
        return x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F_, 3, H, W) -> (F_, embed_dim), unit length."""
        x = self.post_layernorm(self.hidden(pixel_values, layer=-1)[:, 0])
        return F.normalize(self.projection(x).float(), dim=-1)


class TextTower(nn.Module):
    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.text_width)
        self.position_embedding = nn.Parameter(torch.randn(cfg.text_length, cfg.text_width) * 0.02)
        sizes = dict(causal=True, activation=cfg.activation, mlp_width=cfg.text_mlp_width)
        layers = (Layer(cfg.text_width, cfg.text_heads, **sizes) for _ in range(cfg.text_layers))
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(cfg.text_width)
        self.projection = nn.Linear(cfg.text_width, cfg.embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """input_ids (F_, L) right-padded, lengths (F_,) with the end token -> (F_, embed_dim), unit length.

        Causal attention, read at the end token: what is behind it cannot be seen.
        """
        x = self.token_embedding(input_ids) + self.position_embedding[: input_ids.shape[1]]
        for block in self.layers:
            x = block(x)
        x = self.final_layer_norm(x[torch.arange(len(x)), lengths - 1])
        return F.normalize(self.projection(x).float(), dim=-1)


class Clip(nn.Module):
    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.cfg = cfg
        self.vision_model = ImageTower(cfg)
        if cfg.embed_dim:
            self.text_model = TextTower(cfg)
            self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), CLIP's first temperature

    def patch_tokens(self, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """(F_, 3, H, W) normalised pixels -> (F_, N, width) patch tokens of a hidden layer."""
        return self.vision_model.hidden(pixel_values, layer)[:, 1:]

    def similarity(self, pixel_values: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """(F_, C) scaled cosine similarities, row = image, column = caption."""
        scale = self.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in the paper
        return scale * self.vision_model(pixel_values) @ self.text_model(input_ids, lengths).T


def contrastive_loss(similarity: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE. similarity (F_, C) of F_ images to C >= F_ captions: first their own, then hard
    negatives. `same` (F_, C) bool marks the captions that are right for an image; they share its target."""
    own, own_same = similarity[:, : len(similarity)], same[:, : len(same)]  # negatives have no image to find
    target, own_target = (s.float() / s.sum(dim=1, keepdim=True) for s in (same, own_same.T))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(own.T, own_target)) / 2
