"""zsr's step against the official loops': pairs taken in turns, so that a busy machine slows both alike."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from zsr.attacks.noise import sample_seeds
from zsr.bench.ours import BenchTrainer, class_names, make_batch, make_config
from zsr.bench.rate import matmul_rate, synchronize, tower_macs
from zsr.bench.reference import ATTACK_STEPS, OFFICIAL, TEMPLATE, OfficialStep
from zsr.config.schema import Precision
from zsr.data.pipeline import Batch
from zsr.models import RobustCLIP, load_model
from zsr.models.fast_last_block import skipped_macs

SETTINGS = {"tiny-imagenet": (16, 25), "imagenet": (16, 62)}
"""Batch and classes: those of the papers (128 and 200, 256 and 1000), both divided so that a step takes seconds on CPU."""
BARS = {
    ("tecoa", "tiny-imagenet"): 2.3,
    ("tecoa", "imagenet"): 4.2,
    ("tga_zsr", "tiny-imagenet"): 2.5,
    ("pmg_aft", "tiny-imagenet"): 2.5,
}
"""Least ratio of images/s at the same precision, on CPU."""
BEST_BAR = 5.0
"""Least ratio of zsr's best precision to theirs in fp32, which is what theirs can do on a CPU; on a GPU they train in half
precision, and ``--dtype bf16`` is the comparison to make."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

Progress = Callable[[str, int, int], None]
"""What is measured, timed steps done, timed steps in all."""


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median(values), low, high)


@dataclass(frozen=True)
class Row:
    """One objective's step.

    Attributes:
        precision: of ours; theirs runs in ``their_precision``.
        images_per_s: ours.
        their_images_per_s: the official loop's; None where there is none.
        ratio: ours over theirs, from pairs taken one after the other.
        passes: encoder passes of the first step, counted.
        cost_units: what the objective says of it.
        warm_passes: of the steps that were timed: less where frozen features are kept by sample.
        share: of the rate of matrix products that was measured beside each step.
        bar: the least ratio asked for; None for no bar.
    """

    objective: str
    precision: Precision
    their_precision: Precision
    images_per_s: Spread
    their_images_per_s: Spread | None
    ratio: Spread | None
    passes: float
    cost_units: int
    warm_passes: float
    share: Spread
    bar: float | None = None

    @property
    def reached(self) -> bool:
        counted = abs(self.passes - self.cost_units) < 1e-6
        return counted and (self.bar is None or (self.ratio is not None and self.ratio.median >= self.bar))


def compare(
    objective: str,
    *,
    setting: str | None,
    model_name: str,
    batch_size: int,
    num_classes: int,
    precision: Precision = "fp32",
    device: str = "cpu",
    repeats: int = 5,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """Measure one objective; in fp32 a second row has ours in bf16 against theirs in fp32.

    Args:
        setting: key of :data:`SETTINGS` whose bars apply; None for none.
        overrides: further settings of our run.

    Raises:
        ValueError: unknown objective or model.
    """
    ours_in: list[Precision] = [precision, "bf16"] if precision == "fp32" else [precision]
    names = class_names(num_classes)
    plain = _load(objective, model_name, batch_size, device, "fp32", ("model.fast_layers=false",))
    batch = make_batch(batch_size, num_classes, plain.image_size).to(device)
    ours = {}
    for kind in ours_in:
        config = make_config(objective, model_name, batch_size, kind, overrides)
        ours[kind] = BenchTrainer(
            config, _load(objective, model_name, batch_size, device, kind, overrides), names, TEMPLATE
        )
    # Passes with patch tokens do a little more than this: the share errs to the low side.
    any_of_ours = next(iter(ours.values())).model.image.visual
    macs = (tower_macs(plain) - skipped_macs(any_of_ours)) * batch_size
    theirs = OFFICIAL[objective].of(plain, names, precision == "bf16") if objective in OFFICIAL else None

    cold = {kind: trainer.step_counted(batch).units for kind, trainer in ours.items()}
    warm = {kind: trainer.step_counted(batch).units for kind, trainer in ours.items()}
    times: dict[str, list[float]] = {kind: [] for kind in (*ours, "theirs")}
    shares: dict[str, list[float]] = {kind: [] for kind in ours}
    _say(progress, objective, 0, repeats)
    if theirs is not None:
        _time(theirs, batch, device)  # warms up
    for done in range(repeats):
        for kind, trainer in ours.items():
            rate = matmul_rate(plain, batch_size, DTYPES[kind])
            times[kind].append(_time(trainer, batch, device))
            shares[kind].append(warm[kind] * macs / times[kind][-1] / rate)
        if theirs is not None:
            times["theirs"].append(_time(theirs, batch, device))
        _say(progress, objective, done + 1, repeats)

    def per_second(kind: str) -> Spread:
        return Spread.of([batch_size / seconds for seconds in times[kind]])

    rows = []
    for kind, trainer in ours.items():
        best = kind != precision
        rows.append(
            Row(
                objective,
                kind,
                precision,
                per_second(kind),
                None if theirs is None else per_second("theirs"),
                None if theirs is None else Spread.of([b / a for a, b in zip(times[kind], times["theirs"])]),
                cold[kind],
                trainer.step_fn.objective.cost_units(ATTACK_STEPS),
                warm[kind],
                Spread.of(shares[kind]),
                _bar(objective, setting, best) if precision == "fp32" and device == "cpu" else None,
            )
        )
    del ours, theirs, plain
    gc.collect()
    return rows


def _bar(objective: str, setting: str | None, best: bool) -> float | None:
    bar = BARS.get((objective, setting or ""))
    return BEST_BAR if best and bar is not None else bar


def _load(
    objective: str, model_name: str, batch_size: int, device: str, precision: Precision, overrides: Sequence[str]
) -> RobustCLIP:
    torch.manual_seed(0)  # random weights are the same in every copy
    config = make_config(objective, model_name, batch_size, precision, overrides)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip's, of random weights
    try:
        return load_model(config.model, precision, device)
    finally:
        logging.disable(disabled)


def _time(step: BenchTrainer | OfficialStep, batch: Batch, device: str) -> float:
    synchronize(torch.device(device))
    began = time.perf_counter()
    if isinstance(step, BenchTrainer):
        step.step(batch)
    else:
        step(batch.image.float() / 255, batch.label, sample_seeds(batch.key, "train", 0, 0))
    synchronize(torch.device(device))
    return time.perf_counter() - began


def _say(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
