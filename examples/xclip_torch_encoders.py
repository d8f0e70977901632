"""The image, video and text encoders of xclip_torch.py, which imports them.

In masks, True is a real token or frame. Letters of shapes: T texts, V videos, W words, F frames,
S side of a frame, D width of the joint embedding space; of a Transformer B items, L positions,
E width, N heads, K width of a head.
"""

import math
from types import SimpleNamespace as Config

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maybe = Tensor | None
ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def empty(*shape: int) -> nn.Parameter:
    """Returns a parameter that the file of weights will fill."""
    return nn.Parameter(torch.empty(shape))


def norm(c: Config, width: int = 0, exists: bool = True) -> nn.Module:
    """Returns a layer norm, or a module without effect."""
    return nn.LayerNorm(width or c.width, c.epsilon) if exists else nn.Identity()


def plain(c: Config, **fields: int) -> Config:
    """Returns the config of a pool: that of the blocks without their options, with `fields`."""
    return Config(**vars(c) | {"gated": False, "inner_norms": False, "logit_cap": 0.0} | fields)


def rotary_angles(c: Config) -> Tensor:
    """Returns L x H angles of a grid of patches: a half for columns, the other for rows."""
    grid, count = c.image_size // c.patch_size, c.width // c.heads // 4
    start = int(c.rotary == "columns_first" and c.class_token)
    places = (torch.arange(grid).double() + start) * (c.rotary_grid / grid if c.rotary_grid else 1)
    parts = [places.repeat_interleave(grid), places.repeat(grid)]
    parts = parts[::-1] if c.rotary == "columns_first" else parts
    frequencies = 10000 ** (-torch.arange(count).double() / count)
    angles = torch.cat([part[:, None] * frequencies for part in parts], 1)
    return F.pad(angles, (0, 0, int(c.class_token), 0)).float()  # 0 for the class token


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates pairs of adjacent values of B x N x L x 2H by L x H angles."""
    first, second, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Maybe, cap: float) -> Tensor:
    """Returns the attention of B x N x L x K queries, with logits cap tanh(x / cap) if cap > 0.

    They attend to the positions where `mask` is True, or to all equally where it never is.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min / 2)
    if not cap:
        return F.scaled_dot_product_attention(query, key, value, bias)
    logits = cap * (query @ key.mT * (query.shape[-1] ** -0.5 / cap)).tanh()
    logits = logits if bias is None else logits + bias
    return logits.softmax(-1) @ value


