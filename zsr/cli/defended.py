"""The defence options of zsr eval: which defence, with which settings, gated by which pre-trained model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsr.config.schema import Precision
    from zsr.defenses.base import DefenseConfig
    from zsr.eval import DefendedCLIP
    from zsr.eval.card import DefenseInfo
    from zsr.models import ImageTower, RobustCLIP


def read_defense(name: str | None, settings: Sequence[str], gate_model: str | None) -> DefenseConfig | None:
    """The settings of the defence that the options ask for; None without ``--defense``.

    Raises:
        ValueError: no such defence or setting, a value that is out of range, or settings of no defence.
    """
    from pydantic import ValidationError

    from zsr.config import DEFENSES, ConfigError, apply_overrides, describe_errors

    if name is None:
        for option, given in (("--defense-set", settings), ("--gate-model", gate_model)):
            if given:
                raise ValueError(f"{option}: needs a defence to belong to; add --defense {DEFENSES.names()[0]}")
        return None
    try:
        config_class = DEFENSES.config_class(name)
    except ValueError as error:
        raise ValueError(f"--defense {name}: {error}") from None
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"--defense-set {setting}: should be key=value, such as threshold=0.1")
    tree = {"name": name, **apply_overrides({}, settings)}
    try:
        return config_class.model_validate(tree)  # type: ignore[return-value]
    except ValidationError as error:
        sentences = describe_errors(error, tree, config_class)
        raise ConfigError(f"--defense-set {sentence}" for sentence in sentences) from None


@dataclass(frozen=True)
class Identity:
    """Which weights a number belongs to: published comparisons went wrong where nobody could tell.

    Attributes:
        model: as the user named it, or as a checkpoint did.
        image_sha256: of the image tower's weights, twelve hex digits.
    """

    model: str
    image_sha256: str

    def __str__(self) -> str:
        return f"{self.model}, image tower {self.image_sha256}"


@dataclass(frozen=True)
class Guarded:
    """A model behind its defence, and what has to be said about the two."""

    defended: DefendedCLIP
    victim: Identity
    gate: Identity
    gate_was_named: bool

    def sentences(self) -> list[str]:
        """What a reader must know about the table."""
        gate = f"gate: {self.gate}"
        if not self.defended.own_gate:
            gate = "gate: the victim's own image tower"
            if not self.gate_was_named:
                gate += "; if it was fine-tuned, name the model it came from with --gate-model"
        return [
            f"victim: {self.victim}",
            gate,
        ]

    def info(self) -> DefenseInfo:
        """The same for a card."""
        from zsr.eval.card import DefenseInfo

        config = self.defended.defense.config
        return DefenseInfo(
            name=config.name,
            settings=config.model_dump(mode="json", exclude={"name"}),
            gate=str(self.gate) if self.defended.own_gate else "the model's own image tower",
            cost_units=self.defended.cost_units,
            seed=self.defended.seed,
        )


def guard(
    clip: RobustCLIP,
    name: str,
    config: DefenseConfig,
    gate_model: str | None,
    *,
    pretrained: str | None,
    precision: Precision,
    device: str,
    seed: int,
) -> Guarded:
    """Put a loaded model behind a defence, gated by the pre-trained model that it came from.

    That is ``gate_model`` if given, a checkpoint's own base model, and else the model itself.

    Raises:
        ValueError: the gate cannot be loaded, or takes images of another size.
    """
    from zsr.cli.models import load_named, trained_config
    from zsr.eval import DefendedCLIP
    from zsr.models import load_model

    gate, gate_name = clip.image, name
    config_of_run = trained_config(name, clip)
    base = None if config_of_run is None else config_of_run.model
    if gate_model is not None and gate_model != name:
        try:
            named, _ = load_named(gate_model, pretrained, precision, device)
        except ValueError as error:
            raise ValueError(f"--gate-model {gate_model}: {error}") from None
        if named.image_size != clip.image_size:
            raise ValueError(
                f"--gate-model {gate_model}: takes images of {named.image_size} pixels, the model of {clip.image_size}; "
                "name the model that it was fine-tuned from"
            )
        gate, gate_name = named.image, gate_model
    elif gate_model is None and base is not None:
        # Without the prompt or the attention that the run's settings gave the model before training.
        gate, gate_name = load_model(base, precision, device).image.pretrained_copy(), base.name
    victim_id, gate_id = Identity(name, _sha256(clip.image)), Identity(gate_name, _sha256(gate))
    defended = DefendedCLIP(clip, config, gate, seed)
    return Guarded(defended, victim_id, gate_id, gate_was_named=gate_model is not None)


def _sha256(tower: ImageTower) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tower.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
