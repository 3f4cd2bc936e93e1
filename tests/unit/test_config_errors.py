"""What is wrong is said in one sentence: dotted path, value, what was expected, the closest name."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from zsr.config import Config, ConfigError, Plugin, PluginConfig, PluginField, Registry, Weight, describe_errors
from zsr.config.errors import closest_path
from zsr.config.plugins import ConfigT

SHAPES = Registry("shape", "json")  # any package without plug-ins; the two below register themselves


class RoundConfig(PluginConfig):
    name: Literal["round"] = "round"
    radius: Weight = 1.0

    @model_validator(mode="after")
    def _fits(self) -> RoundConfig:
        if self.radius > 10:
            raise ValueError(f"radius={self.radius:g} is larger than the sheet; use at most 10")
        return self


class SquareConfig(PluginConfig):
    name: Literal["square"] = "square"
    side_length: Weight = 1.0


class Shape(Plugin[ConfigT]):
    registry = SHAPES


class Round(Shape[RoundConfig]):
    pass


class Square(Shape[SquareConfig]):
    pass


class Sheet(Config):
    width: Annotated[int, Field(ge=1, lt=100)] = 10
    unit: Literal["mm", "inch"] = "mm"
    title: str | None = None


class Drawing(Config):
    sheet: Sheet = Sheet()
    shape: Annotated[PluginConfig, PluginField(SHAPES)] = Field(default="round", validate_default=True)
    thick: bool = False


def sentences(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate(tree)
    return describe_errors(caught.value, tree, Drawing)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"sheet": {"width": 0}}, "sheet.width=0: should be at least 1"),
        ({"sheet": {"width": 100}}, "sheet.width=100: should be below 100"),
        ({"sheet": {"width": "wide"}}, "sheet.width='wide': should be a whole number"),
        ({"sheet": {"width": 1.5}}, "sheet.width=1.5: should be a whole number"),
        ({"sheet": {"width": None}}, "sheet.width=null: should be a whole number"),
        ({"sheet": {"unit": "cm"}}, "sheet.unit='cm': should be 'mm' or 'inch'"),
        ({"sheet": {"title": 5}}, "sheet.title=5: should be text"),
        ({"sheet": 3}, "sheet=3: should be a group of settings"),
        ({"thick": "very"}, "thick='very': should be true or false"),
        ({"sheet": {"widht": 3}}, "sheet.widht=3: there is no such setting; did you mean sheet.width?"),
        ({"width": 3}, "width=3: there is no such setting; did you mean sheet.width?"),
        ({"shet": {"width": 3}}, "shet.width=3: there is no such setting; did you mean sheet.width?"),
        ({"zzz": 3}, "zzz=3: there is no such setting; there are shape, sheet, thick"),
        ({"shape": {"name": "rond"}}, "shape.name='rond': is not a known shape; did you mean 'round'?"),
        ({"shape": "rond"}, "shape='rond': is not a known shape; did you mean 'round'?"),
        ({"shape": {"radius": 3}}, "shape: needs a name; there are round, square"),
        ({"shape": {"name": "round", "radius": -1}}, "shape.radius=-1: should be at least 0"),
        ({"shape": {"name": "round", "radius": "1/0"}}, "shape.radius='1/0': should be a number or a fraction"),
        ({"shape": {"name": "round", "radius": 11}}, "shape.radius=11 is larger than the sheet; use at most 10"),
        (
            {"shape": {"name": "square", "radius": 3}},
            "shape.radius=3: is a setting of shape.name=round, not of square",
        ),
        (
            {"shape": {"name": "square", "side": 3}},
            "shape.side=3: there is no such setting; did you mean shape.side_length?",
        ),
    ],
)
def test_one_sentence_with_path_value_and_way_out(tree: dict[str, Any], sentence: str) -> None:
    (said,) = sentences(tree)
    assert said.startswith(sentence)
    assert "\n" not in said


def test_every_problem_is_told_at_once() -> None:
    assert len(sentences({"sheet": {"width": 0, "unit": "cm"}, "shape": {"name": "round", "radius": -1}})) == 3


def test_long_values_are_cut() -> None:
    (said,) = sentences({"sheet": {"unit": "x" * 500}})
    assert len(said) < 150


def test_config_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert error.problems == ["one", "two"]
    assert str(error) == "one\ntwo"
    assert ConfigError("alone").problems == ["alone"]


def test_closest_path_prefers_the_same_last_word() -> None:
    known = ["train.epochs", "optim.lr", "eval.attack.steps", "attack.steps"]
    assert closest_path("lr", known) == "optim.lr"
    assert closest_path("atack.steps", known) == "attack.steps"
    assert closest_path("nothing_like_it", known) is None
