"""Zero-shot accuracy of the embedded model, clean and under PGD, on the embedded splits; small and self-contained on purpose.

The card's table comes from here, so that its numbers do not move when the library's own evaluation does. N-way means: the
split's classes are shuffled with a fixed seed and cut into groups of N, each image is classified among the names of its own
group, and the attack maximises the cross-entropy over those N; classes that fill no group are left out. Every image counts once.

Legend: B images, C classes, D embedding width.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zsr.models.attention import use_fast_attention
from zsr.models.compact import load_compact

# What the card reports. None: among all names of the split.
PLAN: dict[str, tuple[int | None, ...]] = {
    "test_style": (50, None),
    "test_concepts": (10, None),
    "test_both": (10, None),
}
GROUP_SEED = 0


def read_split(folder: Path) -> tuple[Tensor, Tensor, list[str], dict[str, Any]]:
    """A whole split in memory: uint8 pixels [B, 3, 64, 64], labels [B], keys, and its index."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    images, labels, keys = [], [], []
    for shard in index["shards"]:
        with tarfile.open(folder / shard["file"]) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in files.items():
            key, suffix = name.rsplit(".", 1)
            if suffix == "webp":
                keys.append(key)
                images.append(torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1))
                labels.append(int(files[f"{key}.cls"]))
    return torch.stack(images), torch.tensor(labels), keys, index


def load_model(folder: Path) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
    """Model, tokenizer and the map from pixels in [0, 1] to what the image tower takes."""
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_compact(folder / "model.safetensors"))
    use_fast_attention(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])
    mean, std = (torch.tensor(config["preprocess_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return model.eval().requires_grad_(False), tokenizer, lambda pixels: (pixels - mean) / std


@torch.no_grad()
def class_embeddings(model: Any, tokenizer: Any, classes: list[str], templates: list[str]) -> Tensor:
    """Unit class vectors [C, D]: the mean of the templates' unit vectors, normalised."""
    each = [model.encode_text(tokenizer([t.format(name) for name in classes]), normalize=True) for t in templates]
    return F.normalize(torch.stack(each).mean(0), dim=-1)


def pgd(
    logits_of: Callable[[Tensor], Tensor], image_BCHW: Tensor, label_B: Tensor, eps: float, steps: int, seed: int
) -> Tensor:
    """L-inf PGD in pixel space: uniform random start, step size eps / 4, summed cross-entropy, last iterate."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.empty_like(image_BCHW).uniform_(-eps, eps, generator=generator)
    for _ in range(steps):
        attacked = (image_BCHW + delta).clamp(0, 1).requires_grad_(True)
        loss = F.cross_entropy(logits_of(attacked), label_B, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        delta = (attacked.detach() + eps / 4 * gradient.sign() - image_BCHW).clamp(-eps, eps)
    return (image_BCHW + delta).clamp(0, 1)


def groups(num_classes: int, ways: int | None, seed: int = GROUP_SEED) -> list[list[int]]:
    """Classes cut into groups of `ways`; None: one group of all."""
    if ways is None or ways >= num_classes:
        return [list(range(num_classes))]
    order = list(range(num_classes))
    random.Random(seed).shuffle(order)
    return [order[start : start + ways] for start in range(0, num_classes - ways + 1, ways)]


def accuracy(
    model: Any, normalize: Callable[[Tensor], Tensor], text_CD: Tensor, images: Tensor, labels: Tensor, ways: int | None,
    eps: float = 0.0, steps: int = 10, seed: int = 0, batch: int = 256,
) -> tuple[float, int]:  # fmt: skip
    """Share of images classified rightly within their group, and how many there were; eps 0 is clean."""
    scale = model.logit_scale.exp().item()
    right = total = 0
    for group in groups(len(text_CD), ways):
        position = torch.full((len(text_CD),), -1)
        position[group] = torch.arange(len(group))
        chosen = (position[labels] >= 0).nonzero().flatten()
        names = text_CD[group]

        def logits_of(pixels: Tensor, names: Tensor = names) -> Tensor:
            return scale * F.normalize(model.visual(normalize(pixels)), dim=-1) @ names.T

        for part in chosen.split(batch):
            pixels, target = images[part].float() / 255, position[labels[part]]
            if eps:
                pixels = pgd(logits_of, pixels, target, eps, steps, seed)
            with torch.no_grad():
                right += int((logits_of(pixels).argmax(-1) == target).sum())
            total += len(part)
    return right / max(total, 1), total


def evaluate(model_folder: Path, data: Path, splits: list[str], eps_255: list[float]) -> str:
    """The card's table, in Markdown, printed line by line as it comes."""
    model, tokenizer, normalize = load_model(model_folder)
    header = ["split", "ways", "images", "chance", "clean", *(f"PGD-10 {eps:g}/255" for eps in eps_255)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    start = time.monotonic()
    for split in splits:
        images, labels, _, index = read_split(data / split)
        text = class_embeddings(model, tokenizer, index["classes"], index["templates"])
        for ways in PLAN[split]:
            clean, total = accuracy(model, normalize, text, images, labels, ways)
            robust = [accuracy(model, normalize, text, images, labels, ways, eps / 255)[0] for eps in eps_255]
            count = min(ways or len(text), len(text))
            cells = [split, str(count), str(total), *(f"{100 * share:.1f}" for share in (1 / count, clean, *robust))]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    print(f"elapsed={time.monotonic() - start:.0f}s", flush=True)
    return "\n".join(lines)
