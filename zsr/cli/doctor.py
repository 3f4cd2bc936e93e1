"""``zsr doctor``: one line for each thing that a run needs from its surroundings, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MARKS = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="The run that is to be made possible.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Ask every node of the Ray cluster, too.")] = False,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="A sweep whose trials are to fit, by file or name.")
    ] = None,
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
    from zsr.cli.cluster_checks import cluster_findings, sweep_demand
    from zsr.config import load_config

    num_trials = None
    if sweep is not None:
        config, num_trials = sweep_demand(sweep, [*([f"--preset={preset}"] if preset else []), *(overrides or [])])
    else:
        config = load_config(preset or "default", overrides or [])
    around = checks.Surroundings(config, ray_address or checks.demo_address("ray") or checks.RAY_DEFAULT, working_dir)
    asked: list[checks.Check] = [*checks.ALL]
    if cluster:
        asked.append(lambda around: cluster_findings(around.config, around.ray_address, num_trials))
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for check in asked:
        for finding in checks.guarded(check, around):
            failed += finding.state == "fail"
            console.print(f"{_MARKS[finding.state]} {finding.what:<12} {escape(finding.says)}")
            if finding.fix and finding.state != "ok":
                console.print(f"{'':17} -> {escape(finding.fix)}")
    if failed:
        raise typer.Exit(1)
