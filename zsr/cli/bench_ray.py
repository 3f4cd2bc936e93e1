"""zsr bench ray: what Ray Train costs a training step here, and what a second worker gains."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def ray(
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Blocks of each run that count.")] = 8,
    block: Annotated[int, typer.Option("--steps", min=1, help="Steps of a block; then a checkpoint and a report.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a step, per worker.")] = 64,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the run; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time the training loop bare, under Ray Train, and under Ray Train with two workers, in turns."""
    from dataclasses import asdict

    from zsr.bench.compare import Spread
    from zsr.bench.ray_share import SCALING_BAR, SHARE_BAR, SHORTEST_STEP_S, TWO, measure
    from zsr.cli.output import print_table

    found = measure(rounds, block, batch_size, overrides or ())
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:

        def shown(value: Spread, factor: float = 1.0, digits: int = 2) -> str:
            return (
                f"{factor * value.median:.{digits}f} ({factor * value.low:.{digits}f}-{factor * value.high:.{digits}f})"
            )

        print_table(
            "One thread a worker; medians, quartiles in brackets",
            ["run", "step s", "processor s", "images/s"],
            [
                [name, shown(step_s, digits=3), shown(found.cpu_s[name], digits=3)]
                + [f"{batch_size * (1 + (name == TWO)) / step_s.median:.1f}"]
                for name, step_s in found.step_s.items()
            ],
        )
        short = min(step.median for step in found.step_s.values()) < SHORTEST_STEP_S
        typer.echo(f"Ray Train's share of the step: {shown(found.share, 100)} %, bar {100 * SHARE_BAR:g} %")
        typer.echo(f"  in processor time: {shown(found.cpu_share, 100)} %")
        typer.echo(f"two workers against twice one: {shown(found.scaling)}, bar {SCALING_BAR:g}")
        typer.echo(f"  of their step, averaging gradients (and waiting for the other): {shown(found.averaging, 100)} %")
        typer.echo(f"  the rest of it against one worker's step: {shown(found.slower, 100)} % longer")
        typer.echo(f"  two processes that only multiply matrices, against twice one: {shown(found.cores)}")
        if short:
            typer.echo(f"note: the bar holds for steps of {SHORTEST_STEP_S} s or more; raise --batch-size", err=True)
    missed = [
        name for name, reached in (("share", found.share_reached), ("scaling", found.scaling_reached)) if not reached
    ]
    if missed:
        typer.echo(f"missed: {', '.join(missed)}", err=True)
        if check:
            raise typer.Exit(1)
