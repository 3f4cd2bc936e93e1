"""``zsr sweep``: run a sweep file here; ``ray job submit -- python sweeps/x.py`` runs the same file on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Such as sweeps/tima_sweep.py, or just tima.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="Passed on: --num-trials 8 --dry-run --preset demo key=value ..."),
    ] = None,
) -> None:
    """Run a sweep: many fine-tuning runs, searched by Optuna, compared in MLflow."""
    import runpy
    import sys

    path = find_sweep(file)
    sys.argv = [str(path), *(arguments or [])]
    runpy.run_path(str(path), run_name="__main__")


def find_sweep(file: str, folder: Path = Path("sweeps")) -> Path:
    """The sweep file that was meant: a path, or a name in ``sweeps/``.

    Raises:
        ValueError: there is none; the sentence lists those there are.
    """
    for path in (Path(file), folder / file, folder / f"{file}.py", folder / f"{file}_sweep.py"):
        if path.is_file():
            return path
    known = ", ".join(sorted(str(path) for path in folder.glob("*.py")))
    raise ValueError(f"{file!r} is not a sweep file; there are {known}" if known else f"{file!r} is not a sweep file")
