"""How far zsr eval is: a bar with the time left on a terminal, a line of key=value now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from zsr.cli.output import percent

if TYPE_CHECKING:
    from zsr.eval.runner import Moment

_EVERY_S = 20.0


class EvalProgress:
    """One line for the stage at hand, one that stays for each finished stage. Use it in a ``with`` block.

    Args:
        num_jobs: attacks to run; the time left over all of them is known once one is finished.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs, self.finished, self.found = num_jobs, 0, 0
        self.began = self.shown_at = self.stage_at = time.monotonic()
        self.stage, self.started_from = "", 0
        self._bar: Any = _make_bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("", numbers="", total=1) if self._bar else None

    def __enter__(self) -> EvalProgress:
        shown: AbstractContextManager[Any] = self._bar or nullcontext()
        shown.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def of(self, **names: str) -> Callable[[Moment], None]:
        """What a measurement tells; ``names`` say which one it is."""
        self.stage = ""
        return lambda moment: self._tell(names, moment)

    def job_done(self, measured: bool) -> None:
        """An attack is over; it was measured now, or its cards were there."""
        self.finished += measured
        self.found += not measured

    def _tell(self, names: dict[str, str], moment: Moment) -> None:
        now = time.monotonic()
        if moment.stage != self.stage:
            # The first batch's own time is not known, so rates count from its end.
            self.stage, self.stage_at, self.started_from = moment.stage, now, moment.done
        finished = moment.done >= moment.total
        if not finished and now - self.shown_at < (0.2 if self._bar else _EVERY_S):
            return
        self.shown_at = now
        self._write({**names, "stage": moment.stage}, self._numbers(moment, now, finished), moment, finished)

    def _numbers(self, moment: Moment, now: float, finished: bool) -> str:
        so_far = moment.so_far
        what = "clean" if moment.stage == "clean" else "robust"
        parts = [
            f"done={moment.done}/{moment.total}",
            f"{what}={percent(so_far.value)}({percent(so_far.low)}-{percent(so_far.high)})",
        ]
        if finished and what == "robust":
            parts.append(f"survivors={moment.total - moment.over}")
        done_here = moment.done - self.started_from
        if not finished and done_here:
            parts.append(f"eta={_duration((now - self.stage_at) / done_here * (moment.total - moment.done))}")
        if self.finished:
            left = (now - self.began) / self.finished * (self.num_jobs - self.finished - self.found)
            parts.append(f"attacks={self.finished + self.found}/{self.num_jobs} eta_all={_duration(left)}")
        return " ".join(parts)

    def _write(self, names: dict[str, str], numbers: str, moment: Moment, finished: bool) -> None:
        words = " ".join(f"{key}={value}" for key, value in names.items())
        if self._bar is None:
            sys.stderr.write(f"{words} {numbers}\n")
            sys.stderr.flush()
            return
        # A terminal may be narrow: the bar says what changes, the whole line stays once the stage is over.
        short = " ".join(names[key] for key in ("set", "eps", "stage") if key in names)
        self._bar.update(
            self._task, description=short, numbers=numbers, completed=moment.done, total=max(moment.total, 1)
        )
        if finished:
            self._bar.console.print(f"{words} {numbers}", highlight=False, soft_wrap=True)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.fields[numbers]}"), BarColumn(bar_width=20), TextColumn("{task.description}"),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
