"""Inference in PyTorch with models that xclip_jax trained or converted.

Needs PyTorch and safetensors, nothing of xclip_jax: copy this file into your project. It reads the
folder written by

    python -m xclip_jax.convert --to=safetensors --input=runs/demo --output=exported

and computes the same numbers as xclip_jax, in float32. For example, with transformers' tokenizers:

    import torch
    from transformers import AutoTokenizer
    from xclip_torch import XClip

    model, tokenizer = XClip.load("exported"), AutoTokenizer.from_pretrained("exported/tokenizer")
    c, side = model.config, model.config.vision.image_size
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    batch = tokenizer(["a red dog", "a blue cat"], max_length=c.max_words, **options)
    mask = batch["attention_mask"]
    pixels = torch.randint(256, (3, c.max_frames, side, side, 3), dtype=torch.uint8)  # 3 videos
    real = torch.arange(c.max_frames) < torch.tensor([[1], [2], [c.max_frames]])  # their frames
    with torch.inference_mode():
        text = model.encode_text(batch["input_ids"] * mask, mask)
        video = model.encode_video(pixels, real)
        print(model.similarity(text, video).shape)  # torch.Size([2, 3]): texts x videos

In masks, True or 1 is a real token or frame. docs/pytorch.md of xclip_jax has the names of tensors.
Letters of shapes: T texts, V videos, W words, F frames, S side of a frame, D width of the joint
embedding space; of a Transformer B items, L positions, E width, N heads.
"""

import json
from pathlib import Path
from types import SimpleNamespace as Config
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Maybe = Tensor | None
ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
# All fields of model.json by section, with the values that are implemented where a field names a
# choice. Others are refused: what is added to xclip_jax must be added here, too. Without effect are
# preset, which other fields spell out, dtype, param_dtype, remat and how frames are resized.
NAMES = "|".join(ACTIVATIONS)
BLOCK = f"width layers heads mlp_width epsilon activation=None|{NAMES} gated inner_norms"
FIELDS = {
    "": f"""head=xclip|mean_pooling|seq_lstm|seq_transformer|tight_transformer activation={NAMES}
        embed_dim towers=both|vision|text max_scale max_words max_frames tau tau_learned logit_bias
        granularities=video_sentence|video_word|frame_sentence|frame_word
        aggregation=attention|max-max|mean-mean|mean-max|max-mean|weighted|maxsim
        fusion=mean|transformer frame_features=temporal|clip words=word_tokens|all_tokens
        padding=masked|competes matrices preset dtype param_dtype remat vision text temporal
        preprocess""",
    "vision": f"""{BLOCK} image_size patch_size uncovered class_token patch_bias pre_norm
        pool=class_token|attention pool_heads pool_mlp_width projection=none|linear|bias
        rotary=none|rows_first|columns_first rotary_grid position_resize""",
    "text": f"""{BLOCK} vocab_size context_length causal start_token end_id
        pool=argmax|end|last projection=linear|bias""",
    "temporal": "type=none|transformer|lstm layers heads residual",
    "preprocess": "mean std image_size resize interpolation",
}
MATRICES = {  # the learned matrices of the release for each granularity
    "video_sentence": "global_mat_weight",
    "video_word": "word_logit_weight",
    "frame_sentence": "frame_logit_weight",
    "frame_word": "local_mat_weight word_mat_weight word_mat_weight2 frame_mat_weight "
    "frame_mat_weight2",
}


def read_config(path: Path) -> Config:
    """Reads model.json, or raises ValueError for a field or value that is not implemented."""
    model = json.loads(path.read_text("utf-8"))
    for section, names in FIELDS.items():
        known = dict(name.partition("=")[::2] for name in names.split())
        fields = model[section] if section else model
        if unknown := fields.keys() ^ known.keys():
            names = f"{section} {', '.join(sorted(unknown))}".strip()
            raise ValueError(f"{path}: {names}: missing, or unknown to this xclip_torch.py")
        for name in filter(known.get, known):
            values = fields[name] if isinstance(fields[name], list) else [fields[name]]
            if not set(map(str, values)) <= set(known[name].split("|")):
                raise ValueError(f"{path}: {section} {name} = {values}: must be {known[name]}")
    # The blocks of the temporal encoder, and of Transformers over pairs, are plain ones.
    model["temporal"] |= dict.fromkeys(("activation", "mlp_width", "gated", "inner_norms"))
    model["temporal"] |= {"width": model["embed_dim"], "epsilon": model["text"]["epsilon"]}
    for name in ("vision", "text", "temporal"):
        model[name]["activation"] = model[name]["activation"] or model["activation"]
    return Config(**model | {name: Config(**model[name]) for name in FIELDS if name})


