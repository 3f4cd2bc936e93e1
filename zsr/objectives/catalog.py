"""What there is to choose from, read out of the objectives' own files: paper, equation, cost, options."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from zsr.config.schema import OBJECTIVES


@dataclass(frozen=True)
class Option:
    """One setting: its name below ``objective.``, its default and, if its values are words, those; what it does."""

    name: str
    default: Any
    choices: tuple[Any, ...]
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One objective.

    Attributes:
        name: what ``objective.name`` takes.
        title: method and paper.
        equation: what is minimised, lines of text.
        cost: what the file says of its cost, in image-encoder passes (units).
        units: of one step with PGD-2 and default settings, computed.
        options: all settings.
        notes: the rest of the file's description: what differs from the authors' code, what is uncertain.
    """

    name: str
    title: str
    equation: str
    cost: str
    units: int
    options: tuple[Option, ...]
    notes: str


def entry(name: str) -> Entry:
    """Describe one objective.

    Raises:
        ValueError: there is none of that name, or its file's description lacks the equation or the cost.
    """
    config_class = OBJECTIVES.config_class(name)
    objective = OBJECTIVES.build(config_class.model_validate({"name": name}))
    title, *paragraphs = _paragraphs(sys.modules[config_class.__module__].__doc__ or "")
    equations = [text for text in paragraphs if text.startswith("    ")]
    costs = [text for text in paragraphs if text.startswith("Cost:")]
    if not equations or not costs:
        raise ValueError(
            f"zsr/objectives/{name}.py: its docstring should have an indented equation and a paragraph 'Cost: ...'"
        )
    rest = [text for text in paragraphs if text not in (equations[0], costs[0])]
    return Entry(
        name=name,
        title=" ".join(title.split()),
        equation=textwrap.dedent(equations[0]),
        cost=" ".join(costs[0].removeprefix("Cost:").split()),
        units=objective.cost_units(2),
        options=tuple(_option(key, field) for key, field in config_class.model_fields.items() if key != "name"),
        notes="\n\n".join(rest),
    )


def entries() -> list[Entry]:
    """All objectives, by name."""
    return [entry(name) for name in OBJECTIVES.names()]


def stated_units(cost: str) -> int | None:
    """The number in "PGD-2 takes 7" or "3 units", as a file's cost paragraph states it for default settings."""
    stated = re.search(r"PGD-2(?: [^.;,\d]*)? takes (\d+)", cost) or re.match(r"(\d+) units?\b", cost)
    return int(stated[1]) if stated else None


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, an indented one with the indented ones that follow it joined."""
    joined: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("    ") and joined and joined[-1].startswith("    "):
            joined[-1] += "\n\n" + paragraph
        else:
            joined.append(paragraph)
    return joined


def _option(name: str, field: Any) -> Option:
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return Option(name, field.default, choices, " ".join((field.description or "").split()))
