"""Inference in PyTorch with models that xclip_jax trained or converted.

Needs PyTorch and safetensors, nothing of xclip_jax: copy this file into your project. It reads the
folder written by

    python -m xclip_jax.convert --to=safetensors --input=runs/demo --output=exported

and computes the same numbers as xclip_jax, in float32. For example, with transformers' tokenizers:

    import torch
    from transformers import AutoTokenizer
    from xclip_torch import XClip

    model = XClip.load("exported")
    c, side = model.config, model.config.vision.image_size
    tokenizer = AutoTokenizer.from_pretrained("exported/tokenizer")
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
embedding space; B items, L positions, E width and N heads of a Transformer.
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
BLOCK = "width layers heads mlp_width epsilon activation gated inner_norms"
FIELDS = {
    "": """head=xclip|mean_pooling|seq_lstm|seq_transformer|tight_transformer towers=both|vision|text
        embed_dim activation max_scale max_words max_frames tau tau_learned logit_bias matrices
        granularities=video_sentence|video_word|frame_sentence|frame_word
        aggregation=attention|max-max|mean-mean|mean-max|max-mean|weighted|maxsim
        fusion=mean|transformer frame_features=temporal|clip words=word_tokens|all_tokens
        padding=masked|competes preset dtype param_dtype remat vision text temporal preprocess""",
    "vision": f"""{BLOCK} image_size patch_size uncovered class_token patch_bias pre_norm
        pool=class_token|attention pool_heads pool_mlp_width projection=none|linear|bias
        rotary=none|rows_first|columns_first rotary_grid position_resize""",
    "text": f"""{BLOCK} vocab_size context_length causal start_token end_id
        pool=argmax|end|last projection=linear|bias""",
    "temporal": "type=none|transformer|lstm layers heads residual",
    "preprocess": "mean std image_size resize interpolation",
}
MATRICES = {  # learned matrices of the release: the granularity and the field of their size
    "global_mat_weight": ("video_sentence", "embed_dim"),
    "word_logit_weight": ("video_word", "max_words"),
    "frame_logit_weight": ("frame_sentence", "max_frames"),
    "local_mat_weight": ("frame_word", "embed_dim"),
    **dict.fromkeys(("word_mat_weight", "word_mat_weight2"), ("frame_word", "max_words")),
    **dict.fromkeys(("frame_mat_weight", "frame_mat_weight2"), ("frame_word", "max_frames")),
}


def read_config(path: Path) -> Config:
    """Reads model.json, or raises ValueError for a field or value that is not implemented."""
    model = json.loads(path.read_text("utf-8"))
    for section, names in FIELDS.items():
        known = dict(name.partition("=")[::2] for name in names.split())
        fields = model[section] if section else model
        if unknown := fields.keys() ^ known.keys():
            raise ValueError(f"{path}: {section} has unknown fields or lacks some: {unknown}")
        for name in filter(known.get, known):
            values = fields[name] if isinstance(fields[name], list) else [fields[name]]
            if not set(values) <= set(known[name].split("|")):
                raise ValueError(f"{path}: {section} {name} = {values}: must be {known[name]}")
    return Config(**model | {name: Config(**model[name]) for name in FIELDS if name})


def blocks(config: Config, part: str) -> Config:
    """Returns the fields of the blocks of "vision", "text" or "temporal"."""
    c = {"width": config.embed_dim, "mlp_width": 0, "epsilon": config.text.epsilon}
    c |= {"activation": None, "gated": False, "inner_norms": False} | vars(getattr(config, part))
    return Config(**c | {"activation": c["activation"] or config.activation})


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
    """Multi-head attention of B x L x E vectors to others."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.out_proj = c.heads, nn.Linear(c.width, c.width)
        self.in_proj_weight, self.in_proj_bias = empty(3 * c.width, c.width), empty(3 * c.width)
        self.ln = norm(c, exists=c.inner_norms)

    def forward(self, x: Tensor, others: Tensor, mask: Maybe, angles: Maybe) -> Tensor:
        thirds = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = map(F.linear, (x, others, others), *thirds)
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
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


