"""``zsr train``: one fine-tuning run, in this process or on a Ray cluster."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zsr.config import RunConfig


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as attack.eps=2/255 train.epochs=5.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", "-p", help="A preset's name, or a YAML file.")] = "default",
    local: Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder; without --local, the folder of runs."),
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
        _train_here(config, _run_folder(config, output, resume), resume)
    else:
        _train_on_ray(config, output, resume)


def run_name(config: RunConfig) -> str:
    """Readable and the same for the same settings, so that the same command finds its run again."""
    return f"{config.name}-{config.digest()}"


def free_name(name: str, taken: Collection[str]) -> str:
    """``name``, or the first of ``name-2``, ``name-3``, ... that is not taken."""
    return next(
        candidate
        for number in itertools.count(1)
        if (candidate := name if number == 1 else f"{name}-{number}") not in taken
    )


def _run_folder(config: RunConfig, output: Path | None, resume: bool) -> Path:
    if output is not None:
        return output
    storage, name = Path(config.launch.storage), run_name(config)
    if "://" in config.launch.storage:
        raise ValueError(f"launch.storage={config.launch.storage}: --local writes to a folder; name one with --output")
    if not resume and storage.is_dir():
        name = free_name(name, [folder.name for folder in storage.iterdir()])
    return storage / name


def _train_here(config: RunConfig, folder: Path, resume: bool) -> None:
    from zsr.engine.loop import train as run_loop
    from zsr.engine.session import LocalSession
    from zsr.tracking import make_tracker
    from zsr.tracking.record import record_end, record_start

    session = LocalSession(folder, keep=config.train.keep_checkpoints, resume=resume)
    typer.echo(f"run={run_name(config)} folder={folder}", err=True)
    tracker = make_tracker(config.tracking, run_name=config.name, key={"run": folder.name}, folder=folder)
    record_start(tracker, config, {})
    try:
        result = run_loop(config, session, tracker)
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        typer.echo(f"stopped; the same command continues from the latest checkpoint in {folder}", err=True)
        raise typer.Exit(130) from None
    except BaseException:
        tracker.finish("FAILED")
        raise
    record_end(tracker, result.metrics)
    tracker.finish("FINISHED")
    _print_result(config, result.metrics, str(session.saved()[-1]))


def _train_on_ray(config: RunConfig, output: Path | None, resume: bool) -> None:
    from zsr.launch.cluster import attach
    from zsr.launch.store import Store
    from zsr.launch.train import run_ray

    storage = str(output) if output is not None else config.launch.storage
    name = run_name(config) if resume else free_name(run_name(config), Store(storage).names())
    typer.echo(f"run={name} storage={storage}", err=True)
    attach()
    result = run_ray(config, name, storage=storage)
    checkpoint = result.checkpoint.path if result.checkpoint is not None else None
    _print_result(config, result.metrics or {}, checkpoint)


def _print_result(config: RunConfig, metrics: Mapping[str, object], checkpoint: str | None) -> None:
    from zsr.cli.output import print_pairs
    from zsr.config import OBJECTIVES

    print_pairs(
        "", [(name, f"{value:.4g}") for name, value in sorted(metrics.items()) if isinstance(value, int | float)]
    )
    if checkpoint is not None:
        typer.echo(f"checkpoint: {checkpoint}")
        typer.echo(f"evaluate it: zsr eval --model {checkpoint}")
        model = config.model
        beyond = model.adapt != "weights" or model.attention_cap or model.attention_drop or model.expand_text
        if not beyond and not OBJECTIVES.build(config.objective).expands_text:  # open_clip can carry it
            typer.echo(f"hand it on:  zsr export {checkpoint} --out FOLDER")


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
