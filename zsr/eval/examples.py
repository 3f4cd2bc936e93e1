"""A few attacked images of a measurement, kept beside its card for people to look at.

An ``.npz`` file with ``clean`` uint8 [n, H, W, 3], ``attacked`` float32 [n, H, W, 3] in [0, 1], ``key``, ``label``,
``clean_pred``, ``attacked_pred``, ``class_names`` and ``id``, the samples' numbers. While the measurement goes on it holds
``attacked`` and ``id`` alone: an image that is in the ledger is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from zsr.eval.images import Images
from zsr.eval.ledger import Line

MOST = 8


class Examples:
    """Attacked images by sample. Without a path they stay in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.attacked: dict[int, np.ndarray] = {}
        if path is not None and path.is_file():
            with np.load(path) as found:
                self.attacked = dict(zip(found["id"].tolist(), found["attacked"], strict=True))

    def add(self, line: Line, kept: Mapping[int, np.ndarray]) -> None:
        """Take over what a batch gave; a survivor keeps what the first stage made of it.

        Args:
            kept: float32 [C, H, W] by sample.
        """
        success = dict(zip(line.ids, line.success, strict=True))
        for sample, image_CHW in kept.items():
            if line.stage == 0 or success[sample]:
                self.attacked[sample] = np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
        if self.path is not None:
            _save(self.path, id=np.asarray(sorted(self.attacked)), attacked=self._stack())

    def write(
        self, path: Path, images: Images, clean_pred: np.ndarray, attacked_pred: np.ndarray, class_names: Sequence[str]
    ) -> None:
        """Store the finished examples of one judge.

        Args:
            clean_pred, attacked_pred: int [samples], in the order of ``images.ids``.
        """
        if not self.attacked:
            return
        samples = sorted(self.attacked, key=lambda sample: images.keys[sample])
        batch, rows = images.batch(samples), np.searchsorted(images.ids, samples)
        _save(
            path,
            clean=batch.image.numpy().transpose(0, 2, 3, 1),
            attacked=np.stack([self.attacked[sample] for sample in samples]),
            key=np.asarray(batch.key),
            label=batch.label.numpy(),
            clean_pred=clean_pred[rows],
            attacked_pred=attacked_pred[rows],
            class_names=np.asarray(list(class_names)),
            id=np.asarray(samples),
        )

    def _stack(self) -> np.ndarray:
        return np.stack([self.attacked[sample] for sample in sorted(self.attacked)])


def _save(path: Path, **arrays: np.ndarray) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
