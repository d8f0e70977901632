"""X-CLIP and its training step in plain PyTorch, the baseline of train_step.py.

CLIP's towers, the temporal Transformer of three layers, the four granularities with masked AOSM,
the symmetric InfoNCE loss, AdamW. Layers, sizes and masks are those of the `paper` preset of
xclip_jax. `copy_params` copies its weights, after which both compute the same loss.
"""

import contextlib
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TAU = 0.01


class Block(nn.Module):
    """Pre-norm Transformer block, N x L x E."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        number, length, width = x.shape
        qkv = self.qkv(self.ln_1(x)).view(number, length, 3, self.heads, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), mask, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(number, length, width))
        y = self.fc(self.ln_2(x))
        return x + self.proj(y * torch.sigmoid(1.702 * y))  # QuickGELU


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, causal)
        return x


class VisionTower(nn.Module):
    """Image tower: N x 3 x S x S normalized images to N x D."""

    def __init__(self, config: dict, dim: int) -> None:
        super().__init__()
        width, size = config["width"], config["patch_size"]
        tokens = (config["image_size"] // size) ** 2 + 1
        self.patch = nn.Conv2d(3, width, size, size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder = Transformer(config["layers"], width, config["heads"])
        self.projection = nn.Linear(width, dim, bias=False)

    def forward(self, images_Nx3xSxS: Tensor) -> Tensor:
        x = self.patch(images_Nx3xSxS).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positions
        return self.projection(self.ln_post(self.encoder(self.ln_pre(x))[:, 0]))


class TextTower(nn.Module):
    """Causal text tower: T x W ids to T x W x D."""

    def __init__(self, config: dict, dim: int) -> None:
        super().__init__()
        width = config["width"]
        self.tokens = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Parameter(torch.zeros(config["context_length"], width))
        self.encoder = Transformer(config["layers"], width, config["heads"])
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dim, bias=False)

    def forward(self, ids_TxW: Tensor) -> Tensor:
        x = self.tokens(ids_TxW) + self.positions[: ids_TxW.shape[1]]
        return self.projection(self.ln_final(self.encoder(x, causal=True)))


class CLIP(nn.Module):
    """Both towers and the logit scale."""

    def __init__(self, architecture: dict) -> None:
        super().__init__()
        self.visual = VisionTower(architecture["vision"], architecture["embed_dim"])
        self.textual = TextTower(architecture["text"], architecture["embed_dim"])
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))


class Temporal(nn.Module):
    """Transformer over V x F x D frames with learned positions (Eq. 1)."""

    def __init__(self, layers: int, heads: int, positions: int, dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(positions, dim))
        self.encoder = Transformer(layers, dim, heads)

    def forward(self, frames_VxFxD: Tensor, mask_VxF: Tensor) -> Tensor:
        x = frames_VxFxD + self.positions[: frames_VxFxD.shape[1]]
        return self.encoder(x, mask_VxF[:, None, None])


class XClip(nn.Module):
    """X-CLIP, called with a batch to compute its loss."""

    def __init__(self, architecture: dict) -> None:
        super().__init__()
        a = architecture
        sizes = a["temporal"]["layers"], a["temporal"]["heads"], a["text"]["context_length"]
        self.clip = CLIP(a)
        self.temporal_encoder = Temporal(*sizes, a["embed_dim"])
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("std", torch.tensor(STD))

    def encode_text(self, ids_TxW: Tensor, mask_TxW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (sentence_TxD, words_TxWxD)."""
        words_TxWxD = F.normalize(self.clip.textual(ids_TxW).float(), dim=-1)
        return words_TxWxD[torch.arange(len(ids_TxW)), mask_TxW.sum(1) - 1], words_TxWxD

    def encode_video(self, frames_VxFxSxSx3: Tensor, mask_VxF: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (video_VxD, frames_VxFxD)."""
        images = (frames_VxFxSxSx3.float() / 255 - self.mean) / self.std
        images = images.masked_fill(~mask_VxF[..., None, None, None], 0)
        clip_VFxD = self.clip.visual(images.flatten(0, 1).permute(0, 3, 1, 2))
        frames_VxFxD = self.temporal_encoder(clip_VFxD.view(*mask_VxF.shape, -1), mask_VxF)
        frames_VxFxD = F.normalize(frames_VxFxD.float(), dim=-1)
        sum_VxD = frames_VxFxD.masked_fill(~mask_VxF[..., None], 0).sum(1)
        return F.normalize(sum_VxD, dim=-1), frames_VxFxD

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the sum of the InfoNCE losses in both directions."""
        text = self.encode_text(batch["ids"], batch["text_mask"])
        video = self.encode_video(batch["frames"], batch["frame_mask"])
        with torch.autocast(batch["frames"].device.type, enabled=False):
            sim_TxV = similarity(*text, *video, batch["text_mask"], batch["frame_mask"])
            sim_TxV = self.clip.logit_scale.exp() * sim_TxV
            targets = torch.arange(len(sim_TxV), device=sim_TxV.device)
            return F.cross_entropy(sim_TxV, targets) + F.cross_entropy(sim_TxV.T, targets)


def attend(scores: Tensor, mask: Tensor, axis: int) -> Tensor:
    """Returns the sum of softmax(scores / tau) x scores along an axis (Eq. 7, 8)."""
    weights = torch.softmax((scores / TAU).masked_fill(~mask, -torch.inf), axis)
    return (weights * scores).sum(axis)


def similarity(
    sentence_TxD: Tensor,
    words_TxWxD: Tensor,
    video_VxD: Tensor,
    frames_VxFxD: Tensor,
    text_mask_TxW: Tensor,
    frame_mask_VxF: Tensor,
) -> Tensor:
    """Returns the T x V mean of the four granularities. Start and end tokens are not words."""
    inner_TxW = text_mask_TxW & text_mask_TxW.roll(-1, 1)
    inner_TxW[:, 0] = inner_TxW[:, -1] = False
    w, f = inner_TxW[:, None, :], frame_mask_VxF[None]
    by_video = sentence_TxD @ video_VxD.T
    by_words = attend(torch.einsum("twd,vd->tvw", words_TxWxD, video_VxD), w, -1)
    by_frames = attend(torch.einsum("td,vfd->tvf", sentence_TxD, frames_VxFxD), f, -1)
    cells_TxVxWxF = torch.einsum("twd,vfd->tvwf", words_TxWxD, frames_VxFxD)
    over_words = attend(attend(cells_TxVxWxF, f[:, :, None, :], -1), w, -1)
    over_frames = attend(attend(cells_TxVxWxF, w[..., None], -2), f, -1)
    return (by_video + by_words + by_frames + (over_words + over_frames) / 2) / 4


class Trainer:
    """The model, its optimizer and a batch on a GPU or, without one, on the CPU."""

    def __init__(
        self,
        architecture: dict,
        params: dict,
        optimizer: Any,
        *,
        batch: dict[str, np.ndarray],
        dtype: str,
    ) -> None:
        """Copies weights and batch to the device.

        Args:
            architecture: the model config as a dict.
            params: parameters of xclip_jax as NumPy arrays.
            optimizer: config.optimizer.
            batch: NumPy arrays, see xclip_jax/data/pipeline.py.
            dtype: "bfloat16" for autocast on a GPU, or "float32".
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as in XLA
        self.model = XClip(architecture).to(self.device)
        copy_params(self.model, params)
        tensors = {name: torch.from_numpy(np.array(x)).to(self.device) for name, x in batch.items()}
        self.batch = {**tensors, "ids": tensors["ids"].long()}
        groups = [
            {"params": self.model.clip.parameters(), "lr": optimizer.encoder_lr},
            {"params": self.model.temporal_encoder.parameters(), "lr": optimizer.lr},
        ]
        self.clip_norm = optimizer.clip_norm
        betas = optimizer.b1, optimizer.b2
        self.optimizer = torch.optim.AdamW(
            groups, betas=betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        if self.device.type == "cuda":
            self.model.compile()
        self.half = dtype == "bfloat16" and self.device.type == "cuda"

    def product_flops(self, size: int) -> float:
        """Returns the FLOP/s of the fastest of five products of square float32 matrices."""
        a, times = torch.randn(size, size, device=self.device), []
        for _ in range(6):
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times[1:])

    def loss(self) -> Tensor:
        """Returns the loss of the batch."""
        half = torch.autocast("cuda", torch.bfloat16) if self.half else contextlib.nullcontext()
        with half:
            return self.model(self.batch)

    def step(self) -> None:
        """Updates the parameters once and waits for the device."""
        self.optimizer.zero_grad()
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.clip.logit_scale.clamp_(max=math.log(100))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Returns the peak memory of the GPU, None on the CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def copy_params(model: XClip, params: dict) -> None:
    """Copies parameters of xclip_jax, as NumPy arrays, into the model."""
    visual, textual = params["clip"]["visual"], params["clip"]["textual"]
    temporal = params["temporal_encoder"]
    kernel = visual["patch"]["kernel"].transpose(3, 2, 0, 1)
    tensors = {
        "clip.logit_scale": params["clip"]["logit_scale"],
        "clip.visual.patch.weight": kernel,
        "clip.visual.class_token": visual["class_token"],
        "clip.visual.positions": visual["positions"],
        "clip.visual.projection.weight": visual["projection"]["kernel"].T,
        "clip.textual.tokens.weight": textual["tokens"]["embedding"],
        "clip.textual.positions": textual["positions"],
        "clip.textual.projection.weight": textual["projection"]["kernel"].T,
        "temporal_encoder.positions": temporal["positions"],
        **_norm("clip.visual.ln_pre", visual["ln_pre"]["norm"]),
        **_norm("clip.visual.ln_post", visual["ln_post"]["norm"]),
        **_norm("clip.textual.ln_final", textual["ln_final"]["norm"]),
        **_blocks("clip.visual.encoder", visual["encoder"]["blocks"]),
        **_blocks("clip.textual.encoder", textual["encoder"]["blocks"]),
        **_blocks("temporal_encoder.encoder", temporal["encoder"]["blocks"]),
    }
    copies = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    model.load_state_dict({"mean": model.mean, "std": model.std, **copies})


def _norm(prefix: str, norm: dict) -> dict[str, np.ndarray]:
    return {f"{prefix}.weight": norm["scale"], f"{prefix}.bias": norm["bias"]}


def _blocks(prefix: str, blocks: dict) -> dict[str, np.ndarray]:
    """Returns the weights of stacked layers by their PyTorch names."""
    width, attention = blocks["ln_1"]["norm"]["scale"].shape[1], blocks["attention"]
    weights = {}
    for i in range(len(blocks["ln_1"]["norm"]["scale"])):
        at = f"{prefix}.blocks.{i}"
        layers = {
            "qkv": (attention["qkv"]["kernel"][i].reshape(width, -1), attention["qkv"]["bias"][i]),
            "out": (attention["out"]["kernel"][i].reshape(-1, width), attention["out"]["bias"][i]),
            "fc": (blocks["fc"]["kernel"][i], blocks["fc"]["bias"][i]),
            "proj": (blocks["proj"]["kernel"][i], blocks["proj"]["bias"][i]),
        }
        for name, (kernel, bias) in layers.items():
            weights[f"{at}.{name}.weight"] = kernel.T
            weights[f"{at}.{name}.bias"] = bias.reshape(-1)
        for name in ("ln_1", "ln_2"):
            norm = {key: x[i] for key, x in blocks[name]["norm"].items()}
            weights |= _norm(f"{at}.{name}", norm)
    return weights
