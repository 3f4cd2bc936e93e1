"""``zsr doctor``: one line for each thing that a run needs from its surroundings, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MARKS = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    preset: Annotated[str, typer.Option("--preset", "-p", help="The run that is to be made possible.")] = "default",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard; the demo's, or port 8265 here."
        ),
    ] = None,
    working_dir: Annotated[Path, typer.Option("--working-dir", help="What `ray job submit` would upload.")] = Path("."),
) -> None:
    """Check this machine, the cluster and the data; exit with 1 if something is broken."""
    from rich.console import Console
    from rich.markup import escape

    from zsr.cli import checks
    from zsr.config import load_config

    config = load_config(preset, overrides or [])
    around = checks.Surroundings(config, ray_address or checks.demo_address("ray") or checks.RAY_DEFAULT, working_dir)
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for check in checks.ALL:
        for finding in checks.guarded(check, around):
            failed += finding.state == "fail"
            console.print(f"{_MARKS[finding.state]} {finding.what:<12} {escape(finding.says)}")
            if finding.fix and finding.state != "ok":
                console.print(f"{'':17} -> {escape(finding.fix)}")
    if failed:
        raise typer.Exit(1)
