"""Dotted overrides (``objective.weight_mhe=0.1``) and the rule by which layers of settings lie over each other.

The command line, a preset's ``extends`` and a sweep's sampled points all go through :func:`merge`, so a value means the
same wherever it is written. What needs saying: a group with a ``name`` belongs to that name. When an upper layer changes
the name, the lower layer's other keys are dropped, since they were settings of something else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from zsr.config.errors import ConfigError, show

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# Every tracker reads the same address and experiment: choosing another one must not forget where runs are kept.
_SHARED_GROUPS = {("tracking",)}


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``tree`` with every ``key=value`` set; ``tree`` itself stays as it is.

    The order of overrides with distinct paths does not matter. Of two with the same path the later one counts.

    Raises:
        ConfigError: an override is not of the form ``dotted.path=value``, or its path goes through a plain value.
    """
    values: dict[tuple[str, ...], Any] = {}
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not _PATH.fullmatch(path):
            problems.append(f"{override!r}: should be key=value with a dotted key, such as train.batch_size=64")
            continue
        values[tuple(path.split("."))] = parse_value(text)
    layer: dict[str, Any] = {}
    # Groups before what is inside them, so that objective=tima and objective.weight_mhe=0.1 agree in either order.
    for keys in sorted(values, key=len):
        try:
            _set(layer, tree, keys, values[keys])
        except ValueError as error:
            problems.append(f"{'.'.join(keys)}={show(values[keys])}: {error}")
    if problems:
        raise ConfigError(problems)
    return merge(tree, layer)


def parse_value(text: str) -> Any:
    """Read one value as YAML would: ``true``, ``0.1``, ``null``, ``[a, b]``, ``{name: pgd}``; all else stays text.

    ``2/255`` and ``1e-4`` stay text too; the field they are meant for reads them.
    """
    text = text.strip()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # such as a prompt template that begins with {}
    if isinstance(value, dict) and not text.startswith("{"):
        return text  # "a photo: {}" is a template, not a mapping
    if isinstance(value, list) and not text.startswith("["):
        return text
    if value is None or isinstance(value, str | bool | int | float | list | dict):
        return value
    return text  # YAML's dates are of no use as a setting


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``upper`` over ``lower``: groups are joined, values replaced, another ``name`` starts its group afresh."""
    return _merge(lower, upper, ())


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    keep = lower
    is_root = not path  # the root's name is the run's, not that of a choice
    if not is_root and path not in _SHARED_GROUPS and "name" in upper and upper["name"] != lower.get("name"):
        keep = {}
    merged = copy.deepcopy(dict(keep))
    for key, value in upper.items():
        below = keep.get(key)
        if isinstance(value, Mapping) and isinstance(below, str):
            below = {"name": below}  # "objective: tima" is short for a group with that name
        elif isinstance(value, str) and isinstance(below, Mapping) and "name" in below:
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(below, value, (*path, key))
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _set(layer: dict[str, Any], tree: Mapping[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Put ``value`` at ``keys`` of the new layer; refuse a path through what is one value in the tree below."""
    below: Any = tree
    for depth, key in enumerate(keys[:-1]):
        below = below.get(key) if isinstance(below, Mapping) else None
        inside = layer.get(key)
        for found in (below, inside):
            if found is not None and not isinstance(found, Mapping | str):
                raise ValueError(f"has no place, as {'.'.join(keys[: depth + 1])} is one value and not a group")
        if isinstance(inside, str):
            layer[key] = {"name": inside}
        elif inside is None:
            layer[key] = {}
        layer = layer[key]
    layer[keys[-1]] = value
