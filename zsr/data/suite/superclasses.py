"""Which classes belong together: superclasses of a test set, or of a person's own file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from zsr.data.storage import EMBEDDED
from zsr.data.suite.names import clean
from zsr.data.suite.registry import dataset_keys, load_card

_FILE: TypeAdapter[dict[str, list[str]]] = TypeAdapter(dict[str, list[str]])


def read_superclasses(source: str) -> dict[str, str]:
    """The superclass of each class.

    Args:
        source: key of a test set whose file has superclasses, or the path of a YAML file with one line for each:
            ``fish: [shark, trout]``.

    Raises:
        ValueError: there is no such set or file, the set has no superclasses, or the file is of another form or has a class
            twice.
    """
    if source.endswith((".yaml", ".yml")):
        return _class_to_superclass(_read(Path(source)), source)
    groups = load_card(source).superclasses
    if groups is None:
        known = ", ".join(key for key in dataset_keys() if load_card(key).superclasses is not None)
        raise ValueError(
            f"{source} has no superclasses; {known} have, and a YAML file with lines such as fish: [shark, trout] gives "
            "others"
        )
    return dict(_emoji_groups()) if groups == "emoji_groups" else _class_to_superclass(groups, source)


def match_superclasses(classes: Sequence[str], superclasses: Mapping[str, str]) -> list[str]:
    """The superclass of each class of a list; case and ``_ - /`` in names do not matter.

    Raises:
        ValueError: a class has none; the sentence names it.
    """
    known = {_plain(name): superclass for name, superclass in superclasses.items()}
    missing = [name for name in classes if _plain(name) not in known]
    if missing:
        others = f" ({len(missing) - 1} others have none either)" if len(missing) > 1 else ""
        raise ValueError(f"the class {missing[0]!r} has no superclass{others}; name one for each class of the set")
    return [known[_plain(name)] for name in classes]


def _class_to_superclass(groups: Mapping[str, Sequence[str]], source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for superclass, names in groups.items():
        for name in names:
            if name in found:
                raise ValueError(f"{source}: the class {name!r} is in {found[name]!r} and in {superclass!r}")
            found[name] = superclass
    return found


def _read(path: Path) -> dict[str, list[str]]:
    try:
        return _FILE.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")), strict=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (yaml.YAMLError, ValidationError):
        raise ValueError(f"{path} should have one line for each superclass, such as fish: [shark, trout]") from None


@cache
def _emoji_groups() -> dict[str, str]:
    """Unicode's groups of the embedded emoji, in words."""
    concepts = json.loads((EMBEDDED / "emoji" / "concepts.json").read_text(encoding="utf-8"))
    return {concept["name"]: concept["group"].lower().replace("&", "and") for concept in concepts}


def _plain(name: str) -> str:
    return clean(name, ["lower", "spaces"])
