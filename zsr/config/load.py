"""From a preset or a YAML file and overrides to a checked RunConfig, and back to YAML."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from zsr.config.errors import ConfigError, describe_errors
from zsr.config.overrides import apply_overrides, merge
from zsr.config.plugins import PluginField, suggest
from zsr.config.schema import RunConfig

DEFAULT_PRESET = "default"


def load_config(
    source: str | Path | None = None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> RunConfig:
    """Build a run's configuration: defaults, then ``base``, then ``source``, then ``overrides``.

    Args:
        source: a preset's name or the path of a YAML file; the preset "default" if neither it nor ``base`` is given.
        overrides: ``dotted.path=value`` each.
        base: settings to lay underneath the source's own, such as those of an earlier run.

    Raises:
        ConfigError: with one sentence for each thing that is wrong.
    """
    if source is None and base is None:
        source = DEFAULT_PRESET
    tree = dict(base or {})
    if source is not None:
        tree = merge(tree, load_tree(source))
    return validate(apply_overrides(tree, overrides))


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Check a tree of settings.

    Raises:
        ConfigError: with one sentence for each thing that is wrong.
    """
    tree = with_default_choices(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, tree)) from None


def load_tree(source: str | Path, _within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a preset or file with all that it extends, unchecked.

    Raises:
        ConfigError: it does not exist, is not YAML, or extends itself.
    """
    place, text = _read(source, Path(_within[-1]).parent if _within else Path())
    if place in _within:
        raise ConfigError(f"extends={str(source)!r}: goes in a circle; {place} extends itself")
    tree = parse_yaml(text, place)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"extends={parent!r}: should be the name of one preset or the path of one file")
    return merge(load_tree(parent, (*_within, place)), tree)


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """Read a mapping of settings from YAML text; ``place`` is named in messages.

    Raises:
        ConfigError: the text is not YAML, not a mapping, or has a key twice.
    """
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader: no Python objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{place}: should hold settings by name, such as 'train:' with 'batch_size: 64' under it")
    return tree


def with_default_choices(tree: Mapping[str, Any], model: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Fill in the default plug-in wherever a group has settings but no name, so that ``attack.steps=3`` is enough."""
    filled = dict(tree)
    for field_name, field in model.model_fields.items():
        value = filled.get(field_name)
        inner: type[BaseModel] | None = None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = field.annotation
        if isinstance(value, str) and inner is not None and "name" in inner.model_fields:
            value = {"name": value}  # optim=adamw, as for plug-ins
        if not isinstance(value, Mapping):
            continue
        for part in field.metadata:
            if isinstance(part, PluginField):
                default = {"name": field.default} if isinstance(field.default, str) else field.default
                if isinstance(default, BaseModel):
                    default = default.model_dump()
                if isinstance(default, Mapping) and value.get("name", default["name"]) == default["name"]:
                    value = merge({field_name: default}, {field_name: value})[field_name]
                if value.get("name") in part.registry.names():
                    inner = part.registry.config_class(value["name"])
        filled[field_name] = with_default_choices(value, inner) if inner is not None else value
    return filled


def to_yaml(config: BaseModel) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def preset_names() -> list[str]:
    """The presets in the package, sorted."""
    folder = resources.files("zsr.config") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _read(source: str | Path, relative_to: Path) -> tuple[str, str]:
    """The text of a preset or file and a name for it that is the same however it was written."""
    name = str(source)
    if name in preset_names() and not isinstance(source, Path):
        return name, (resources.files("zsr.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    path = relative_to / Path(name).expanduser()
    if path.is_file():
        try:
            return str(path.resolve()), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: is not a text file") from None
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or "/" in name:
        raise ConfigError(f"{name}: there is no such file")
    raise ConfigError(f"{name!r}: is not a preset or a file{suggest(name, preset_names())}")


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)
