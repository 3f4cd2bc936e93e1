"""The attack options of zsr eval: which attack, at which budgets, with which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsr.attacks.base import Attack
    from zsr.data.suite import Protocol

EPS = "1/255,2/255,4/255"
_PGD_STEPS = 10  # of attacks that need a step size; the others have a default of their own
_ELSEWHERE = {
    "eps": "the budget is what --eps says",
    "norm": "the ball is what --norm says",
    "schedule": "epsilon moves in training alone, and a card's budget is what --eps says",
}


def read_attacks(
    name: str,
    eps: str,
    *,
    norm: str,
    steps: int | None = None,
    step_size: str | None = None,
    restarts: int | None = None,
    settings: Sequence[str] = (),
    others: Sequence[str] = (),
) -> dict[str, Attack[Any]]:
    """One attack for each budget, by the text the user wrote it as.

    Args:
        name: of the attack; ``aa`` is short for autoattack.
        eps: budgets, separated by commas.
        steps, step_size, restarts: None leaves the attack's own. Where it has a step size, steps are a quarter of eps long and
            the best iterate is kept.
        settings: ``key=value``, any setting of the attack; ``name.key=value`` is for the attack of that name alone.
        others: attacks that are read from the same options.

    Raises:
        ValueError: no such attack, setting or budget, or an option that the attack has no use for.
    """
    from pydantic import ValidationError

    from zsr.config import ATTACKS, ConfigError, apply_overrides, describe_errors
    from zsr.config.base import parse_fraction

    name = "autoattack" if name == "aa" else name
    try:
        config_class = ATTACKS.config_class(name)
    except ValueError as error:
        raise ValueError(f"--attack {name}: {error}") from None
    fields = config_class.model_fields
    for option, key, given in (("--steps", "steps", steps), ("--step-size", "step_size", step_size)):
        if given is not None and key not in fields:
            raise ValueError(f"{option}: {name} has no such setting; leave it out")
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"--attack-set {setting}: should be key=value, such as restarts=5")
    own_settings = _own(settings, name, others)
    for setting in own_settings:
        key = setting.partition("=")[0].partition(".")[0].strip()
        if key in _ELSEWHERE:
            raise ValueError(f"--attack-set {setting}: {_ELSEWHERE[key]}; leave it out")
    shared: dict[str, Any] = {"name": name, "norm": norm}
    if steps is not None or "step_size" in fields:
        shared["steps"] = _PGD_STEPS if steps is None else steps
    if restarts is not None:
        shared["restarts"] = restarts
    if "best_iterate" in fields:
        shared["best_iterate"] = True
    attacks: dict[str, Attack[Any]] = {}
    for label in (part.strip() for part in eps.split(",") if part.strip()):
        tree = shared | {"eps": label}
        try:
            if "step_size" in fields:
                tree["step_size"] = parse_fraction(step_size) if step_size else float(parse_fraction(label)) / 4
        except ValueError:
            raise ValueError(f"--eps {label}: should be a number or a fraction such as 2/255") from None
        tree = apply_overrides(tree, own_settings)
        try:
            attacks[label] = ATTACKS.build(config_class.model_validate(tree))
        except ValidationError as error:
            sentences = describe_errors(error, tree, config_class)
            raise ConfigError(f"--attack {name}: {sentence}" for sentence in sentences) from None
    if not attacks:
        raise ValueError("--eps: names no budget; write such as 1/255,4/255")
    return attacks


def suite_attacks(
    protocol: Protocol, eps: str | None, *, given: Mapping[str, Any], settings: Sequence[str]
) -> tuple[list[tuple[str, Attack[Any]]], list[str]]:
    """The attacks of a suite at its budgets, and a sentence for each of which something is not known.

    Args:
        eps: budgets in place of the protocol's.
        given: options as for :func:`read_attacks`; what is not None comes before the protocol's.

    Raises:
        ValueError: as :func:`read_attacks`.
    """
    found: list[tuple[str, Attack[Any]]] = []
    words: list[str] = []
    others = [entry.name for entry in protocol.attacks]
    for entry in protocol.attacks:
        known = [f"{key}={json.dumps(value)}" for key, value in entry.settings.items() if given.get(key) is None]
        budgets = EPS if isinstance(entry.eps, str) else ",".join(f"{255 * one:g}/255" for one in entry.eps)
        found += read_attacks(entry.name, eps or budgets, settings=[*known, *settings], others=others, **given).items()
        unknown = [*(["eps"] if isinstance(entry.eps, str) and eps is None else []), *entry.unknown]
        left = [key for key in unknown if given.get(key) is None]
        if left:
            words.append(f"suite {protocol.key}: {', '.join(left)} of {entry.name} are not known; zsr's own are taken")
    return found, words


@dataclass(frozen=True)
class Craft:
    """Which texts an attack sees in place of those that judge.

    Attributes:
        template: a prompt; None for the set's own.
        superclasses: whether it aims at the set's superclasses.
    """

    template: str | None
    superclasses: bool

    @property
    def words(self) -> str:
        """For a card."""
        prompt = "" if self.template is None else f"the prompt {self.template!r}"
        return " and ".join([*(["superclasses"] if self.superclasses else []), *([prompt] if prompt else [])])


def read_craft(template: str | None, superclasses: bool, names: Sequence[str]) -> Craft | None:
    """What the crafting options ask for; None without them.

    Raises:
        ValueError: a prompt without a place for the class name, or an attack that cannot see other texts
            or stops at their boundary.
    """
    if template is None and not superclasses:
        return None
    from zsr.attacks.checks import FLATTERS
    from zsr.config import ATTACKS

    option = "--craft-template" if template is not None else "--craft-superclasses"
    if template is not None and "{}" not in template:
        raise ValueError(f"--craft-template {template!r}: needs {{}} where the class name goes")
    if not names or "adaptive" in names:
        raise ValueError(f"{option}: needs an attack on a bare model, such as --attack pgd")
    for name in names:
        if getattr(ATTACKS.config_class(name), "stops_early", False):
            raise ValueError(f"{option}: --attack {name} {FLATTERS}")
    return Craft(template, superclasses)


def _own(settings: Sequence[str], name: str, others: Sequence[str]) -> list[str]:
    """The settings for this attack, without its name in front."""
    full = {"autoattack" if other == "aa" else other for other in others}
    own = []
    for setting in settings:
        owner, dot, rest = setting.partition("=")[0].partition(".")
        owner = "autoattack" if owner == "aa" else owner
        if not dot or owner not in full | {name}:
            own.append(setting)
        elif owner == name:
            own.append(rest + setting[setting.index("=") :])
    return own


def attack_title(attack: Attack[Any]) -> str:
    """What a table calls the attack: PGD-10, or AutoAttack with the stages that it runs."""
    config = attack.config
    if attack.stages:
        return f"AutoAttack {config.version} ({', '.join(attack.stages)})"
    if config.name == "adaptive":
        return f"Adaptive-{config.steps} ({config.through}, EOT {config.eot})"
    return f"{config.name.upper()}-{config.steps if hasattr(config, 'steps') else config.queries}"
