"""zsr's own step on made-up images: the trainer's, with everything around a step left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zsr.bench.passes import Passes, count_passes
from zsr.config import RunConfig, load_config
from zsr.data.pipeline import Batch
from zsr.engine.checkpoint import TrainState
from zsr.engine.loop import Trainer
from zsr.engine.meters import Meters
from zsr.engine.optim import make_optimizer
from zsr.engine.step import TrainStep
from zsr.models import RobustCLIP, TextBank


class BenchTrainer(Trainer):
    """A trainer without data sets: its steps are those of a run, on a batch that is handed in.

    Args:
        config: of a run.
        model: weights as they come; trained.
        class_names: C of them.
        template: prompt with ``{}``.
    """

    def __init__(self, config: RunConfig, model: RobustCLIP, class_names: Sequence[str], template: str) -> None:
        self.config, self.model = config, model
        self.device = model.text_projection.device
        self.step_fn = TrainStep(config, model, TextBank(model), class_names, [template])
        self.optimizer = make_optimizer(config.optim, self.step_fn.parameters, self.step_fn.text_parameters)
        self.total_steps = 1_000_000  # settings that depend on progress stay where a run starts
        self.meters = Meters()
        self.state = TrainState()
        model.train()

    def step(self, batch: Batch) -> None:
        """One optimizer step, as in a run."""
        self._step(batch)

    def step_counted(self, batch: Batch) -> Passes:
        """The same, with its encoder passes counted."""
        encoders = [self.model.image] if self.step_fn.frozen is None else [self.model.image, self.step_fn.frozen]
        with count_passes(len(batch), *encoders) as passes:
            self.step(batch)
        return passes

    def last_loss(self) -> float:
        """Mean loss of the steps since it was last asked for."""
        return self.meters.read()["train/loss"]


def make_config(
    objective: str, model_name: str, batch_size: int, precision: str = "fp32", overrides: Sequence[str] = ()
) -> RunConfig:
    """A run with the published attack: PGD-2, eps and step 1/255.

    Raises:
        ValueError: no such objective or model settings.
    """
    pretrained = [] if ":" in model_name else ["model.pretrained=random"]
    return load_config(
        "default",
        [
            f"model.name={model_name}",
            *pretrained,
            f"objective={objective}",
            "attack=pgd",
            "attack.eps=1/255",
            "attack.step_size=1/255",
            "attack.steps=2",
            f"train.precision={precision}",
            f"train.batch_size={batch_size}",
            "train.cache_frozen=true",
            "optim.lr=1e-5",
            *overrides,
        ],
    )


def make_batch(batch_size: int, num_classes: int, image_size: int) -> Batch:
    """Seeded noise with labels that take turns."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    return Batch(image, torch.arange(batch_size) % num_classes, [f"bench{i}" for i in range(batch_size)])


def class_names(count: int) -> list[str]:
    return [f"object number {i}" for i in range(count)]