class Attention(nn.Module):
    """Multi-head attention of B x L x E vectors `x` to vectors `y`.

    `inner` is the width of all heads together, by default E.
    """

    def __init__(self, c: Config, inner: int = 0) -> None:
        super().__init__()
        inner = inner or c.width
        self.heads, self.cap, self.out_proj = c.heads, c.logit_cap, nn.Linear(inner, c.width)
        self.in_proj_weight, self.in_proj_bias = empty(3 * inner, c.width), empty(3 * inner)
        self.ln = norm(c, exists=c.inner_norms)

    def forward(
        self, x: Tensor, y: Tensor, mask: Maybe = None, angles: Maybe = None, scale: Maybe = None
    ) -> Tensor:
        thirds = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = map(F.linear, (x, y, y), *thirds)
        query, key, value = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        query = query if scale is None else query * scale
        y = attend(query, key, value, mask, self.cap)
        return self.out_proj(self.ln(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """The MLP of a block, gated or not."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        hidden, self.activate = c.mlp_width or 4 * c.width, ACTIVATIONS[c.activation]
        self.c_fc, self.c_proj = nn.Linear(c.width, hidden), nn.Linear(hidden, c.width)
        self.gate = nn.Linear(c.width, hidden) if c.gated else None
        self.ln = norm(c, hidden, exists=c.inner_norms)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_fc(x)
        y = self.activate(self.gate(x)) * y if self.gate else self.activate(y)
        return self.c_proj(self.ln(y))


class Transformer(nn.Module):
    """Pre-norm blocks, without a norm after the last."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(c.layers):
            parts = {"ln_1": norm(c), "attn": Attention(c), "ln_2": norm(c), "mlp": MLP(c)}
            self.resblocks.append(nn.ModuleDict(parts))

    def forward(self, x: Tensor, mask: Maybe = None, angles: Maybe = None) -> Tensor:
        for block in self.resblocks:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, mask, angles)
            x = x + block["mlp"](block["ln_2"](x))
        return x


class PatchEncoder(nn.Module):
    """The layers of B x S x S x 3 normalised images that image and video towers share."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.vision
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=c.patch_bias)
        self.class_embedding = empty(c.width) if c.class_token else None
        count = (c.image_size // c.patch_size) ** 2 + c.class_token
        self.positional_embedding = empty(count, c.width)
        self.ln_pre, self.ln_post = norm(c, exists=c.pre_norm), norm(c)
        self.transformer = Transformer(c)
        angles = None if c.rotary == "none" else rotary_angles(c)
        self.register_buffer("angles", angles, persistent=False)

    def encode_patches(self, images: Tensor) -> Tensor:
        """Returns B x L x E vectors of the class token, if any, and every patch."""
        x = self.conv1(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        return self.ln_post(self.transformer(x, angles=self.angles))


class VisionTower(PatchEncoder):
    """Vision Transformer, to a vector of each image."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, dim = config.vision, config.embed_dim
        self.attn_pool = None
        if c.pool == "attention":  # of one learned query, then an MLP (SigLIP, PE)
            p = plain(c, heads=c.pool_heads or c.heads, mlp_width=c.pool_mlp_width or c.mlp_width)
            parts = {"attn": Attention(p), "layernorm": norm(p), "mlp": MLP(p)}
            self.attn_pool = nn.ModuleDict(parts)
            self.attn_pool.probe = empty(1, 1, c.width)
        self.proj = None if c.projection == "none" else empty(c.width, dim)
        self.proj_bias = empty(dim) if c.projection == "bias" else None

    def forward(self, images: Tensor) -> Tensor:
        x = self.encode_patches(images)
        if pool := self.attn_pool:
            y = pool["attn"](pool.probe.expand(len(x), -1, -1), x)[:, 0]
            x = y + pool["mlp"](pool["layernorm"](y))
        else:
            x = x[:, 0]
        return x if self.proj is None else F.linear(x, self.proj.T, self.proj_bias)


class VideoTower(PatchEncoder):
    """VideoPrism's encoder (https://arxiv.org/abs/2402.13217) of V x F x S x S x 3 frames.

    Its first blocks see each frame alone, `temporal` the frames at each patch's place, `joint` all
    patches of all frames. Only frames where the V x F mask is True take part.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config.vision
        self.frame_positional_embedding = empty(c.num_frames, c.width)
        self.temporal = Transformer(Config(**vars(c) | {"layers": c.temporal_layers}))
        self.joint = Transformer(Config(**vars(c) | {"layers": c.joint_layers}))
        self.ln_temporal = norm(c)
        parts = {"attn": Attention(plain(c), 4 * c.width), "layernorm": norm(c)}
        self.attn_pool = nn.ModuleDict(parts)
        self.attn_pool.probe = empty(1, 1, c.width)
        self.attn_pool.scale = empty(4 * c.width // c.heads)

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns V x D vectors of the videos and V x F x D vectors of their frames."""
        x = self.encode_patches(frames.flatten(0, 1)).unflatten(0, mask.shape)
        positions, (_, count, patches, width) = self.frame_positional_embedding, x.shape
        if count != len(positions):
            size = {"size": (count, width), "mode": "bilinear", "antialias": True}
            positions = F.interpolate(positions[None, None], **size)[0, 0]
        x = (x + positions[:, None]).transpose(1, 2).flatten(0, 1)  # V L x F x E
        x = self.ln_temporal(self.temporal(x, mask.repeat_interleave(patches, 0)[:, None, None]))
        x = x.unflatten(0, (-1, patches)).transpose(1, 2).flatten(1, 2)  # V x F L x E
        mask = mask.repeat_interleave(patches, 1)[:, None, None]
        x = self.joint(x, mask)
        pooled = self.pool(x.unflatten(1, (count, patches)).flatten(0, 1))
        return self.pool(x, mask), pooled.unflatten(0, (-1, count))

    def pool(self, x: Tensor, mask: Maybe = None) -> Tensor:
        """Returns the attention of one learned query, each of whose dimensions has a scale."""
        pool = self.attn_pool
        probe, scale = pool.probe.expand(len(x), -1, -1), F.softplus(pool.scale) / math.log(2)
        return pool["layernorm"](pool["attn"](probe, x, mask, scale=scale)[:, 0])


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Returns L x E sines, then cosines, of positions times frequencies from 1 to 1 / 10000."""
    frequencies = torch.logspace(0, -4, width // 2, dtype=torch.double)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class CLIP(nn.Module):
    """The logit scale, the tower `visual` and the text tower, which is called."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = config.text, config.embed_dim
        self.logit_scale, has_token = empty(), c.pool == "class_token"
        self.causal = c.causal or has_token
        if config.towers != "text":
            self.visual = (VideoTower if config.vision.num_frames else VisionTower)(config)
        if config.towers != "vision":
            self.token_embedding = nn.Embedding(c.vocab_size, c.width)
            self.class_embedding = empty(c.width) if has_token else None
            self.positional_embedding = None if has_token else empty(c.context_length, c.width)
            self.transformer, self.ln_final = Transformer(c), norm(c)
            self.text_projection = None if c.projection == "none" else empty(c.width, dim)
            self.text_projection_bias = empty(dim) if c.projection == "bias" else None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the vectors of T x W ids, and of a class token after them (VideoPrism)."""
        x, count = self.token_embedding(ids), ids.shape[1]
        if self.class_embedding is None:
            x, mask = x + self.positional_embedding[:count], torch.ones_like(mask)
        else:
            width = x.shape[2]
            x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], 1) * width**0.5
            x = x + F.pad(sinusoidal_positions(count, width), (0, 0, 0, 1)).to(x)
            mask = F.pad(mask, (0, 1), value=True)
        mask = mask[:, None, None].expand(-1, -1, x.shape[1], -1)
        x = self.ln_final(self.transformer(x, mask.tril() if self.causal else mask))
        project = self.text_projection
        return x if project is None else F.linear(x, project.T, self.text_projection_bias)
