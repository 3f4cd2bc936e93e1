"""What the data files in ``datasets/`` and ``protocols/`` say, field by field.

``unknown`` stands where neither the design pages nor a package of this environment gives the answer: nothing is guessed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from zsr.config.base import Config, PixelUnits

Unknown = Literal["unknown"]
Count = Annotated[int, Field(ge=1)] | Unknown
Key = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
SplitName = Literal["test", "val", "all"]
Metric = Literal["accuracy", "mean_per_class"]

NameSource = Literal["from_set", "open_clip:imagenet", "open_clip:imagenet-a", "open_clip:imagenet-r", "timm:imagenet"]
"""Where class names come from: the set's own classnames.txt (or index.json), open_clip's list of OpenAI's curated names (for -A
and -R those of their 200 classes, which timm lists), or the first name that WordNet gives, as timm ships them."""

NameRule = Literal["lower", "spaces", "drop_year", "boeing"]
"""lower: lower case; spaces: for ``_ - /``; drop_year: a year at the end goes; boeing: before a name that begins with 7."""


class Split(Config):
    """A part of a set that protocols measure on."""

    samples: Count
    counts_from: str
    """Who says so."""
    published_as: Annotated[str, Field(pattern=r"^wds_[a-z0-9_\-]+/test$")] | None = None
    """Folder of CLIP_benchmark's publication that is this part; without, a person converts it."""
    made_with: str | None = None
    """Command that makes it, but for where: ``--out ROOT`` is added."""
    address: Annotated[str, Field(pattern="^zsr:")] | None = None
    """Of a set inside this package."""


class PromptSet(Config):
    """How one line of papers words a set."""

    templates: Annotated[list[str], Field(min_length=1)] | Literal["from_set", "open_clip"]
    """Prompts with ``{}`` for the class; the set's own; or the 80 of open_clip for ImageNet."""
    classes: list[str] | NameSource | None = None
    """Instead of the set's class names; PCAM's are whole sentences."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Before the rules."""
    rules: list[NameRule] = Field(default_factory=list)
    duplicates: list[str] = Field(default_factory=list)
    """Names that two or more classes share: their prompts are identical, which caps accuracy."""
    note: str = ""

    @model_validator(mode="after")
    def _has_a_slot(self) -> PromptSet:
        for template in self.templates if isinstance(self.templates, list) else []:
            if template.count("{}") != 1 or len(re.findall("[{}]", template)) != 2:
                raise ValueError(f"templates: {template!r} should have {{}} for the class name once")
        return self


class DatasetCard(Config):
    """One test set: ``datasets/<key>.yaml``."""

    key: Key
    title: str
    num_classes: Count
    classes: list[str] | NameSource
    """In the order of the labels."""
    metric: Metric
    """What is customary for the set; a protocol may say otherwise."""
    splits: Annotated[dict[SplitName, Split], Field(min_length=1)]
    prompts: Annotated[dict[Key, PromptSet], Field(min_length=1)]
    source: str
    """Where a person gets the images."""
    licence: str
    native_size: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels of the square images as they are stored; None where they differ, or are larger than a model reads."""
    superclasses: dict[str, list[str]] | Literal["emoji_groups"] | None = None
    """Each with its classes, for attacks that aim at superclasses (zsr/data/suite/superclasses.py)."""
    chance_level: bool = False
    """A constant prediction scores like a robust model here: averages are given without the set too (METHODS.md b.11)."""
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agrees(self) -> DatasetCard:
        lists = {"classes": self.classes} | {f"prompts.{style}": p.classes for style, p in self.prompts.items()}
        for where, names in lists.items():
            if isinstance(names, list) and len(names) != self.num_classes:
                raise ValueError(f"{where} lists {len(names)} class names, but num_classes={self.num_classes}")
        if isinstance(self.superclasses, dict):
            grouped = [name for names in self.superclasses.values() for name in names]
            if not isinstance(self.classes, list) or sorted(grouped) != sorted(self.classes):
                raise ValueError("superclasses should have each of the classes once")
        return self


class AttackEntry(Config):
    """An attack of a protocol, in the words of zsr's own attack settings."""

    name: Literal["pgd", "cw", "autoattack"]
    eps: list[PixelUnits] | Unknown
    """Budgets in pixel units, L-inf."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """As ``attack.<setting>``; what is neither here nor in ``unknown`` is zsr's default."""
    unknown: list[str] = Field(default_factory=list)
    """Settings that the paper's code has and that are not known here."""
    note: str = ""


class Protocol(Config):
    """What is measured together, and how: ``protocols/<key>.yaml``."""

    key: Key
    title: str
    source: str
    datasets: Annotated[dict[Key, SplitName], Field(min_length=1)]
    prompts: Annotated[list[Key], Field(min_length=1)]
    """Wordings in order of preference: a set uses the first one that its file has."""
    metric: Metric | Literal["as_dataset"]
    attack_resolution: Literal["native", "224", "model"]
    """Where epsilon applies: to the image as stored, at 224 pixels, or at whatever size the model reads."""
    normalization: str
    preprocessing: str
    training_set: Key | Unknown | None
    """Of the models that the paper reports: leaves an average. None: the method does not train."""
    num_samples: int | None = None
    """Images of each set; all without."""
    averages: dict[Key, list[str]]
    """Each leaves something out: sets by key, or ``chance_level`` or ``training_set``."""
    attacks: list[AttackEntry]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _averages_leave_out_what_there_is(self) -> Protocol:
        for name, without in self.averages.items():
            strange = set(without) - {"chance_level", "training_set"} - set(self.datasets)
            if strange:
                raise ValueError(f"averages.{name} leaves out {', '.join(sorted(strange))}, which the protocol has not")
        return self
