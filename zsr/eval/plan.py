"""What one call of ``zsr eval`` measures: models, sets, attacks and budgets, and the card that each gives.

A card's id is a digest of all that decides its verdicts. It is known before anything is measured, so that what is there is
not measured again, and a ledger belongs to one card for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zsr.attacks.base import Attack
from zsr.attacks.checks import PROBES
from zsr.config.schema import Precision
from zsr.data.shards import ShardSet
from zsr.data.suite import Dataset
from zsr.eval.card import (
    VERSION,
    AttackInfo,
    DatasetInfo,
    DefenseInfo,
    Knowledge,
    ModelInfo,
    ProtocolInfo,
    column_id,
    digest_of,
    read_card,
)
from zsr.eval.defended import DefendedCLIP
from zsr.eval.images import Images
from zsr.models import RobustCLIP, TextBank

Resolution = Literal["model", "native", "224"]
_CLASSIC = 224
_PREPROCESSING = {
    "model": "shorter side to what the model reads (bicubic), central square, before the attack",
    "native": "sets of small images as stored, others to 224 pixels, before the attack; to what the model reads (bicubic) "
    "inside the attacked function",
    "224": "shorter side to 224 pixels (bicubic), central square, before the attack; to what the model reads (bicubic) "
    "inside the attacked function",
}


@dataclass(frozen=True)
class Subject:
    """A loaded model, and the defence in front of it if there is one."""

    info: ModelInfo
    model: RobustCLIP
    bank: TextBank
    defended: DefendedCLIP | None = None
    defense: DefenseInfo | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of its cards."""
        return f"{file_name(self.info.label)}-{self.info.weights_digest}"


@dataclass(frozen=True)
class TestSet:
    """A set as it is measured.

    Attributes:
        key: the registry's name, or the address.
        native: side of its images as stored, where they are small squares.
        num_samples: 0 takes all.
        differences: of the whole set from what the registry knows of its counts; None where it knows nothing.
    """

    key: str
    split: str
    title: str
    shards: ShardSet
    classes: Sequence[str]
    templates: Sequence[str]
    metric: Literal["accuracy", "mean_per_class"] = "accuracy"
    chance_level: bool = False
    resolution: Resolution = "model"
    native: int | None = None
    num_samples: int = 0
    suite: str | None = None
    differences: Sequence[str] | None = None
    __test__ = False  # no class of tests, whatever pytest thinks of its name

    @staticmethod
    def of_suite(
        dataset: Dataset, shards: ShardSet, *, suite: str | None, resolution: Resolution, num_samples: int
    ) -> TestSet:
        """A set of the registry, worded as its protocol says.

        Raises:
            ValueError: its classes or templates cannot be found.
        """
        return TestSet(
            key=dataset.key,
            split=dataset.split,
            title=dataset.card.title,
            shards=shards,
            classes=dataset.classes(shards),
            templates=dataset.templates(shards),
            metric=dataset.metric,
            chance_level=dataset.card.chance_level,
            resolution=resolution,
            native=dataset.card.native_size,
            num_samples=num_samples,
            suite=suite,
            differences=dataset.differences(shards.index) if dataset.known_counts else None,
        )

    def pixels(self, image_size: int) -> int:
        """Side of the square that is attacked, for a model that reads ``image_size``."""
        if self.resolution == "model":
            return image_size
        return self.native if self.resolution == "native" and self.native else _CLASSIC

    @property
    def folder(self) -> str:
        """Name of the folder of its cards."""
        return f"{file_name(self.key)}-{self.split}"

    def protocol(self, precision: Precision) -> ProtocolInfo:
        return ProtocolInfo(
            suite=self.suite,
            metric=self.metric,
            resolution=self.resolution,
            preprocessing=_PREPROCESSING[self.resolution],
            normalization="the model's own, inside the attacked function",
            precision=precision,
        )

    def info(self, images: Images) -> DatasetInfo:
        return DatasetInfo(
            key=self.key,
            split=self.split,
            title=self.title,
            address=self.shards.address,
            samples=len(images),
            of=len(self.shards),
            subset_digest=images.digest,
            classes=len(self.classes),
            classes_digest=digest_of(list(self.classes)),
            templates=list(self.templates),
            templates_digest=digest_of(list(self.templates)),
            chance=1 / len(self.classes),
            chance_level=self.chance_level,
            pixels=images.pixels,
        )