class AttentionPool(nn.Module):
    """Pooling by the attention of one learned query, then an MLP (SigLIP, PE)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        plain = {"heads": c.pool_heads or c.heads, "mlp_width": c.pool_mlp_width or c.mlp_width}
        c = Config(**vars(c) | plain | {"gated": False, "inner_norms": False})
        self.probe, self.layernorm = empty(1, 1, c.width), norm(c)
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.probe.expand(len(x), -1, -1), x, None, None)[:, 0]
        return y + self.mlp(self.layernorm(y))


class VisionTower(nn.Module):
    """Vision Transformer of B x S x S x 3 normalised images."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = blocks(config, "vision"), config.embed_dim
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=c.patch_bias)
        self.class_embedding = empty(c.width) if c.class_token else None
        count = (c.image_size // c.patch_size) ** 2 + c.class_token
        self.positional_embedding = empty(count, c.width)
        self.ln_pre, self.ln_post = norm(c, exists=c.pre_norm), norm(c)
        self.transformer = Transformer(c)
        self.attn_pool = AttentionPool(c) if c.pool == "attention" else None
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
        x = self.attn_pool(x) if self.attn_pool else x[:, 0]
        return x if self.proj is None else F.linear(x, self.proj.T, self.proj_bias)


class CLIP(nn.Module):
    """The image tower, the parts of the text tower, or both, and the logit scale."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = blocks(config, "text"), config.embed_dim
        self.logit_scale, self.causal = empty(), c.causal
        if config.towers != "text":
            self.visual = VisionTower(config)
        if config.towers != "vision":
            self.token_embedding = nn.Embedding(c.vocab_size, c.width)
            self.positional_embedding = empty(c.context_length, c.width)
            self.transformer, self.ln_final = Transformer(c), norm(c)
            self.text_projection = empty(c.width, dim)
            self.text_projection_bias = empty(dim) if c.projection == "bias" else None

    def encode_words(self, ids: Tensor) -> Tensor:
        """Returns T x W x D vectors, not normalised."""
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
    weights: Maybe = None  # B x L logits, of the aggregation weighted


class PairTransformer(nn.Module):
    """A Transformer over the vectors of each pair: the tight head, or the fusion."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, self.is_tight = config.embed_dim, config.fusion == "mean"
        positions = max(config.text.context_length, config.max_frames + 1)
        self.name = "position_embeddings" if self.is_tight else "kind_embeddings"
        table = nn.Embedding(positions if self.is_tight else 4, dim)
        self.embeddings = nn.ModuleDict({self.name: table})
        self.transformer = Transformer(blocks(config, "temporal"))
        self.pooler = nn.ModuleDict({"ln_pool": nn.LayerNorm(dim)})
        if self.is_tight:
            self.pooler["dense"] = nn.Linear(dim, dim)

    def forward(self, text: Features, video: Features, words: Tensor, frames: Tensor) -> Tensor:
        """Returns T x V x D vectors. Only words and frames where these masks are True take part."""
        texts, videos = text.whole[:, None], video.parts
        if self.is_tight:
            words, frames, kinds = words[:, :0], video.mask, list(range(1 + videos.shape[1]))
        else:
            kinds = [0] + [1] * words.shape[1] + [2] + [3] * frames.shape[1]
            texts = torch.cat([texts, text.parts], 1)
            videos = torch.cat([video.whole[:, None], videos], 1)
            frames = F.pad(frames, (1, 0), value=True)
        mask = join_pairs(F.pad(words, (1, 0), value=True), frames)
        x = join_pairs(texts, videos) + self.embeddings[self.name].weight[kinds]
        x = self.transformer(x, mask[:, None, None])
        x = self.pooler["ln_pool"](x[:, 0])
        if self.is_tight:
            x = ACTIVATIONS["quick_gelu"](self.pooler["dense"](x))
        return x.unflatten(0, (len(text.mask), len(video.mask)))


def join_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Joins T x A x ... and V x B x ... of all pairs to TV x (A + B) x ..."""
    a, b = a[:, None].expand(-1, len(b), *a.shape[1:]), b.expand(len(a), *b.shape)
    return torch.cat([a, b], 2).flatten(0, 1)


def check_shape(x: Tensor, mask: Tensor, limit: int, fixed: bool) -> None:
    """Raises ValueError if words or frames are not masked, too many, or not padded to `limit`."""
    length = mask.shape[1]
    if x.shape[:2] != mask.shape or not limit * fixed <= length <= limit:
        allowed = f"{'just' if fixed else 'at most'} {limit} words or frames"
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(mask.shape)}: must have {allowed}")


class XClip(nn.Module):
    """X-CLIP (https://arxiv.org/abs/2207.07285) or a baseline, as model.json describes it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, dim = config, config.embed_dim
        self.config, self.clip = c, CLIP(c)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(vars(c.preprocess)[name]), persistent=False)
        if c.temporal.type == "transformer":
            count = max(c.text.context_length, c.max_frames)
            self.frame_position_embeddings = nn.Embedding(count, dim)
            self.transformerClip = Transformer(blocks(c, "temporal"))
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
        for name, (granularity, size) in MATRICES.items():
            learned = c.matrices and not self.has_pairs and granularity in c.granularities
            self.register_parameter(name, empty(*[vars(c)[size]] * 2) if learned else None)

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
        words, kind = self.clip.encode_words(ids), c.text.pool
        weights = self.text_weight_fc(words) if c.aggregation == "weighted" else None
        words = words if c.head == "tight_transformer" else F.normalize(words, dim=-1)
        place = (ids if kind == "argmax" else (ids == c.text.end_id).int()).argmax(1)
        place = torch.full_like(place, ids.shape[1] - 1) if kind == "last" else place
        return Features(words[torch.arange(len(ids)), place], words, mask, weights)

    def encode_video(self, frames: Tensor, mask: Tensor) -> Features:
        """Encodes V x F x S x S x 3 RGB: raw uint8, or floats that are already normalised."""
        c, mask, side = self.config, mask.bool(), self.config.vision.image_size
        check_shape(frames, mask, c.max_frames, c.padding == "competes")
        is_raw, real = frames.dtype == torch.uint8, mask[..., None]
        if frames.shape[2:] != (side, side, 3) or not (is_raw or frames.is_floating_point()):
            found, needed = (
                (frames.dtype, *frames.shape),
                f"uint8 or float, V, F, {side}, {side}, 3",
            )
            raise ValueError(f"frames {found}: must be {needed}")
        frames = (frames.float() / 255 - self.mean) / self.std if is_raw else frames
        frames = frames.masked_fill(~real[..., None, None], 0)
        clip = self.clip.visual(frames.flatten(0, 1)).unflatten(0, mask.shape)
        if c.head == "tight_transformer":
            mean = (clip * real).sum(1) / real.sum(1).clamp(min=1)
            return Features(mean, clip, mask)
        related = self.relate_frames(clip, mask)
        video = F.normalize((F.normalize(related, dim=-1) * real).sum(1), dim=-1)  # Eq. 2
        compared = clip if c.frame_features == "clip" else related
        weights = self.video_weight_fc(compared) if c.aggregation == "weighted" else None
        return Features(video, F.normalize(compared, dim=-1), mask, weights)

    def relate_frames(self, clip: Tensor, mask: Tensor) -> Tensor:
        """Returns the V x F x D output of the temporal encoder (Eq. 1)."""
        c, encoded = self.config.temporal, clip
        if c.type == "lstm":
            encoded = self.lstm_visual(clip)[0] * mask[..., None]
        elif c.type == "transformer":
            x = clip + self.frame_position_embeddings.weight[: clip.shape[1]]
            bias = (~mask[:, None, None]).float() * -1e30  # uniform attention if none is real
            encoded = self.transformerClip(x, bias)
        return encoded + clip if c.residual and c.type != "none" else encoded

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

    def compare(
        self, text: Features, video: Features, words: Tensor, frames: Tensor
    ) -> list[Tensor]:
        """Returns T x V similarities, not scaled, of each granularity (Eq. 3-13)."""
        names, kind, parts = self.config.granularities, self.config.aggregation, []
        operations = {"weighted": "weighted-max", "maxsim": "mean-max"}.get(kind, kind).split("-")
        outer, inner = operations[0], operations[-1]
        words, frames = words[:, None], frames[None]  # T x 1 x W, 1 x V x F
        a = None if text.weights is None else text.weights[:, None]
        b = None if video.weights is None else video.weights[None]
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

    def reduce(
        self, scores: Tensor, mask: Tensor, operation: str, name: str, logits: Maybe = None
    ) -> Tensor:
        """Reduces the last axis, where `mask` is True, by an operation (Eq. 7, 8); to 0 if never."""
        if operation == "max":
            return scores.masked_fill(~mask, -1e9).amax(-1) * mask.any(-1)
        if operation == "mean":
            return (scores * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        tau = self.config.tau if self.log_tau is None else self.log_tau.exp()
        logits, tau = (scores, tau) if operation == "attention" else (logits, 1.0)
        logits = logits.masked_fill(~mask, -1e9)
        weights = ((logits - logits.amax(-1, keepdim=True)) / tau).softmax(-1) * mask
        return (self.transform(weights, name) * mask * scores).sum(-1)
