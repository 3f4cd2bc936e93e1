"""``zsr train``: one fine-tuning run, in this process or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zsr.config import RunConfig


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as attack.eps=2/255 train.epochs=5.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", "-p", help="A preset's name, or a YAML file.")] = "default",
    local: Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; by default one named after its settings.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue from the folder's latest checkpoint.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, touch nothing.")
    ] = False,
) -> None:
    """Fine-tune one model."""
    from zsr.cli.output import log_to_stderr
    from zsr.config import load_config

    config = load_config(preset, overrides or [])
    if dry_run:
        _print_plan(config, local)
        return
    log_to_stderr()
    if local:
        _train_here(config, _run_folder(config, output, resume))
    else:
        _train_on_ray(config, output, resume)


def run_name(config: RunConfig) -> str:
    """Readable and the same for the same settings, so that the same command finds its run again."""
    return f"{config.name}-{config.digest()[:8]}"


def _run_folder(config: RunConfig, output: Path | None, resume: bool) -> Path:
    folder = output or Path(config.launch.storage) / run_name(config)
    if resume or not (folder / "checkpoints").exists():
        return folder
    if output is not None:
        raise ValueError(f"--output {output}: holds a run's checkpoints; name another folder, or leave out --no-resume")
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")


def _train_here(config: RunConfig, folder: Path) -> None:
    from zsr.engine.loop import train as run_loop
    from zsr.engine.session import LocalSession
    from zsr.tracking import make_tracker

    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(f"run={run_name(config)} folder={folder}", err=True)
    session = LocalSession(folder, keep=config.train.keep_checkpoints)
    tracker = make_tracker(config.tracking, run_name=config.name, key={"run": folder.name}, folder=folder)
    try:
        result = run_loop(config, session, tracker)
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        typer.echo(f"stopped; the same command continues from the latest checkpoint in {folder}", err=True)
        raise typer.Exit(130) from None
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")
    _print_result(result.metrics, result.steps, str(session.saved()[-1]))


def _train_on_ray(config: RunConfig, output: Path | None, resume: bool) -> None:
    from zsr.launch.train import run_ray

    result = run_ray(config, run_name=output.name if output else run_name(config), storage=output, resume=resume)
    _print_result(result.metrics, result.steps, result.checkpoint)


def _print_result(metrics: dict[str, float], steps: int, checkpoint: str | None) -> None:
    from zsr.cli.output import print_table

    rows = [[name, f"{value:.4g}"] for name, value in sorted(metrics.items()) if isinstance(value, int | float)]
    print_table(f"after {steps} steps", ["metric", "value"], rows)
    if checkpoint is not None:
        typer.echo(f"checkpoint: {checkpoint}")
        typer.echo(f"next: zsr eval --model {checkpoint}   or   zsr export {checkpoint} --out exported")


def _print_plan(config: RunConfig, local: bool) -> None:
    """What the run would read and do; reads the data sets' indexes and nothing else."""
    from zsr.cli.output import print_pairs
    from zsr.config import OBJECTIVES
    from zsr.data.pipeline import num_steps_per_epoch
    from zsr.data.shards import ShardSet

    shards = ShardSet(config.data.train, config.data.cache_dir)
    held_out = ShardSet(config.data.val, config.data.cache_dir)
    per_epoch = num_steps_per_epoch(shards, config.train.batch_size, config.data.last_batch)
    steps = per_epoch * config.train.epochs
    if config.train.max_steps:
        steps = min(steps, config.train.max_steps)
    objective = OBJECTIVES.build(config.objective)
    units = objective.cost_units(getattr(config.attack, "steps", 0))
    workers = 1 if local else config.launch.workers
    print_pairs(
        f"{run_name(config)}: would run, nothing was started",
        [
            ("objective", config.objective.name),
            ("model", f"{config.model.name} {config.model.pretrained or ''}".strip()),
            ("training images", f"{len(shards)} in {len(shards.classes)} classes, {len(shards.index.shards)} shards"),
            ("validation images", f"{len(held_out)} in {len(held_out.classes)} classes"),
            ("steps", f"{steps} of batch {config.train.batch_size} ({per_epoch} an epoch)"),
            ("image-encoder passes", f"{units} a step, {units * steps * config.train.batch_size:,} images in all"),
            (
                "workers",
                f"{workers}, in this process" if local else f"{workers} x {config.launch.gpus_per_worker:g} GPU",
            ),
        ],
    )
