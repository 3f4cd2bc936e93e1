"""``zsr objectives``: what can be minimised, with paper, equation, cost and options, read out of the code."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zsr.objectives.catalog import Entry


def objectives(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Describe these in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List objectives, or describe some in full."""
    from zsr.config import OBJECTIVES
    from zsr.config.plugins import suggest
    from zsr.objectives.catalog import entries, entry

    for name in names or []:
        if name not in OBJECTIVES.names():
            raise ValueError(f"{name} is not a known objective{suggest(name, OBJECTIVES.names())}")
    found = [entry(name) for name in names] if names else entries()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    elif names:
        typer.echo("\n\n".join(_in_full(one) for one in found))
    else:
        typer.echo("\n\n".join(_in_short(one) for one in found))
        typer.echo(
            "\nunits: image-encoder passes of a step with PGD-2 and default settings (forward, backward to the input and "
            "backward to the weights are one each)\nin full: zsr objectives NAME\n"
            "with any of them: model.adapt (visual prompts), model.attention_cap and model.attention_drop (RAM), "
            "model.expand_text (LAAT's expansion), train.cache_frozen; zsr eval --defense ttc"
        )


def _in_short(one: Entry) -> str:
    equation = one.equation.split("\n\n")[0].splitlines()  # what comes after a gap says what its terms are
    options = " ".join(f"{option.name}={option.default}" for option in one.options) or "none"
    body = "\n".join(f"    {line}" for line in (*equation, f"{one.units} units; options: {options}"))
    return f"{one.name}: {one.title}\n{body}"


def _in_full(one: Entry) -> str:
    lines = [f"{one.name}: {one.title}", "", *(f"    {line}" for line in one.equation.splitlines()), ""]
    lines += [f"Cost: {one.cost}", f"With PGD-2 and default settings: {one.units} units.", ""]
    if one.notes:
        lines += [one.notes, ""]
    lines.append("Options (objective.NAME=VALUE):" if one.options else "No options.")
    for option in one.options:
        choices = f" of {', '.join(map(str, option.choices))}" if option.choices else ""
        lines.append(f"  {option.name}={option.default}{choices}")
        if option.meaning:
            lines.append(f"      {option.meaning}")
    return "\n".join(lines)
