"""``zsr data``: make, check and look at sets of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert, verify and look at data sets.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="SET", help="Folder, s3://bucket/prefix, or such as zsr:emoji/train.")]


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder with a folder of images a class; ILSVRC2012_img_train.tar or another tar; a CSV; a set of "
            "shards (folder or s3://); or torchvision:NAME.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="SET", help="Folder or s3://bucket/prefix to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--from", help="folders, flat, tar, ilsvrc-train, csv, set or torchvision, where the guess is wrong."
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth",
            help="Labels of a flat folder or tar, such as ImageNet's validation set: names and WordNet ids, or the devkit.",
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option("--class-names", help="File with a line a class (key and name), or imagenet for WordNet ids."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Where torchvision's set lies, or a CSV's paths start.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Of torchvision's set.")] = "train",
    name: Annotated[str | None, typer.Option("--name", help="The set's name; the source's by default.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", help="Prompt with {} for the class; may be repeated.  [default: This is a photo of a {}.]"
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option("--samples-per-shard", min=1)] = 1000,
    shuffle: Annotated[
        int, typer.Option("--shuffle", metavar="SEED", help="Of the order in which images are laid into shards.")
    ] = 0,
    keep_order: Annotated[
        bool, typer.Option("--keep-order", help="Do not shuffle. Shards sorted by class train badly.")
    ] = False,
    image_size: Annotated[
        int, typer.Option("--image-size", min=0, help="Shorter side after resizing; 0 keeps files.")
    ] = 0,
    quality: Annotated[int, typer.Option("--quality", min=1, max=100, help="Of JPEGs that resizing makes.")] = 95,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0 takes one a core.")] = 0,
    max_bad: Annotated[
        str, typer.Option("--max-bad", metavar="N|SHARE", help="Unreadable images to leave out: 20, or 0.01%.")
    ] = "0",
    licence: Annotated[str, typer.Option("--licence", help="Of the images, for the index.")] = "",
    labels: Annotated[
        bool,
        typer.Option("--labels/--no-labels", help="Without: all images under SOURCE, for objectives such as fare."),
    ] = True,
) -> None:
    """Turn images into shards with an index. The same command goes on where an interrupted one stopped."""
    import os
    import time
    from typing import Any, cast

    from zsr.cli.output import log_to_stderr
    from zsr.data import convert as room

    log_to_stderr()
    began = time.monotonic()
    done = room.convert(
        source,
        target,
        kind=cast(Any, kind),
        truth=truth,
        class_names=class_names,
        root=root,
        split=split,
        labels=labels,
        name=name,
        templates=template or (),
        licence=licence,
        samples_per_shard=shard_size,
        shuffle=None if keep_order else shuffle,
        image_size=image_size,
        quality=quality,
        workers=workers or len(os.sched_getaffinity(0)),
        max_bad=_count_or_share(max_bad),
    )
    seconds = time.monotonic() - began
    typer.echo(
        f"{done.index.samples} images of {len(done.index.classes)} classes in {len(done.index.shards)} shards, "
        f"{sum(shard.bytes for shard in done.index.shards) / 1e6:.1f} MB, in {seconds:.0f} s"
        + (f"; {done.resumed} shards were there already" if done.resumed else "")
    )
    if done.rejected or done.ignored:
        typer.echo(
            f"{len(done.rejected)} images left out and {done.ignored} other files ignored; {target}/{room.REPORT_FILE} "
            "names them"
        )
    if done.cost is not None:
        cost = done.cost
        typer.echo(
            f"resizing: an image takes {cost.after_ms:.1f} ms of a core to decode and crop instead of {cost.before_ms:.1f}, "
            f"and {cost.after_bytes / 1e3:.0f} kB instead of {cost.before_bytes / 1e3:.0f}"
        )
    typer.echo(f"wrote {target}; check it with: zsr data verify {target}")


def _count_or_share(text: str) -> float:
    """A number of images, or a share below 1 such as 0.01 or 1%.

    Raises:
        ValueError: it is neither.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        wrong = not value >= 0 or (value >= 1 and (value != int(value) or text.endswith("%")))
    except (ValueError, OverflowError):
        wrong = True
    if wrong:
        raise ValueError(f"--max-bad {text}: is neither a number of images, such as 20, nor a share, such as 0.01%")
    return value


@app.command()
def verify(address: Address) -> None:
    """Read every shard and compare it with the index."""
    from zsr.cli.output import log_to_stderr
    from zsr.data import inspect as room

    log_to_stderr()
    problems = room.verify(address)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{address}: every shard is what the index says")


@app.command()
def info(address: Address) -> None:
    """Print what a set holds."""
    from zsr.cli.output import print_pairs
    from zsr.data import inspect as room

    found = room.info(address)
    per_class = "{}, with {} to {} images each".format(found["classes"], *found["samples_per_class"] or (0, 0))
    print_pairs(
        address,
        [
            ("name", found["name"]),
            ("images", str(found["samples"])),
            ("classes", per_class if found["classes"] else "none: the set has no labels"),
            ("templates", " | ".join(found["templates"][:3])),
            ("shards", f"{found['shards']}, {found['bytes'] / 1e6:.1f} MB"),
            ("digest", found["digest"]),
            ("licence", found["licence"]),
            ("source", found["source"]),
        ],
    )


@app.command()
def suite(
    name: Annotated[str | None, typer.Argument(metavar="[SUITE]", help="One protocol; all sets without.")] = None,
    root: Annotated[
        str | None, typer.Option("--root", help="Folder or s3://bucket/prefix to look for them in.")
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Also look into tars that have no index, which reads all of them once.")
    ] = False,
) -> None:
    """List the zero-shot test sets and the protocols that measure on them, and which sets are there."""
    from zsr.cli import suite as page

    page.show(name, root, count)


@app.command()
def index(address: Address) -> None:
    """Write index.json beside tars in CLIP_benchmark's layout, so that no other machine has to look into them."""
    from zsr.data.clip_benchmark import write_index

    found = write_index(address)
    typer.echo(f"wrote {address.rstrip('/')}/index.json: {found.samples} images in {len(found.shards)} tars")


@app.command()
def sample(
    address: Address,
    out: Annotated[Path, typer.Option("--out", help="Picture to write.")] = Path("sample.png"),
    seed: Annotated[int, typer.Option("--seed", help="Which images are taken.")] = 0,
) -> None:
    """Draw some of a set's images with their class names."""
    from zsr.data import inspect as room

    room.sample(address, out, seed=seed)
    typer.echo(f"wrote {out}")
