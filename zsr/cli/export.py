"""``zsr export``: hand a fine-tuned model to programs that do not know zsr."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Format(enum.StrEnum):
    open_clip = "open_clip"


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or a run's folder (its latest).")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; made if missing.")],
    format: Annotated[Format, typer.Option("--format", help="What the folder is for.")] = Format.open_clip,
) -> None:
    """Write a folder that open_clip.create_model_and_transforms("local-dir:FOLDER") loads."""
    from zsr.cli.models import find_checkpoint
    from zsr.engine.checkpoint import load_trained
    from zsr.models.export import export_open_clip

    folder = find_checkpoint(Path(checkpoint))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; name a new folder")
    model, _ = load_trained(folder)
    export_open_clip(model, out)
    typer.echo(f'wrote {out}; load it with open_clip.create_model_and_transforms("local-dir:{out}")')
