"""Clean and robust accuracy without and with a test-time defence, from one run of an attack that does not know it.

Shapes: B images, C channels, H x W pixels.

What is attacked: every sample that is right without the defence or with it, the bare model's loss in both cases. The same
attacked image is then classified both ways. A sample is robust without the defence if the bare prediction is right on the
clean and on the attacked image, and robust with it if the defended prediction is right on both. (Published tables ask for
the attacked image alone; they can only be higher.)

An attack that stops where it succeeds (APGD, AutoAttack) stops at the bare model's boundary, and leaves an image that the bare
model gets wrong as it is. A defence finds both easier to mend than PGD's images: compare defences under PGD or CW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zsr.attacks.base import Attack, input_gradients_only
from zsr.data.pipeline import eval_batches, subset_ids
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import EvalResult, ZeroShotHead, attack_rows
from zsr.eval.defended import DefendedCLIP

Progress = Callable[[str, int, int], None]
"""Called with (attack, samples done, samples to do)."""

_ROBUST, _ZERO_GRAD = range(2)


def evaluate_oblivious(
    head: ZeroShotHead,
    defended: DefendedCLIP,
    shards: ShardSet,
    attacks: Mapping[str, Attack[Any] | None],
    *,
    num_samples: int = 0,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, tuple[EvalResult, EvalResult]]:
    """Measure a zero-shot classifier on a set under each attack: (without the defence, with it).

    Images are decoded, and classified clean, once for all attacks. The first result is what
    ``zsr.engine.quick_eval.evaluate`` gives. ``zero_grad_frac`` is the share among the samples that are right without and
    with the defence, respectively.

    Args:
        head: of ``defended.model``.
        attacks: by label; None for no attack.
        num_samples: the head of the set's fixed subset order; 0 means all.
        seed: of the attacks' random starts; the defence's noise has its own.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    device = head.text_CD.device
    clean_2 = torch.zeros(2, dtype=torch.float64, device=device)
    counts = {label: torch.zeros(2, 2, dtype=torch.float64, device=device) for label in attacks}
    total = len(subset_ids(len(shards), num_samples))
    done = 0
    with input_gradients_only(defended.model.image, defended.frozen):
        for batch in eval_batches(
            shards, image_size=head.model.image_size, batch_size=batch_size, num_samples=num_samples
        ):
            image_BCHW, label_B = batch.image.to(device).float() / 255, batch.label.to(device)
            right_2B = _right(head, defended, image_BCHW, label_B, batch.key)
            clean_2 += right_2B.sum(1)
            rows_B = right_2B.any(0)
            keys = [batch.key[i] for i in rows_B.nonzero().flatten().tolist()]
            done += len(batch)
            for label, attack in attacks.items():
                if attack is not None and keys:
                    attacked = attack_rows(head, attack, image_BCHW, label_B, batch.key, rows_B, seed)
                    still_2B = _right(head, defended, attacked.image_BCHW, label_B[rows_B], keys)
                    counts[label][:, _ROBUST] += (right_2B[:, rows_B] & still_2B).sum(1)
                    counts[label][:, _ZERO_GRAD] += (right_2B[:, rows_B] & attacked.zero_grad_B).sum(1)
                if progress is not None:
                    progress(label, done, total)

    def result(label: str, clean: float, robust: float, zero_grad: float) -> EvalResult:
        bare = attacks[label] is None
        return EvalResult(
            clean_acc=clean / total,
            robust_acc=None if bare else robust / total,
            zero_grad_frac=None if bare else zero_grad / max(clean, 1.0),
            num_samples=total,
            num_classes=len(head.text_CD),
        )

    bare, behind = clean_2.tolist()
    return {
        label: (result(label, bare, *counted[0].tolist()), result(label, behind, *counted[1].tolist()))
        for label, counted in counts.items()
    }


def _right(head: ZeroShotHead, defended: DefendedCLIP, image_BCHW: Tensor, label_B: Tensor, keys: list[str]) -> Tensor:
    """Whether each prediction is right, bool ``[2, B]``: without the defence, with it."""
    with torch.no_grad():
        bare_B = head(image_BCHW).argmax(-1) == label_B
        defended_B = head.logits(defended.encode_image(image_BCHW, keys).embed_BD).argmax(-1) == label_B
    return torch.stack([bare_B, defended_B])
