"""``zsr``: its commands, and the one place where a user's mistake becomes a sentence instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from zsr.cli import bench, config, data, doctor, evaluate, export, objectives, report, sweep, train

# Which extra brings a package that the core does without.
_EXTRAS = {
    "ray": "ray",
    "optuna": "ray",
    "mlflow": "mlflow",
    "boto3": "s3",
    "botocore": "s3",
    "resvg_py": "recipes",
} | {"pyautoattack": "dev"}

app = typer.Typer(
    name="zsr",
    help="Fine-tune CLIP so that zero-shot classification survives adversarial perturbation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
# What follows the file belongs to the sweep, --help included.
app.command("sweep", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(sweep.sweep)
app.add_typer(evaluate.app, name="eval")
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command("objectives")(objectives.objectives)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.add_typer(bench.app, name="bench")


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; ZSR_DEBUG=1 does the same.")
    ] = False,
) -> None:
    if debug:
        os.environ["ZSR_DEBUG"] = "1"


@app.command("version")
def version() -> None:
    """Print zsr's version."""
    from zsr import __version__

    typer.echo(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, with 2 after a user's mistake, or as the command says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, prog_name="zsr")
    except Exception as error:
        sentences = explain(error)
        if os.environ.get("ZSR_DEBUG") == "1" or not sentences:
            raise
        for sentence in sentences:
            typer.echo(f"error: {sentence}", err=True)
        sys.exit(2)


def explain(error: Exception) -> list[str]:
    """Say in sentences what the user can do about ``error``; nothing if it is not theirs to mend."""
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        return [f"{error.name} is not installed; pip install 'zsr[{extra}]'"] if extra else []
    if isinstance(
        error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError
    ):
        return [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
    if type(error).__name__ in ("Diverged", "WorkerLost"):  # of modules that only training imports
        return [str(error)]
    if not isinstance(error, ValueError):
        return []
    problems = getattr(error, "problems", None)  # ConfigError, without importing pydantic for it
    if isinstance(problems, list):
        return problems
    if type(error).__name__ == "ValidationError":
        from pydantic import ValidationError

        from zsr.config.errors import describe_errors

        if isinstance(error, ValidationError):
            return describe_errors(error)
    return [str(error) or type(error).__name__]


if __name__ == "__main__":
    main()
