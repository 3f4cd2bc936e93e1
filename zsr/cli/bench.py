"""``zsr bench``: what a step costs on this machine, against what the official loops do."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zsr.bench.compare import Row, Spread

app = typer.Typer(help="Measure zsr on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``step`` a command of its own while it is the only one."""


@app.command()
def step(
    objective: Annotated[str, typer.Option("--objective", help="Names with commas, or all.")] = "all",
    setting: Annotated[
        str,
        typer.Option("--setting", help="tiny-imagenet or imagenet: the papers' ratio of classes to batch, made small."),
    ] = "tiny-imagenet",
    batch_size: Annotated[int, typer.Option("--batch-size", min=0, help="0 takes the setting's.")] = 0,
    num_classes: Annotated[int, typer.Option("--num-classes", min=0, help="0 takes the setting's.")] = 0,
    model: Annotated[
        str, typer.Option("--model", help="Architecture, with random weights, or local-dir:.")
    ] = "ViT-B-32",
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32 (adds our best against it) or bf16, of both sides.")
    ] = "fp32",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 5,
    threads: Annotated[int, typer.Option("--threads", min=0, help="0 leaves torch's choice.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of our run; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time our training step and the official loop's in turns, and count encoder passes."""
    import torch

    from zsr.bench.compare import DTYPES, SETTINGS, compare
    from zsr.config import OBJECTIVES

    if setting not in SETTINGS:
        raise ValueError(f"--setting {setting}: is not one of {', '.join(SETTINGS)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: is not one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use cpu")
    if threads:
        torch.set_num_threads(threads)
    names = OBJECTIVES.names() if objective == "all" else objective.split(",")
    unknown = sorted(set(names) - set(OBJECTIVES.names()))
    if unknown:
        raise ValueError(f"--objective {unknown[0]}: is not one of {', '.join(OBJECTIVES.names())}")
    rows, show = [], Eta(len(names))
    for name in names:
        rows += compare(
            name,
            setting=setting if model == "ViT-B-32" and not batch_size and not num_classes else None,
            model_name=model,
            batch_size=batch_size or SETTINGS[setting][0],
            num_classes=num_classes or SETTINGS[setting][1],
            precision="bf16" if dtype == "bf16" else "fp32",
            device=device,
            repeats=repeats,
            overrides=overrides or (),
            progress=show,
        )
    if as_json:
        typer.echo(json.dumps([_plain(row) for row in rows], indent=2))
    else:
        _print(
            rows, f"{model}, {setting} setting, {device}, {torch.get_num_threads()} threads", device.startswith("cuda")
        )
    missed = [f"{row.objective} {row.precision}" for row in rows if not row.reached]
    if missed:
        typer.echo(f"missed: {', '.join(missed)}", err=True)
        if check:
            raise typer.Exit(1)


class Eta:
    """A line on stderr: what is measured, how far, how long still."""

    def __init__(self, objectives: int) -> None:
        self.objectives, self.finished, self.began = objectives, 0, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        share = (self.finished + done / total) / self.objectives
        elapsed = time.monotonic() - self.began
        left = f" eta={elapsed / share - elapsed:.0f}s" if share else ""
        on_terminal = sys.stderr.isatty()
        line = f"objective={what} done={done}/{total} elapsed={elapsed:.0f}s{left}"
        sys.stderr.write(f"\r{line}\x1b[K" + "\n" * (done == total) if on_terminal else f"{line}\n")
        sys.stderr.flush()
        self.finished += done == total


def _print(rows: list[Row], title: str, on_cuda: bool) -> None:
    from zsr.cli.output import print_table

    def spread(value: Spread | None, digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
        if value is None:
            return "-"
        low, high = (f"{factor * end:.{digits}f}" for end in (value.low, value.high))
        return f"{factor * value.median:.{digits}f}{unit} ({low}-{high})"

    print_table(
        f"{title}; medians, quartiles in brackets",
        ["objective", "ours", "theirs", "ours img/s", "theirs img/s", "ratio", "bar", "passes", "units", "timed"]
        + ["MFU %" if on_cuda else "matmul %"],
        [
            [
                row.objective,
                row.precision,
                row.their_precision if row.their_images_per_s else "-",
                spread(row.images_per_s),
                spread(row.their_images_per_s),
                spread(row.ratio),
                "-" if row.bar is None else f"{row.bar:g}" + ("" if row.reached else " missed"),
                f"{row.passes:g}",
                str(row.cost_units),
                f"{row.warm_passes:g}",
                spread(row.share, 0, 100),
            ]
            for row in rows
        ],
    )


def _plain(row: Row) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(row) | {"reached": row.reached}
