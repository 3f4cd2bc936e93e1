"""Class names and templates that packages ship, and the rules by which papers clean names.

The packages' data files are read without importing the packages: that would take seconds, and torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from zsr.data.suite.schema import NameRule, NameSource


@cache
def names_from(source: NameSource) -> tuple[str, ...]:
    """The class names that a package ships, in the order of the labels.

    Raises:
        ValueError: the package is not there, or the names are the set's own.
    """
    if source == "timm:imagenet":
        lemmas = dict(line.split("\t", 1) for line in _timm_lines("imagenet_synset_to_lemma.txt"))
        return tuple(lemmas[synset].split(",")[0] for synset in _timm_lines("imagenet_synsets.txt"))
    if source == "from_set":
        raise ValueError("the class names are the set's own")
    names = tuple(_metadata().IMAGENET_CLASSNAMES)
    if source == "open_clip:imagenet":
        return names
    variant = source.removeprefix("open_clip:").replace("-", "_")
    return tuple(names[int(index)] for index in _timm_lines(f"{variant}_indices.txt"))


def imagenet_synsets() -> tuple[str, ...]:
    """ImageNet's 1000 WordNet ids in the order of the labels, which is that of the sorted ids.

    Raises:
        ValueError: the package that brings them is not there.
    """
    return tuple(_timm_lines("imagenet_synsets.txt"))


@cache
def imagenet_templates() -> tuple[str, ...]:
    """open_clip's 80 prompts for ImageNet, with ``{}`` for the class."""
    return tuple(template("{}") for template in _metadata().OPENAI_IMAGENET_TEMPLATES)


def clean(name: str, rules: Sequence[NameRule]) -> str:
    """A class name as a paper puts it into its prompts."""
    for rule in rules:
        if rule == "lower":
            name = name.lower()
        elif rule == "spaces":
            name = re.sub("[_/-]", " ", name)
        elif rule == "drop_year":
            name = re.sub(r" (19|20)\d\d$", "", name)
        elif rule == "boeing" and name.startswith("7"):
            name = f"Boeing {name}"
    return name


def duplicates(names: Sequence[str]) -> list[str]:
    """Names that occur more than once, in order."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


@cache
def _metadata() -> ModuleType:
    path = _package("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("zsr_open_clip_metadata", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timm_lines(name: str) -> list[str]:
    return (_package("timm") / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"ImageNet's class names come with {name}, which is not installed: pip install {name}")
    return Path(spec.submodule_search_locations[0])
