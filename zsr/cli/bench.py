"""``zsr bench``: what a step, and the images for it, cost on this machine, against what is usual."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from zsr.cli.bench_eval import eval_
from zsr.cli.bench_ray import ray

if TYPE_CHECKING:
    from zsr.bench.compare import Row, Spread

app = typer.Typer(help="Measure zsr on this machine.", no_args_is_help=True)


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


@app.command()
def data(
    images: Annotated[
        str | None, typer.Option("--images", metavar="SET", help="A set to take images from; made-up JPEGs without.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many images.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 7,
    rates: Annotated[
        str, typer.Option("--gpu-rate", help="Images/s of a GPU, with commas: how many cores feed it.")
    ] = "500,1000,2000,5000",
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if the bar or the bound on pixels is missed.")
    ] = False,
) -> None:
    """Time the preparation of images on one core, and open_clip's usual pipeline in turns with it."""
    from dataclasses import asdict

    from zsr.bench import data as room
    from zsr.cli.output import print_table

    try:
        wanted = [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise ValueError(f"--gpu-rate {rates}: should be numbers with commas, such as 500,1000") from None
    rows, pixels = room.measure(room.take_images(images, count), repeats)
    whole = next(row for row in rows if row.stage == room.WHOLE)
    reached = whole.ratio.median >= room.BAR and pixels.in_bounds
    cores = {f"{rate:g}": room.cores_for(rate, whole.images_per_s.median) for rate in wanted}
    if as_json:
        found = {"rows": [asdict(row) for row in rows], "pixels": asdict(pixels), "cores": cores, "reached": reached}
        typer.echo(json.dumps(found, indent=2))
    else:
        kind = f"images of {images}" if images else "made-up JPEGs of 500x375"
        print_table(
            f"{kind}, images/s of one core in CPU time; medians, quartiles in brackets",
            ["stage", "ours", "ours ms", "Pillow + torchvision", "ms", "ratio", "bar"],
            [
                [
                    row.stage,
                    _spread(row.images_per_s, 0),
                    f"{1e3 / row.images_per_s.median:.2f}",
                    _spread(row.their_images_per_s, 0),
                    f"{1e3 / row.their_images_per_s.median:.2f}",
                    _spread(row.ratio),
                    f"{room.BAR:g}" if row is whole else "-",
                ]
                for row in rows
            ],
        )
        typer.echo(
            f"pixels: {pixels.share:.2%} of the values differ from theirs, by {pixels.largest} of 255 at most "
            f"(bounds: {room.SHARE_BOUND:.0%}, {room.PIXEL_BOUND})"
        )
        for rate, number in cores.items():
            typer.echo(f"a GPU of {rate} images/s needs {number} core{'s' * (number > 1)} for its images")
    if not reached:
        typer.echo("missed: the bar on the whole pipeline, or the bound on pixels", err=True)
        if check:
            raise typer.Exit(1)


def _spread(value: Spread, digits: int = 2) -> str:
    return f"{value.median:.{digits}f} ({value.low:.{digits}f}-{value.high:.{digits}f})"


class Eta:
    """A line on stderr: what is measured, how far, how long still."""

    def __init__(self, parts: int, word: str = "objective") -> None:
        self.parts, self.word, self.finished, self.began = parts, word, 0, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        share = (self.finished + done / total) / self.parts
        elapsed = time.monotonic() - self.began
        left = f" eta={elapsed / share - elapsed:.0f}s" if share else ""
        on_terminal = sys.stderr.isatty()
        line = f"{self.word}={what} done={done}/{total} elapsed={elapsed:.0f}s{left}"
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


app.command()(ray)
app.command("eval")(eval_)
