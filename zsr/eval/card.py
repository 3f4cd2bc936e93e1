"""Result cards: one JSON file for each model x dataset x attack x epsilon, with all that a reader needs to believe it.

Two numbers may stand in one column of a table only if their cards' ``column`` agrees: a digest of the protocol, the dataset's
section (subset, class names, templates) and the attack. What makes a row is the model, and the defence in front of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from zsr.attacks.checks import Finding
from zsr.config.base import Config

CARD_FORMAT = "zsr-card-1"
VERSION = 3
"""Of the code that makes verdicts: attacks, defences, preprocessing. Raise it with every change after which the same settings
may give other verdicts, so that no card and no half-done measurement of before stands for one of after."""

Z95 = 1.96
"""Standard deviations of a normal variable that 95 % lie within."""

Fraction01 = Annotated[float, Field(ge=0, le=1)]
Knowledge = Literal["white-box", "oblivious", "adaptive"]
"""What the attack knew: all of a bare model; the bare model behind a defence, but not the defence; the defence too."""


class Share(Config):
    """A share of samples with its 95 % interval: Wilson's, of the value shown."""

    count: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=1)]
    value: Fraction01
    """count / total; under ``metric: mean_per_class`` the mean of the classes' own shares."""
    low: Fraction01
    high: Fraction01

    @staticmethod
    def of(count: int, total: int, value: float | None = None, worth: float | None = None) -> Share:
        """A share with its interval.

        Args:
            value: where it is not count / total.
            worth: number of samples whose plain share would be as certain as the value; ``total`` by default.
        """
        value, worth = count / total if value is None else value, total if worth is None else worth
        low, high = wilson_interval(value, worth)
        return Share(count=count, total=total, value=value, low=low, high=high)


class ProtocolInfo(Config):
    """How it was measured, whatever the set and the model."""

    suite: str | None
    """Name of the suite's protocol; None for sets named one by one."""
    metric: Literal["accuracy", "mean_per_class"]
    resolution: Literal["model", "native", "224"]
    """Where epsilon applies: at the size that the model reads, at the set's own, or at 224 pixels."""
    preprocessing: str
    normalization: str
    precision: Literal["fp32", "bf16"]
    """Of the attack's passes. Verdicts are in float32 always."""


class DatasetInfo(Config):
    """What was measured on."""

    key: str
    """The registry's name, or the address where it has none."""
    split: str
    title: str
    address: str
    samples: int
    """Number measured."""
    of: int
    """Number that the set has."""
    subset_digest: str
    """Of the keys and labels measured, in order, and of the shards that hold them."""
    classes: int
    classes_digest: str
    templates: list[str]
    templates_digest: str
    chance: Fraction01
    chance_level: bool = False
    """A constant prediction scores like a robust model here."""
    pixels: int
    """Side of the square that was attacked."""


class ModelInfo(Config):
    """Whose number it is."""

    name: str
    """As the user named it."""
    label: str
    """For tables: short."""
    arch: str
    weights_digest: str
    """Of the image tower and the text features' map."""
    image_size: int
    logit_scale: float
    objective: str | None = None
    """What it was fine-tuned with; None for a model that zsr did not train, or where that is not known."""
    trained_on: str | None = None


class DefenseInfo(Config):
    """The test-time defence in front of the model."""

    name: str
    settings: dict[str, Any]
    gate: str
    """Which weights gate it: a model's name and digest."""
    cost_units: int
    seed: int


class AttackInfo(Config):
    """What the images went through."""

    name: str
    title: str
    """For tables: ``AutoAttack standard (apgd-ce, apgd-t, fab-t, square)``, ``PGD-20``."""
    norm: Literal["linf", "l2"]
    eps: Annotated[float, Field(ge=0)]
    eps_text: str
    """As a person writes it: 4/255."""
    settings: dict[str, Any]
    """Everything else, defaults included."""
    stages: list[str] = Field(default_factory=list)
    knowledge: Knowledge = "white-box"
    crafted_on: str = "served"
    """Which texts the attack saw: those that judge (served), or others, in words."""


