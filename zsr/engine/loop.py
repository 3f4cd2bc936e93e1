"""THE training loop. One batch, from shard to optimizer, is :meth:`Trainer._step`, read top to bottom.

It knows nothing of Ray or MLflow: a session carries it (where to resume, whom to give checkpoints) and a tracker records
it. The same loop runs under ``zsr train --local``, in a test and on a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from zsr.attacks.checks import metrics_of
from zsr.attacks.noise import sample_seeds
from zsr.config.schema import ATTACKS, RunConfig
from zsr.data.pipeline import Batch, num_steps_per_epoch, train_batches
from zsr.data.plan import Position
from zsr.data.shards import ShardSet
from zsr.engine.checkpoint import Snapshot, TrainState, load_checkpoint
from zsr.engine.distributed import average_gradients, same_on_all_ranks
from zsr.engine.meters import Meters
from zsr.engine.optim import learning_rate, make_optimizer, set_learning_rate
from zsr.engine.protocols import Session, Tracker
from zsr.engine.quick_eval import ZeroShotHead, evaluate
from zsr.engine.step import TrainStep
from zsr.models import TextBank, load_model

log = logging.getLogger("zsr.train")


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run hands back: its last metrics, the optimizer steps done, and how long they took."""

    metrics: dict[str, float]
    steps: int
    elapsed_s: float


def train(config: RunConfig, session: Session, tracker: Tracker | None = None) -> TrainResult:
    """Fine-tune as ``config`` says, from the session's checkpoint if it has one.

    Args:
        session: this rank's link to whatever started it.
        tracker: rank 0's record; None records nothing.

    Raises:
        ValueError: settings that the data or the model contradict; a checkpoint of another run.
        Diverged: the loss became infinite or not a number.
        OSError: a shard cannot be fetched, or a checkpoint not be written.
    """
    try:
        return Trainer(config, session, tracker).run()
    except BaseException:
        with contextlib.suppress(Exception):  # of two errors the first says what happened
            session.close()
        raise


