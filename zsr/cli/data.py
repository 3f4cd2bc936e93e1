"""``zsr data``: make, check and look at sets of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert, verify and look at data sets.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="SET", help="Folder, s3://bucket/prefix, or such as zsr:emoji/train.")]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, one folder a class.")],
    target: Annotated[str, typer.Argument(metavar="SET", help="Folder or s3://bucket/prefix to write.")],
    name: Annotated[str | None, typer.Option("--name", help="The set's name; the folder's by default.")] = None,
    template: Annotated[
        str, typer.Option("--template", help="Prompt with {} for the class.")
    ] = "This is a photo of a {}.",
    shard_size: Annotated[int, typer.Option("--samples-per-shard", min=1)] = 1000,
    image_size: Annotated[
        int, typer.Option("--image-size", min=0, help="Shorter side after resizing; 0 keeps files.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the order in which samples are laid into shards.")] = 0,
    licence: Annotated[str, typer.Option("--licence", help="Of the images, for the index.")] = "",
    labels: Annotated[
        bool,
        typer.Option("--labels/--no-labels", help="Without: all images under FOLDER, for objectives such as fare."),
    ] = True,
) -> None:
    """Turn a folder of images into shards with an index."""
    from zsr.data import convert as room

    room.convert(
        source,
        target,
        name=name,
        templates=[template],
        samples_per_shard=shard_size,
        image_size=image_size,
        seed=seed,
        licence=licence,
        labels=labels,
    )
    typer.echo(f"wrote {target}; check it with: zsr data verify {target}")


@app.command()
def verify(address: Address) -> None:
    """Read every shard and compare it with the index."""
    from zsr.data import convert as room

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
    from zsr.data import convert as room

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
    from zsr.data import convert as room

    room.sample(address, out, seed=seed)
    typer.echo(f"wrote {out}")
