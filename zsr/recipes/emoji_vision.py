"""Second stage of the emoji recipe: train the image tower against the fixed vectors of all training names.

Since the text tower no longer moves, the contrast is over all names in every step instead of over a batch's own, for one small
product; batches can then be small and steps many, which is what a short run wants. Two more things buy steps: half of the
patches are left out but for the last part (patch dropout; half of the tokens are half of the cost, and a
drawing is still recognised by its parts), and Muon updates the blocks' matrices (about half the steps of AdamW here).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from torch import Tensor

from zsr.recipes.augment import augment
from zsr.recipes.vision_init import initialise

BATCH = 64
LR, MUON_LR, WEIGHT_DECAY = 2e-3, 3e-3, 0.1
LABEL_SMOOTHING = 0.1
INITIAL_SCALE, MAX_SCALE = 20.0, 60.0
WARM_UP_STEPS = 50
CHECKPOINT_SECONDS = 150.0
MIX_CHANCE, MIX_ALPHA = 0.5, 0.4


@dataclass
class VisionRun:
    """What the stage needs: data in memory, name vectors, the budget."""

    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    text_CD: Tensor
    val_text_CD: Tensor
    mean: Tensor
    std: Tensor
    seconds: float
    seed: int
    checkpoint: Path


def schedule(share: float) -> tuple[float, float, float]:
    """Learning-rate factor, share of patches left out and augmentation strength at a share of the budget.

    Augmentation grows with the run: at first it would only slow the start, later the tower knows the drawings by heart without.
    """
    rate = 0.5 * (1 + math.cos(math.pi * share))
    return rate, 0.5 if share < 0.85 else 0.0, 0.4 + 0.5 * min(1.0, share / 0.5)


def mixed(pixels: Tensor, target_BC: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup of a batch with its reverse, half of the time: what lies between two drawings lies between their names."""
    if torch.rand((), generator=generator) >= MIX_CHANCE:
        return pixels, target_BC
    # Beta(a, a) from two gamma draws would need its own generator; a power of a uniform draw has the same U shape.
    part = 0.5 * float(torch.rand((), generator=generator)) ** (1 / MIX_ALPHA)
    return torch.lerp(pixels, pixels.flip(0), part), torch.lerp(target_BC, target_BC.flip(0), part)


def optimizers(visual: Any, scale: Tensor) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for the rest, without decay on vectors and positions."""
    named = dict(visual.named_parameters())
    blocks = [p for name, p in named.items() if p.ndim == 2 and "resblocks" in name]
    plain = [p for name, p in named.items() if p.ndim < 2 or "positional" in name]
    taken = {id(p) for p in (*blocks, *plain)}
    decayed = [p for p in named.values() if id(p) not in taken]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": [*plain, scale], "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.98),
    )  # fmt: skip
    muon = torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


@torch.no_grad()
def embed(visual: Any, images: Tensor, run: VisionRun) -> Tensor:
    was_training = visual.training
    visual.eval()
    parts = [F.normalize(visual((part.float() / 255 - run.mean) / run.std), dim=-1) for part in images.split(256)]
    visual.train(was_training)
    return torch.cat(parts)


def progress(visual: Any, run: VisionRun) -> str:
    """Accuracy on validation concepts among their own names, and on a slice of the training images among all."""
    val = (embed(visual, run.val_images, run) @ run.val_text_CD.T).argsort(-1, descending=True)
    hits = val == run.val_labels[:, None]
    train = (embed(visual, run.images[:256], run) @ run.text_CD.T).argmax(-1) == run.labels[:256]
    return (
        f"val_top1={100 * hits[:, 0].float().mean():.1f} val_top5={100 * hits[:, :5].any(1).float().mean():.1f} "
        f"train_top1={100 * train.float().mean():.1f}"
    )


def train_vision(model: Any, run: VisionRun, state: dict[str, Any]) -> None:
    """Train `model.visual` and the logit scale in place until the budget ends; `state` is filled from a checkpoint, or new."""
    visual = model.visual
    generator = torch.Generator().manual_seed(run.seed)
    scale = model.logit_scale
    dropout = visual.patch_dropout = PatchDropout(0.75)  # an Identity again at the end: the config knows nothing of it
    opts = optimizers(visual, scale)
    if "optimizers" in state:
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        generator.set_state(state["generator"])
    else:
        with torch.no_grad():
            scale.fill_(math.log(INITIAL_SCALE))
        initialise(visual, (run.images[::4].float() / 255 - run.mean) / run.std, generator)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*visual.parameters(), scale):
        parameter.requires_grad_(True)

    visual.train()
    start = time.monotonic() - state["elapsed"]
    step, last, order, losses = state.get("step", 0), time.monotonic(), torch.empty(0, dtype=torch.long), []
    while (share := (time.monotonic() - start) / run.seconds) < 1:
        rate, dropped, strength = schedule(share)
        for opt, peak in zip(opts, (LR, MUON_LR), strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        dropout.prob = dropped
        if len(order) < BATCH:
            order = torch.randperm(len(run.images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]

        pixels = augment(run.images[chosen], generator, strength)
        target_BC = F.one_hot(run.labels[chosen], len(run.text_CD)).float()
        if 0.3 < share < 0.85:
            pixels, target_BC = mixed(pixels, target_BC, generator)
        embed_BD = F.normalize(visual((pixels - run.mean) / run.std), dim=-1)
        logits_BC = scale.exp() * embed_BD @ run.text_CD.T
        loss = F.cross_entropy(logits_BC, target_BC, label_smoothing=LABEL_SMOOTHING)
        visual.zero_grad(set_to_none=True)
        scale.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        for opt in opts:
            opt.step()
        with torch.no_grad():
            scale.clamp_(max=math.log(MAX_SCALE))

        step += 1
        losses.append(loss.item())
        if time.monotonic() - last > CHECKPOINT_SECONDS:
            state.update(model=model.state_dict(), optimizers=[opt.state_dict() for opt in opts], step=step,
                         generator=generator.get_state(), elapsed=time.monotonic() - start)  # fmt: skip
            torch.save(state, run.checkpoint)
            mean, losses = sum(losses) / len(losses), []
            left = run.seconds - (time.monotonic() - start)
            print(f"stage=image step={step} epoch={step * BATCH / len(run.images):.0f} loss={mean:.3f} "
                  f"scale={scale.exp().item():.1f} {progress(visual, run)} eta={left:.0f}s", flush=True)  # fmt: skip
            last = time.monotonic()
    visual.patch_dropout = torch.nn.Identity()
    model.eval()
    print(f"stage=image done step={step} {progress(visual, run)}", flush=True)
