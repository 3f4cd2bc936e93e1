"""AutoAttack as the public implementation runs it (pyautoattack 0.2.0, of the dev extra), and the model people hand to it.

Shapes: B images, C channels (or classes, in logits), D embedding width, H x W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.config import ModelConfig
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import RobustCLIP, load_model


class PlainClassifier(nn.Module):
    """open_clip's own tower, with its ordinary layers, under class embeddings that are computed once.

    Args:
        head: of our model, whose weights and class embeddings are taken over.

    Attributes:
        passes: images that went through the tower: once forward, once more for a gradient.
    """

    mean: Tensor
    std: Tensor
    text_CD: Tensor

    def __init__(self, head: ZeroShotHead) -> None:
        super().__init__()
        plain = plain_copy(head.model)
        self.open_clip, self.scale, self.passes = plain.open_clip, float(head.model.logit_scale), 0
        for name, value in (("mean", plain.image.mean), ("std", plain.image.std), ("text_CD", head.text_CD)):
            self.register_buffer(name, value.clone())
        # open_clip gives weights that ask for gradients, and FAB's backward pass would fill them: a pass that is saved here.
        self.eval().requires_grad_(False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.passes += len(image_BCHW) * (2 if torch.is_grad_enabled() and image_BCHW.requires_grad else 1)
        model = cast(Any, self.open_clip)
        embed_BD = F.normalize(model.encode_image((image_BCHW - self.mean) / self.std), dim=-1)
        logits_BC: Tensor = self.scale * embed_BD @ self.text_CD.T
        return logits_BC


def plain_copy(model: RobustCLIP) -> RobustCLIP:
    """The same image tower in open_clip's ordinary layers."""
    pretrained = None if ":" in model.arch else "random"
    plain = load_model(
        ModelConfig(name=model.arch, pretrained=pretrained, fast_layers=False), device=model.text_projection.device
    )
    plain.load_trained_state(model.trained_state())
    return plain.eval()


def public_predictions(
    model: Callable[[Tensor], Tensor],
    image_BCHW: Tensor,
    label_B: Tensor,
    *,
    eps: float,
    norm: str,
    attacks: tuple[str, ...],
    steps: int = 100,
    target_classes: int = 9,
    queries: int = 5000,
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """Classes ``[B]`` that a classifier sees after their attack; torch's global random state stays as it was.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.
    """
    import pyautoattack  # type: ignore[import-untyped]

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their = pyautoattack.AutoAttack(
            model, attacks=list(attacks), version="custom", norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=seed,
            device=image_BCHW.device,
        )  # fmt: skip
        for apgd in (their.apgd, their.apgd_targeted):
            apgd.n_iter, apgd.n_restarts = steps, 1
            # It derives these from the number of steps, but only where it is made.
            apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
                max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
            )
        their.fab.n_iter, their.square.n_queries = steps, queries
        their.apgd_targeted.n_target_classes = their.fab.n_target_classes = target_classes
        _, said_B = their.run_standard_evaluation(image_BCHW.clone(), label_B.clone(), batch_size=batch_size)
    return cast(Tensor, said_B)