def empty(*shape: int) -> nn.Parameter:
    """Returns a parameter that the file of weights will fill."""
    return nn.Parameter(torch.empty(shape))


def norm(c: Config, width: int = 0, exists: bool = True) -> nn.Module:
    """Returns a layer norm, or a module without effect."""
    return nn.LayerNorm(width or c.width, c.epsilon) if exists else nn.Identity()


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


class Attention(nn.Module):
    """Multi-head attention of B x L x E vectors `x` to vectors `y`."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.out_proj = c.heads, nn.Linear(c.width, c.width)
        self.in_proj_weight, self.in_proj_bias = empty(3 * c.width, c.width), empty(3 * c.width)
        self.ln = norm(c, exists=c.inner_norms)

    def forward(self, x: Tensor, y: Tensor, mask: Maybe = None, angles: Maybe = None) -> Tensor:
        thirds = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = map(F.linear, (x, y, y), *thirds)
        query, key, value = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        y = F.scaled_dot_product_attention(query, key, value, mask)
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


class VisionTower(nn.Module):
    """Vision Transformer of B x S x S x 3 normalised images."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = config.vision, config.embed_dim
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=c.patch_bias)
        self.class_embedding = empty(c.width) if c.class_token else None
        count = (c.image_size // c.patch_size) ** 2 + c.class_token
        self.positional_embedding = empty(count, c.width)
        self.ln_pre, self.ln_post = norm(c, exists=c.pre_norm), norm(c)
        self.transformer = Transformer(c)
        self.attn_pool = None
        if c.pool == "attention":  # of one learned query, then an MLP (SigLIP, PE)
            heads, hidden = c.pool_heads or c.heads, c.pool_mlp_width or c.mlp_width
            plain = {"heads": heads, "mlp_width": hidden, "gated": False, "inner_norms": False}
            p = Config(**vars(c) | plain)
            parts = {"attn": Attention(p), "layernorm": norm(p), "mlp": MLP(p)}
            self.attn_pool = nn.ModuleDict(parts)
            self.attn_pool.probe = empty(1, 1, c.width)
        self.proj = None if c.projection == "none" else empty(c.width, dim)
        self.proj_bias = empty(dim) if c.projection == "bias" else None
        angles = None if c.rotary == "none" else rotary_angles(c)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.ln_post(self.transformer(x, angles=self.angles))
        if pool := self.attn_pool:
            y = pool["attn"](pool.probe.expand(len(x), -1, -1), x)[:, 0]
            x = y + pool["mlp"](pool["layernorm"](y))
        else:
            x = x[:, 0]
        return x if self.proj is None else F.linear(x, self.proj.T, self.proj_bias)


class CLIP(nn.Module):
    """The logit scale, the image tower `visual` and the text tower, called with T x W ids."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = config.text, config.embed_dim
        self.logit_scale, self.causal = empty(), c.causal
        if config.towers != "text":
            self.visual = VisionTower(config)
        if config.towers != "vision":
            self.token_embedding = nn.Embedding(c.vocab_size, c.width)
            self.positional_embedding = empty(c.context_length, c.width)
            self.transformer, self.ln_final = Transformer(c), norm(c)
            self.text_projection = empty(c.width, dim)
            self.text_projection_bias = empty(dim) if c.projection == "bias" else None

    def forward(self, ids: Tensor) -> Tensor:
        x, count = self.token_embedding(ids), ids.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool, device=x.device)
        mask = mask.tril() if self.causal else mask
        x = self.transformer(x + self.positional_embedding[:count], mask)
        return F.linear(self.ln_final(x), self.text_projection.T, self.text_projection_bias)


class Features(NamedTuple):
    """Features of B texts or videos, L2-normalised except under the head tight_transformer."""

    whole: Tensor  # B x D, of the sentence or the video
    parts: Tensor  # B x L x D, of the words or the frames
    mask: Tensor  # B x L, True from the start to the end token, or at the real frames
    weights: Maybe = None  # T x 1 x W or 1 x V x F logits, of the aggregation weighted


class PairTransformer(nn.Module):
    """A Transformer over the vectors of each pair: the tight head, or the fusion."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, self.is_tight = config.embed_dim, config.fusion == "mean"
        count = max(config.text.context_length, config.max_frames + 1) if self.is_tight else 4
        self.name = "position_embeddings" if self.is_tight else "token_type_embeddings"
        self.embeddings = nn.ModuleDict({self.name: nn.Embedding(count, dim)})
        self.transformer = Transformer(config.temporal)
        self.pooler = nn.ModuleDict({"ln_pool": nn.LayerNorm(dim)})
        if self.is_tight:
            self.pooler["dense"] = nn.Linear(dim, dim)

    def forward(self, text: Features, video: Features, words: Tensor, frames: Tensor) -> Tensor:
        """Returns T x V x D vectors. Only words and frames where these masks are True take part."""
        parts = [text.whole[:, None, None], text.parts[:, None]]
        parts += [video.whole[None, :, None], video.parts[None]]
        always, shape = words.new_ones(1, 1, 1), (len(words), len(frames), -1)
        masks = [always, words[:, None], always, frames[None]]
        table = self.embeddings[self.name].weight
        if self.is_tight:  # positions of the sentence and of the frames
            parts = [parts[0] + table[0], parts[3] + table[1 : frames.shape[1] + 1]]
            masks = [always, video.mask[None]]
        else:
            parts = [part + row for part, row in zip(parts, table, strict=True)]
        x = torch.cat([part.expand(*shape, -1) for part in parts], 2).flatten(0, 1)
        mask = torch.cat([mask.expand(shape) for mask in masks], 2).flatten(0, 1)
        x = self.pooler["ln_pool"](self.transformer(x, mask[:, None, None])[:, 0])
        if self.is_tight:
            x = ACTIVATIONS["quick_gelu"](self.pooler["dense"](x))
        return x.unflatten(0, shape[:2])


def check_shape(x: Tensor, mask: Tensor, limit: int, fixed: bool, rest: tuple = ()) -> None:
    """Raises ValueError if words or frames have another shape, or are too many or not padded."""
    if x.shape != (*mask.shape, *rest) or not limit * fixed <= mask.shape[1] <= limit:
        needed = f"B x {'' if fixed else 'at most '}{limit}{''.join(f' x {n}' for n in rest)}"
        raise ValueError(f"shape {tuple(x.shape)}, mask {tuple(mask.shape)}: must be {needed}")


class XClip(nn.Module):
    """X-CLIP (https://arxiv.org/abs/2207.07285) or a baseline, as model.json describes it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = config, config.embed_dim
        self.config, self.clip = c, CLIP(c)
        if c.temporal.type == "transformer":
            positions = max(c.text.context_length, c.max_frames)
            self.frame_position_embeddings = nn.Embedding(positions, dim)
            self.transformerClip = Transformer(c.temporal)
        elif c.temporal.type == "lstm":
            self.lstm_visual = nn.LSTM(dim, dim, batch_first=True)
        for name in ("text_weight_fc", "video_weight_fc") if c.aggregation == "weighted" else ():
            layers = nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1), nn.Flatten(-2)
            self.add_module(name, nn.Sequential(*layers))
        self.log_tau = empty() if c.tau_learned else None
        self.logit_bias = empty() if c.logit_bias else None
        self.has_pairs = c.fusion == "transformer" or c.head == "tight_transformer"
        if self.has_pairs:
            self.cross, self.similarity_dense = PairTransformer(c), nn.Linear(dim, 1)
        sizes = {"word": c.max_words, "frame": c.max_frames, "global": dim, "local": dim}
        for granularity, names in MATRICES.items():
            learned = c.matrices and not self.has_pairs and granularity in c.granularities
            for name in names.split():
                size = sizes[name.partition("_")[0]]
                self.register_parameter(name, empty(size, size) if learned else None)

    @classmethod
    def load(cls, folder: str | Path) -> "XClip":
        """Reads model.json and model.safetensors, whose tensors must be exactly the model's."""
        model = cls(read_config(Path(folder, "model.json")))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=True)
        return model.eval()

    def encode_text(self, ids: Tensor, mask: Tensor) -> Features:
        """Encodes T x W token ids, padded as by the tokenizer of xclip_jax."""
        c, mask = self.config, mask.bool()
        check_shape(ids, mask, c.max_words, c.padding == "competes" or not c.text.causal)
        words, kind = self.clip(ids), c.text.pool
        weights = self.text_weight_fc(words)[:, None] if c.aggregation == "weighted" else None
        words = words if c.head == "tight_transformer" else F.normalize(words, dim=-1)
        place = (ids if kind == "argmax" else (ids == c.text.end_id).int()).argmax(1)
        place = torch.full_like(place, ids.shape[1] - 1) if kind == "last" else place
        return Features(words[torch.arange(len(ids)), place], words, mask, weights)

    def encode_video(self, frames: Tensor, mask: Tensor) -> Features:
        """Encodes V x F x S x S x 3 RGB: raw uint8, or floats that are already normalised."""
        c, mask, side = self.config, mask.bool(), self.config.vision.image_size
        check_shape(frames, mask, c.max_frames, c.padding == "competes", (side, side, 3))
        real = mask[..., None]
        if frames.dtype == torch.uint8:
            mean, std = frames.new_tensor([c.preprocess.mean, c.preprocess.std], dtype=torch.float)
            frames = (frames / 255 - mean) / std
        elif not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: must be uint8 or normalised floats")
        frames = frames.masked_fill(~real[..., None, None], 0)
        clip = self.clip.visual(frames.flatten(0, 1)).unflatten(0, mask.shape)
        if c.head == "tight_transformer":
            mean = (clip * real).sum(1) / real.sum(1).clamp(min=1)
            return Features(mean, clip, mask)
        related = clip  # Eq. 1
        if c.temporal.type == "lstm":
            related = self.lstm_visual(clip)[0] * real
        elif c.temporal.type == "transformer":
            x = clip + self.frame_position_embeddings.weight[: clip.shape[1]]
            bias = (~mask[:, None, None]).float() * -1e30  # uniform attention if none is real
            related = self.transformerClip(x, bias)
        if c.temporal.type != "none" and c.temporal.residual:
            related = related + clip
        video = F.normalize((F.normalize(related, dim=-1) * real).sum(1), dim=-1)  # Eq. 2
        compared = clip if c.frame_features == "clip" else related
        weights = self.video_weight_fc(compared)[None] if c.aggregation == "weighted" else None
        return Features(video, F.normalize(compared, dim=-1), mask, weights)

    def similarity(self, text: Features, video: Features) -> Tensor:
        """Returns T x V logits. Needs memory for T x V x W x F numbers: pass parts of many."""
        c, words, frames = self.config, text.mask, video.mask
        if c.words == "word_tokens":
            words = words & F.pad(words[:, 1:], (0, 1), value=False)  # not the end token
            words[:, : int(c.text.start_token)] = False
        if c.padding == "competes":
            words, frames = words | ~text.mask, torch.ones_like(frames)
        if self.has_pairs:
            logits = self.similarity_dense(self.cross(text, video, words, frames))[..., 0]
        else:
            similarities = self.compare(text, video, words, frames)
            scale = self.clip.logit_scale.exp().clamp(max=c.max_scale or torch.inf)
            logits = scale * sum(similarities) / len(similarities)  # Eq. 14
        return logits if self.logit_bias is None else logits + self.logit_bias

    def compare(self, text: Features, video: Features, words: Tensor, frames: Tensor) -> list:
        """Returns T x V similarities, not scaled, of each granularity (Eq. 3-13)."""
        names, kind, parts = self.config.granularities, self.config.aggregation, []
        operations = {"weighted": "weighted-max", "maxsim": "mean-max"}.get(kind, kind).split("-")
        outer, inner = operations[0], operations[-1]
        words, frames = words[:, None], frames[None]  # T x 1 x W, 1 x V x F
        a, b = text.weights, video.weights
        if "video_sentence" in names:
            parts.append(self.transform(text.whole, "global_mat_weight") @ video.whole.T)
        if "video_word" in names:
            scores = torch.einsum("twd,vd->tvw", text.parts, video.whole)
            parts.append(self.reduce(scores, words, outer, "word_logit_weight", a))
        if "frame_sentence" in names:
            scores = torch.einsum("td,vfd->tvf", text.whole, video.parts)
            over_frames = "max" if kind == "maxsim" else outer
            parts.append(self.reduce(scores, frames, over_frames, "frame_logit_weight", b))
        if "frame_word" in names:
            moved = self.transform(text.parts, "local_mat_weight")
            cells = torch.einsum("twd,vfd->tvwf", moved, video.parts)
            by_word = self.reduce(cells, frames[:, :, None], inner, "frame_mat_weight")
            parts.append(self.reduce(by_word, words, outer, "word_mat_weight2", a))
            if kind != "maxsim":
                by_frame = self.reduce(cells.mT, words[:, :, None], inner, "word_mat_weight")
                other = self.reduce(by_frame, frames, outer, "frame_mat_weight2", b)
                parts[-1] = (parts[-1] + other) / 2
        return parts

    def transform(self, x: Tensor, name: str) -> Tensor:
        """Multiplies vectors by a learned matrix, if the model has it."""
        matrix = getattr(self, name)
        return x if matrix is None else x @ matrix

    def reduce(self, x: Tensor, mask: Tensor, how: str, name: str, logits: Maybe = None) -> Tensor:
        """Reduces the last axis where `mask` is True (Eq. 7, 8), to 0 where it never is."""
        if how == "max":
            return x.masked_fill(~mask, -1e9).amax(-1) * mask.any(-1)
        if how == "mean":
            return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        tau = self.config.tau if self.log_tau is None else self.log_tau.exp()
        logits, tau = (x, tau) if how == "attention" else (logits, 1.0)
        logits = logits.masked_fill(~mask, -1e9)
        weights = ((logits - logits.amax(-1, keepdim=True)) / tau).softmax(-1) * mask
        return (self.transform(weights, name) * mask * x).sum(-1)