class Trainer:
    """One run on one rank: everything that a step needs, made in the order in which it depends on each other."""

    def __init__(self, config: RunConfig, session: Session, tracker: Tracker | None) -> None:
        self.config, self.session, self.tracker = config, session, tracker
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        torch.manual_seed(config.seed)
        self.device = _device(session)

        cache = config.data.cache_dir
        self.train_set = ShardSet(config.data.train, cache)
        self.val_set = ShardSet(config.data.val, cache)
        self.model = load_model(config.model, config.train.precision, self.device)
        self.bank = TextBank(self.model, None if cache is None else Path(cache) / "text")
        # Without classes of its own the training set needs none: the validation set's stand in where text is asked for.
        named = self.train_set if self.train_set.has_labels else self.val_set
        self.step_fn = TrainStep(config, self.model, self.bank, named.classes, self._templates(named))
        if self.step_fn.objective.uses_classes and not self.train_set.has_labels:
            raise ValueError(
                f"data.train={config.data.train}: has no labels, and objective.name={config.objective.name} uses classes; "
                "choose an objective that uses none (fare), or convert the images with their classes"
            )
        if config.model.expand_text and not self.train_set.has_labels:
            raise ValueError(
                f"model.expand_text=true: is fitted on the classes of data.train={config.data.train}, which has none; "
                "leave it off"
            )
        if not self.val_set.has_labels:
            raise ValueError(f"data.val={config.data.val}: has no labels; accuracy needs a set with classes")
        self.optimizer = make_optimizer(config.optim, self.step_fn.parameters, self.step_fn.text_parameters)
        self.val_attack = ATTACKS.build(config.eval.attack)

        self.steps_per_epoch = num_steps_per_epoch(self.train_set, config.train.batch_size, config.data.last_batch)
        planned = self.steps_per_epoch * config.train.epochs
        self.total_steps = min(planned, config.train.max_steps) if config.train.max_steps else planned
        self.meters = Meters()
        self.state = TrainState(run_id=tracker.run_id if tracker else "")
        checkpoint = session.resume_from()
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizer, config)
        same_on_all_ranks(self.step_fn.parameters)
        self._began, self._elapsed_before_s = time.monotonic(), self.state.elapsed_s
        self._worker_before_s = self.state.worker_s
        self._say(
            f"start step={self.state.step}/{self.total_steps} objective={config.objective.name} "
            f"cost_units={self.step_fn.objective.cost_units(getattr(config.attack, 'steps', 0))} "
            f"device={self.device} world_size={session.world_size} samples={len(self.train_set)} "
            f"classes={len(self.train_set.classes)}"
        )

    def run(self) -> TrainResult:
        """Train to the end."""
        self.model.train()
        batches = self._batches()
        self._window_start, self._window_steps, self._wait_s = time.monotonic(), 0, 0.0
        while self.state.step < self.total_steps:
            waiting = time.monotonic()
            position, batch = next(batches)
            self._wait_s += time.monotonic() - waiting

            self._step(batch)
            self.state.step += 1
            self.state.position, self.state.score = position, None
            self._window_steps += 1

            due = self._due(self.config.train.eval_every)
            log_due = due or self._due(self.config.train.log_every)
            # Asked only here: it may be a barrier, and no rank may ask alone.
            leaving = log_due and self.session.preempted()
            save_due = due or leaving or self._due(self.config.train.checkpoint_every, at_end=False)
            if log_due or save_due:
                self._log()
            if due:
                self._evaluate()
            if save_due:
                self._report()
        batches.close()
        self.session.close()
        return TrainResult(dict(self.state.metrics), self.state.step, self.state.elapsed_s)

    def _step(self, batch: Batch) -> None:
        """One optimizer step. Nothing here waits for the device."""
        step, config = self.state.step, self.config
        progress = step / self.total_steps
        set_learning_rate(self.optimizer, learning_rate(config.optim, step, self.total_steps))
        batch = batch.to(self.device, non_blocking=True)
        image_BCHW = batch.image.float() / 255
        seeds = sample_seeds(batch.key, "train", config.seed, self.state.position.epoch)

        output = self.step_fn(image_BCHW, batch.label, seeds, progress, batch.key)

        self.optimizer.zero_grad(set_to_none=True)  # after the attack: no gradient of it may reach the weights
        output.loss.total.backward()
        average_gradients(self.step_fn.parameters, len(batch) / config.train.batch_size)
        if config.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.step_fn.parameters, config.optim.grad_clip)
        self.optimizer.step()
        self.meters.add(output.scalars, len(batch))

    def _batches(self) -> Generator[tuple[Position, Batch], None, None]:
        yield from train_batches(
            self.train_set,
            seed=self.config.seed,
            global_batch=self.config.train.batch_size,
            last=self.config.data.last_batch,
            window=self.config.data.shuffle_window,
            image_size=self.model.image_size,
            rank=self.session.rank,
            world_size=self.session.world_size,
            start=self.state.position,
            num_workers=self.config.data.num_workers,
        )

    def _due(self, every: int, at_end: bool = True) -> bool:
        """Whether a thing done every so many steps is due now; with ``at_end``, also after the last step."""
        step = self.state.step
        return (every > 0 and step % every == 0) or (at_end and step == self.total_steps)

    def _log(self) -> None:
        """Read the meters (the only place where the host waits for the device) and record the window since last time."""
        means = self.meters.read()
        now = self._clock()
        if not means:
            return
        if not math.isfinite(means["train/loss"]):
            raise Diverged(
                f"train/loss={means['train/loss']} between steps {self.state.step - self._window_steps} and "
                f"{self.state.step}; lower optim.lr={self.config.optim.lr:g}, add optim.warmup_steps, or set "
                "optim.grad_clip=1"
            )
        seconds = now - self._window_start
        step = self.state.step
        metrics = {
            **means,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "perf/images_per_s": self._window_steps * self.config.train.batch_size / seconds,
            "data/wait_frac": self._wait_s / seconds,
            "cost/worker_hours": self.state.worker_s / 3600,
            **self._money(),
        }
        if self.device.type == "cuda":
            metrics["cost/gpu_hours"] = metrics["cost/worker_hours"]
        if self.step_fn.objective.needs_attack and hasattr(self.step_fn.attack, "threat"):
            metrics["train/eps"] = self.step_fn.attack.threat((step - 1) / self.total_steps).eps
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step)
        left = (self.total_steps - step) * seconds / self._window_steps
        shown = " ".join(f"{name.removeprefix('train/')}={value:.4g}" for name, value in means.items())
        self._say(
            f"step={step}/{self.total_steps} {shown} images_per_s={metrics['perf/images_per_s']:.0f} "
            f"wait={metrics['data/wait_frac']:.0%} eta={left:.0f}s"
        )
        self._window_start, self._window_steps, self._wait_s = now, 0, 0.0

    def _evaluate(self) -> None:
        """The quick evaluation: clean and robust accuracy on the validation set."""
        began = time.monotonic()
        head = ZeroShotHead(self.model, self.bank, self.val_set.classes, self._templates(self.val_set))
        result = evaluate(
            head,
            self.val_set,
            self.val_attack,
            num_samples=self.config.eval.num_samples,
            batch_size=self.config.eval.batch_size,
            seed=self.config.seed,
            rank=self.session.rank,
            world_size=self.session.world_size,
        )
        assert result.robust_acc is not None and result.zero_grad_frac is not None
        self.state.metrics = {
            "val/clean_acc": result.clean_acc,
            "val/robust_acc": result.robust_acc,
            "val/zero_grad_frac": result.zero_grad_frac,
            **metrics_of(result.findings),
        }
        self.state.score = result.robust_acc
        if self.tracker is not None:
            self.tracker.log_metrics(self.state.metrics, self.state.step)
        doubts = ",".join(f"{found.id}:{found.level}" for found in result.findings if found.level in ("warn", "fail"))
        self._say(
            f"step={self.state.step} val_clean_acc={result.clean_acc:.4f} val_robust_acc={result.robust_acc:.4f} "
            f"checks={doubts or 'ok'} samples={result.num_samples} seconds={time.monotonic() - began:.1f}"
        )
        self._window_start += time.monotonic() - began  # throughput is that of training

    def _report(self) -> None:
        """Hand metrics and a checkpoint to the session; every rank takes part, rank 0's is written."""
        began = self._clock()
        write = None
        if self.session.rank == 0:
            write = Snapshot(self.model, self.optimizer, self.state, self.config).write
        epoch = self.state.position.epoch + self.state.position.step / self.steps_per_epoch
        cost = self.state.worker_s / 3600
        metrics = {
            **self.state.metrics,
            "step": float(self.state.step),
            "epoch": epoch,
            "cost/worker_hours": cost,
            "cost/gpu_hours": cost if self.device.type == "cuda" else 0.0,
            **self._money(),
        }
        self.session.report(metrics, write)
        self._window_start += time.monotonic() - began

    def _money(self) -> dict[str, float]:
        """Dollars of the training so far, where the settings have a price; a sweep's account adds the start of its workers."""
        launch = self.config.launch
        paid_hours = self.state.worker_s / 3600 * (launch.gpus_per_worker or launch.cpus_per_worker)
        return {"cost/usd": paid_hours * launch.gpu_hour_price} if launch.gpu_hour_price else {}

    def _clock(self) -> float:
        """The time, after noting in the state how long the run has taken so far, over all attempts."""
        now = time.monotonic()
        self.state.elapsed_s = self._elapsed_before_s + now - self._began
        self.state.worker_s = self._worker_before_s + (now - self._began) * self.session.world_size
        return now

    def _templates(self, shards: ShardSet) -> list[str]:
        template = self.config.data.template
        return shards.templates[:1] if template is None else [template]

    def _say(self, line: str) -> None:
        if self.session.rank == 0:
            log.info("run=%s %s", self.config.name, line)


def _device(session: Session) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", session.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
