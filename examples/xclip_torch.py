"""Inference in PyTorch with models that xclip_jax trained or converted.

Needs PyTorch and safetensors, nothing of xclip_jax: copy this file and xclip_torch_encoders.py into
a folder of your project. It reads the folder written by

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
embedding space.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from xclip_torch_encoders import ACTIVATIONS, CLIP, Config, Maybe, Transformer, empty

# All fields of model.json by section, with the values that are implemented where a field names a
# choice. Others are refused: what is added to xclip_jax must be added here, too. Without effect are
# preset, which other fields spell out, dtype, param_dtype, remat, and how frames are chosen and
# resized.
NAMES = "|".join(ACTIVATIONS)
BLOCK = f"width layers heads mlp_width epsilon activation=None|{NAMES} gated inner_norms logit_cap"
FIELDS = {
    "": f"""head=xclip|mean_pooling|seq_lstm|seq_transformer|tight_transformer activation={NAMES}
        embed_dim towers=both|vision|text max_scale max_words max_frames tau tau_learned logit_bias
        granularities=video_sentence|video_word|frame_sentence|frame_word
        aggregation=attention|max-max|mean-mean|mean-max|max-mean|weighted|maxsim
        fusion=mean|transformer frame_features=temporal|clip words=word_tokens|all_tokens
        padding=masked|competes matrices preset dtype param_dtype remat vision text temporal
        preprocess""",
    "vision": f"""{BLOCK} image_size patch_size uncovered class_token patch_bias pre_norm
        pool=class_token|attention|scaled_attention pool_heads pool_mlp_width
        projection=none|linear|bias rotary=none|rows_first|columns_first rotary_grid
        position_resize num_frames temporal_layers joint_layers""",
    "text": f"""{BLOCK} vocab_size context_length causal start_token end_token end_id
        pool=argmax|end|last|class_token projection=none|linear|bias""",
    "temporal": "type=none|transformer|lstm layers heads residual",
    "preprocess": "mean std image_size resize interpolation spread",
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
    model["temporal"] |= {name: model["text"][name] for name in ("epsilon", "logit_cap")}
    model["temporal"]["width"] = model["embed_dim"]
    for name in ("vision", "text", "temporal"):
        model[name]["activation"] = model[name]["activation"] or model["activation"]
    return Config(**model | {name: Config(**model[name]) for name in FIELDS if name})


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
        x, kind, count = self.clip(ids, mask), c.text.pool, ids.shape[1]
        is_weighted = c.aggregation == "weighted"
        weights = self.text_weight_fc(x[:, :count])[:, None] if is_weighted else None
        x = x if c.head == "tight_transformer" else F.normalize(x, dim=-1)
        place = (ids if kind == "argmax" else (ids == c.text.end_id).int()).argmax(1)
        is_last = kind in ("last", "class_token")  # a class token comes after the words
        place = torch.full_like(place, x.shape[1] - 1) if is_last else place
        return Features(x[torch.arange(len(ids)), place], x[:, :count], mask, weights)

    def encode_video(self, frames: Tensor, mask: Tensor) -> Features:
        """Encodes V x F x S x S x 3 RGB: raw uint8, or floats that are already normalised."""
        c, mask, side = self.config, mask.bool(), self.config.vision.image_size
        fixed = c.padding == "competes" or c.vision.num_frames > 0
        check_shape(frames, mask, c.max_frames, fixed, (side, side, 3))
        real, own = mask[..., None], None
        if frames.dtype == torch.uint8:
            mean, std = frames.new_tensor([c.preprocess.mean, c.preprocess.std], dtype=torch.float)
            frames = (frames / 255 - mean) / std
        elif not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: must be uint8 or normalised floats")
        frames = frames.masked_fill(~real[..., None, None], 0)
        if c.vision.num_frames:
            own, clip = self.clip.visual(frames, mask)
        else:
            clip = self.clip.visual(frames.flatten(0, 1)).unflatten(0, mask.shape)
        if c.head == "tight_transformer":
            mean = (clip * real).sum(1) / real.sum(1).clamp(min=1)
            return Features(mean, clip, mask)
        related = clip  # Eq. 1
        if c.temporal.type == "lstm":
            related = self.lstm_visual(clip)[0] * real
        elif c.temporal.type == "transformer":
            x = clip + self.frame_position_embeddings.weight[: clip.shape[1]]
            related = self.transformerClip(x, mask[:, None, None])
        if c.temporal.type != "none" and c.temporal.residual:
            related = related + clip
        video = (F.normalize(related, dim=-1) * real).sum(1)  # Eq. 2
        if own is not None and c.temporal.type == "none":
            video = own
        compared = clip if c.frame_features == "clip" else related
        weights = self.video_weight_fc(compared)[None] if c.aggregation == "weighted" else None
        frames = F.normalize(compared, dim=-1)
        return Features(F.normalize(video, dim=-1), frames, mask, weights)

    def similarity(self, text: Features, video: Features) -> Tensor:
        """Returns T x V logits. Needs memory for T x V x W x F numbers: pass parts of many."""
        c, words, frames = self.config, text.mask.clone(), video.mask
        if c.words == "word_tokens":
            if c.text.end_token:
                words &= F.pad(words[:, 1:], (0, 1), value=False)
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