class Cost(Config):
    """What it took: clean predictions and attack, without the probes."""

    seconds: float
    images_per_s: float
    encoder_passes: int
    """Image-encoder forward and backward passes, one for each image."""
    device: str
    workers: int = 1
    clean_seconds: float = 0
    """Of ``seconds``: the clean predictions, which every card of the model on the set repeats. 0 in cards that do not say."""
    clean_passes: int = 0
    shared_by: Annotated[int, Field(ge=1)] = 1
    """Cards that came of the attack's one run; each gives the whole of it."""
    probe_seconds: float = 0
    """Besides: the checks that ran attacks of their own."""
    probe_passes: int = 0


class ResultCard(Config):
    """One measurement."""

    format: Literal["zsr-card-1"] = CARD_FORMAT  # type: ignore[assignment]
    id: str
    """Digest of everything that decides the verdicts; the same measurement twice has the same id."""
    column: str
    protocol: ProtocolInfo
    dataset: DatasetInfo
    model: ModelInfo
    defense: DefenseInfo | None = None
    attack: AttackInfo | None = None
    """None for clean accuracy alone."""
    seed: int
    clean: Share
    robust: Share | None = None
    survivors: dict[str, Share] = Field(default_factory=dict)
    """Still right after each stage of the attack."""
    checks: list[Finding] = Field(default_factory=list)
    cost: Cost
    environment: dict[str, str]
    """Versions of zsr, torch and open_clip, the commit, the platform."""
    created: str
    """UTC, ISO 8601."""

    @property
    def believed(self) -> bool:
        """Whether no check failed."""
        return all(finding.level != "fail" for finding in self.checks)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def column_id(protocol: ProtocolInfo, dataset: DatasetInfo, attack: AttackInfo | None) -> str:
    """What two cards must share to stand in one column."""
    part = dataset.model_dump(include={"key", "split", "subset_digest", "classes_digest", "templates_digest", "pixels"})
    attacked = None if attack is None else [attack.model_dump(exclude={"eps_text"}), VERSION]
    return digest_of(protocol.model_dump(), part, attacked)


def digest_of(*parts: Any) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def card_schema() -> dict[str, Any]:
    """The JSON schema of a card."""
    return ResultCard.model_json_schema()


def write_card(card: ResultCard, path: Path) -> None:
    """Store a card so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(card.to_json(), encoding="utf-8")
    part.replace(path)


def read_card(path: Path) -> ResultCard:
    """Read a card.

    Raises:
        ValueError: the file is no card; the sentence says which file and why.
    """
    try:
        return ResultCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3]]
        raise ValueError(
            f"{path} is no result card ({'; '.join(faults)}); `zsr eval schema` prints what one has"
        ) from None


def find_cards(places: Iterable[Path]) -> list[ResultCard]:
    """Every card in these files and folders (looked through whole), each once, the newest of several copies, oldest first.

    Raises:
        ValueError: a place does not exist, a ``*.card.json`` in it is no card, or two of one measurement have other numbers.
    """
    found: dict[str, tuple[ResultCard, Path]] = {}
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: there is no such file or folder")
        for path in [place] if place.is_file() else sorted(place.rglob("*.card.json")):
            card = read_card(path)
            known, where = found.get(card.id, (card, path))
            if _numbers(known) != _numbers(card):
                raise ValueError(
                    f"{where} and {path} are one measurement (id {card.id}) with different numbers; remove the wrong one"
                )
            found[card.id] = max((known, where), (card, path), key=lambda pair: pair[0].created)
    return sorted((card for card, _ in found.values()), key=lambda card: card.created)


def _numbers(card: ResultCard) -> tuple[Share, Share | None, dict[str, Share]]:
    return card.clean, card.robust, card.survivors


def wilson_interval(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share; sound at 0 and 1, where the usual one has no width."""
    if count == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
