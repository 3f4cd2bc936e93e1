"""``zsr report``: result cards as tables, plots and one page that a person opens."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def report(
    places: Annotated[
        list[Path], typer.Argument(metavar="PLACES...", help="Result cards, and folders that hold some at any depth.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; made if missing.")],
    format: Annotated[
        str, typer.Option("--format", help="Comma-separated, of html, md, csv, latex.")
    ] = "html,md,csv,latex",
    title: Annotated[str, typer.Option("--title", help="Heading.")] = "zsr: accuracy under attack",
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="LABEL", help="The row that others are compared with.")
    ] = None,
) -> None:
    """Turn the cards that zsr eval writes into a page, tables and plots."""
    from zsr.eval.report import write_report

    formats = [name.strip() for name in format.split(",") if name.strip()]
    if not formats:
        raise ValueError("--format: names none; choose from html, md, csv, latex")
    words = ["zsr", "report", *map(str, places), "--out", str(out)]
    words += ["--baseline", baseline] if baseline else []
    made, written = write_report(
        places, out, formats=formats, title=title, baseline=baseline, command=shlex.join(words)
    )
    doubtful = sum(not card.believed for card in made.cards)
    typer.echo(f"cards={len(made.cards)} rows={len(made.rows)} protocols={len(made.sheets)} failed_checks={doubtful}")
    pages = [path for path in written if path.parent == out]
    for path in pages:
        typer.echo(f"wrote {path}")
    if len(written) > len(pages):
        typer.echo(f"wrote {len(written) - len(pages)} pictures to {out / 'plots'}")