@dataclass(frozen=True)
class Blank:
    """A card before its measurement: everything but the numbers."""

    protocol: ProtocolInfo
    dataset: DatasetInfo
    model: ModelInfo
    defense: DefenseInfo | None
    attack: AttackInfo | None
    seed: int

    @property
    def id(self) -> str:
        return digest_of(
            self.protocol.model_dump(),
            self.dataset.model_dump(include={"key", "split", "subset_digest", "classes_digest", "templates_digest", "pixels"}),
            self.model.model_dump(include={"weights_digest", "image_size", "logit_scale"}),
            None if self.defense is None else self.defense.model_dump(),
            None if self.attack is None else self.attack.model_dump(exclude={"title", "eps_text"}),
            self.seed,
            VERSION,
        )  # fmt: skip

    @property
    def column(self) -> str:
        return column_id(self.protocol, self.dataset, self.attack)

    @property
    def attacked_elsewhere(self) -> bool:
        """Whether the attack sees another classifier than this card's."""
        attack = self.attack
        return attack is not None and (attack.knowledge == "oblivious" or attack.crafted_on != "served")

    @property
    def stem(self) -> str:
        """Of its file: attack, budget and id."""
        if self.attack is None:
            return f"clean-{self.id}"
        return f"{self.attack.name}-{file_name(self.attack.eps_text)}-{self.id}"

    def without_attack(self) -> Blank:
        """The card of the same model's clean accuracy."""
        return Blank(self.protocol, self.dataset, self.model, self.defense, None, self.seed)


@dataclass(frozen=True)
class Job:
    """One run of an attack, or of none, and the cards that come of it.

    Attributes:
        cards: by judge. The last one's id owns the ledger.
    """

    folder: Path
    attack: Attack[Any] | None
    cards: Mapping[str, Blank]

    def path(self, judge: str) -> Path:
        return self.folder / f"{self.cards[judge].stem}.card.json"

    @property
    def owner(self) -> Blank:
        return list(self.cards.values())[-1]

    def there(self, judge: str, probes: bool) -> bool:
        """Whether a judge's card is there, with the expensive checks if they are wanted and it can have them.

        Raises:
            ValueError: the file is no card.
        """
        path, blank = self.path(judge), self.cards[judge]
        if not path.is_file() or not probes or blank.attack is None or blank.attacked_elsewhere:
            return path.is_file()
        card = read_card(path)
        return not card.clean.count or any(finding.id in PROBES for finding in card.checks)

    def done(self, probes: bool) -> bool:
        """Whether every card is there; with ``probes``, each that can have them with those."""
        return all(self.there(judge, probes) for judge in self.cards)


def attack_info(
    attack: Attack[Any], eps_text: str, title: str, knowledge: Knowledge, crafted_on: str = "served"
) -> AttackInfo:
    """What a card says of an attack."""
    config = attack.config
    settings = config.model_dump(mode="json", exclude={"name", "norm", "eps"})
    return AttackInfo(
        name=config.name,
        title=title,
        norm=config.norm,
        eps=config.eps,
        eps_text=eps_text,
        settings=settings,
        stages=list(attack.stages),
        knowledge=knowledge,
        crafted_on=crafted_on,
    )


def identify(
    model: RobustCLIP, name: str, label: str, objective: str | None = None, trained_on: str | None = None
) -> ModelInfo:
    """What a card says of a model."""
    return ModelInfo(
        name=name,
        label=label,
        arch=model.arch,
        weights_digest=weights_digest(model),
        image_size=model.image_size,
        logit_scale=round(float(model.logit_scale), 4),
        objective=objective,
        trained_on=trained_on,
    )


def weights_digest(model: RobustCLIP) -> str:
    """Twelve hex digits of everything in a model that decides a prediction: both towers, the text map, the normalization."""
    state = {
        name: value for name, value in model.open_clip.state_dict().items() if not name.endswith("text_projection")
    }
    own = {name: value for name, value in model.trained_state().items() if not name.startswith("visual.")}
    how = [model.preprocess["mean"], model.preprocess["std"], model.architecture.get("quick_gelu", False)]
    how += [getattr(module, "cap", None) for module in model.image.modules() if hasattr(module, "cap")]
    columns = model.image.columns
    digest = hashlib.sha256(json.dumps([how, None if columns is None else columns.share], default=list).encode())
    for name, value in sorted((state | own).items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def file_name(text: str) -> str:
    """The text as part of a file's name; long ones keep their end, and a digest of the whole."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")
    return plain if len(plain) <= 40 else f"{plain[-33:].lstrip('-.')}-{digest_of(text)[:6]}"
