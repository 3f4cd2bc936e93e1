"""What is wrong with a configuration, a sentence each: dotted path, value, what was expected, the closest name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from zsr.config.base import without_password
from zsr.config.plugins import PluginConfig, PluginField

_EXPECTED = {
    "greater_than_equal": "should be at least {ge}",
    "greater_than": "should be above {gt}",
    "less_than_equal": "should be at most {le}",
    "less_than": "should be below {lt}",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": 'should be text; put quotes around it ("...") if it looks like a number',
    "list_type": "should be a list, such as [1, 2]",
    "dict_type": "should be a group of settings",
    "model_type": "should be a group of settings",
    "missing": "is needed and has no default",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; ``problems`` holds one sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # what pickle hands to __init__ again: this crosses process borders

    def __str__(self) -> str:
        return "\n".join(self.problems)


def describe_errors(
    error: ValidationError, tree: Mapping[str, Any] | None = None, model: type[BaseModel] | None = None
) -> list[str]:
    """Turn pydantic's report into sentences.

    Args:
        error: what validation raised.
        tree: the settings that were validated; tells which plug-in's names to suggest.
        model: the root of the settings, RunConfig unless told.
    """
    if model is None:
        from zsr.config.schema import RunConfig  # the schema's own modules raise ConfigError too

        model = RunConfig
    choices: dict[str, tuple[PluginField, str]] = {}
    paths = sorted(set(known_paths(model, tree or {}, choices=choices)))
    sentences: list[str] = []
    for detail in error.errors(include_url=False):
        for sentence in _describe(detail, paths, choices):
            if sentence not in sentences:
                sentences.append(sentence)
    return sentences


def known_paths(
    model: type[BaseModel], tree: Any, prefix: str = "", choices: dict[str, tuple[PluginField, str]] | None = None
) -> Iterator[str]:
    """Every dotted path that ``model`` accepts, plug-in groups by the name in ``tree``, or else the default's.

    Args:
        choices: filled with each plug-in group met: its path, and its field and the chosen name.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        value = tree.get(name) if isinstance(tree, Mapping) else None
        for part in field.metadata:
            if isinstance(part, PluginField):
                chosen = _chosen(value) or _chosen(field.default)
                if choices is not None:
                    choices[path] = (part, chosen)
                for config_class in _plugin_configs(part, chosen):
                    yield from known_paths(config_class, value, f"{path}.", choices)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_paths(field.annotation, value, f"{path}.", choices)


def closest_path(path: str, known: Sequence[str]) -> str | None:
    """The valid path that was most likely meant, if any is near."""
    leaf = path.rpartition(".")[2]
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]  # weight_mhe for objective.weight_mhe: far apart as strings, plain to a reader
    close = difflib.get_close_matches(path, same_leaf or known, n=1, cutoff=0.6)
    return close[0] if close else None


def show(value: Any) -> str:
    """A value as a reader would write it, cut where it gets long, without the password of an address."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = without_password(repr(value) if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _chosen(value: Any) -> str:
    """The plug-in's name in a group's value: a mapping, a config, or the name itself."""
    if isinstance(value, PluginConfig):
        return value.name
    name = value.get("name") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else ""


def _plugin_configs(field: PluginField, chosen: str) -> list[type[PluginConfig]]:
    names = field.registry.names()
    # With an unknown name, the settings of every plug-in of the kind are worth suggesting.
    return [field.registry.config_class(known) for known in names if known == chosen or chosen not in names]


def _describe(detail: Any, paths: Sequence[str], choices: Mapping[str, tuple[PluginField, str]]) -> Iterator[str]:
    kind, value = detail["type"], detail["input"]
    path = ".".join(str(part) for part in detail["loc"])
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        for leaf, leaf_value in _leaves(path, value):
            reason = _of_another(leaf, choices) or f"there is no such setting{_instead(leaf, paths)}"
            yield f"{leaf}={show(leaf_value)}: {reason}"
    elif kind == "literal_error":
        yield f"{path}={show(value)}: should be {context['expected']}"
    elif kind in ("value_error", "assertion_error"):
        yield _own_words(path, value, str(context.get("error", detail["msg"])))
    else:
        message: str = detail["msg"]
        expected = _EXPECTED.get(kind, message[:1].lower() + message[1:]).format(**context)
        yield f"{path}: {expected}" if kind == "missing" else f"{path}={show(value)}: {expected}"


def _own_words(path: str, value: Any, message: str) -> str:
    """Lead into a sentence that one of our own checks wrote with the path it belongs to."""
    if not path:
        return message  # a check across groups names full paths itself
    group = value.model_dump() if isinstance(value, BaseModel) else value
    if isinstance(group, Mapping):
        if message.startswith("is not a known") and "name" in group:
            return f"{path}.name={show(group['name'])}: {message}"
        if re.match(r"[A-Za-z_]\w*(\.\w+)*=", message):
            return f"{path}.{message}"  # "eps=4 is ..." said by the group's own check
        return f"{path}: {message}"
    return f"{path}={show(value)}: {message}"


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    else:
        yield path, value


def _of_another(path: str, choices: Mapping[str, tuple[PluginField, str]]) -> str | None:
    """Say so if the setting exists, but belongs to another plug-in of the same kind than the chosen one."""
    group, _, leaf = path.rpartition(".")
    if group not in choices:
        return None
    field, chosen = choices[group]
    registry = field.registry
    owners = [name for name in registry.names() if leaf in registry.config_class(name).model_fields]
    if not owners or chosen not in registry.names():
        return None
    return f"is a setting of {group}.name={' or '.join(owners)}, not of {chosen}"


def _instead(path: str, known: Sequence[str]) -> str:
    meant = closest_path(path, known)
    if meant is not None:
        return f"; did you mean {meant}?"
    group = path.rpartition(".")[0]
    inside = [candidate for candidate in known if candidate.rpartition(".")[0] == group]
    if not inside:  # the group itself is unknown: say what there is at the top
        group, inside = "", [candidate for candidate in known if "." not in candidate]
    names = ", ".join(candidate.rpartition(".")[2] for candidate in inside)
    return f"; {group} has {names}" if group else f"; there are {names}"
