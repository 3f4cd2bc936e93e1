"""How epsilon moves over training: pure functions of progress in [0, 1], as a factor on the attack's own epsilon."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import SCHEDULES

Fraction = Annotated[float, Field(ge=0, le=1)]


class ScheduleConfig(PluginConfig):
    """Settings of one schedule."""


ScheduleT = TypeVar("ScheduleT", bound=ScheduleConfig)


class Schedule(Plugin[ScheduleT]):
    """A factor in [0, 1] for every progress in [0, 1]."""

    registry = SCHEDULES

    def factor(self, progress: float) -> float:
        raise TypeError(f"{type(self).__name__} does not say its factor")


class ConstantConfig(ScheduleConfig):
    name: Literal["constant"] = "constant"


class Constant(Schedule[ConstantConfig]):
    """Always the full epsilon."""

    def factor(self, progress: float) -> float:
        return 1.0


class LinearConfig(ScheduleConfig):
    name: Literal["linear"] = "linear"
    start: Fraction = 0.0
    end: Fraction = 1.0


class Linear(Schedule[LinearConfig]):
    """A straight line from ``start`` to ``end``."""

    def factor(self, progress: float) -> float:
        # Written as a weighted mean so that both ends are exact and no rounding leaves [start, end].
        return (1 - progress) * self.config.start + progress * self.config.end


class CosineConfig(ScheduleConfig):
    name: Literal["cosine"] = "cosine"
    start: Fraction = 0.0
    end: Fraction = 1.0


class Cosine(Schedule[CosineConfig]):
    """Half a cosine wave from ``start`` to ``end``: slow, fast, slow."""

    def factor(self, progress: float) -> float:
        risen = (1 - math.cos(math.pi * progress)) / 2
        return (1 - risen) * self.config.start + risen * self.config.end


class StepConfig(ScheduleConfig):
    name: Literal["step"] = "step"
    at: tuple[Fraction, ...] = (0.5,)
    """Progress at which the factor changes, increasing."""
    factors: tuple[Fraction, ...] = (0.5, 1.0)
    """The factor before the first change, after it, ...: one more than ``at``."""

    @model_validator(mode="after")
    def _fits(self) -> StepConfig:
        if len(self.factors) != len(self.at) + 1:
            raise ValueError(f"factors has {len(self.factors)} entries; {len(self.at)} changes need {len(self.at) + 1}")
        if list(self.at) != sorted(self.at):
            raise ValueError(f"at={list(self.at)} should increase")
        return self


class Step(Schedule[StepConfig]):
    """Jumps at fixed points of training."""

    def factor(self, progress: float) -> float:
        return self.config.factors[sum(progress >= change for change in self.config.at)]


class WarmupConfig(ScheduleConfig):
    name: Literal["warmup"] = "warmup"
    start: Fraction = 0.0
    until: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Progress at which the full epsilon is reached."""


class Warmup(Schedule[WarmupConfig]):
    """A straight line up to the full epsilon, then constant."""

    def factor(self, progress: float) -> float:
        risen = min(progress / self.config.until, 1.0)
        return (1 - risen) * self.config.start + risen
