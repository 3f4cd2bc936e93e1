"""How far zsr eval is: a bar with the time left on a terminal, a line of key=value now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from zsr.cli.output import percent

if TYPE_CHECKING:
    from zsr.eval.runner import Moment

_EVERY_S = 20.0


class EvalProgress:
    """One line for the stage at hand, one that stays for each finished stage.

    Args:
        num_jobs: attacks to run; the time left over all of them is known once one is finished.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs, self.finished = num_jobs, 0
        self.on_terminal = sys.stderr.isatty()
        self.began = self.shown_at = self.stage_at = time.monotonic()
        self.stage, self.started_from = "", 0

    def of(self, **names: str) -> Callable[[Moment], None]:
        """What a measurement tells; ``names`` say which one it is."""
        self.stage = ""
        return lambda moment: self._tell(" ".join(f"{key}={value}" for key, value in names.items()), moment)

    def job_done(self) -> None:
        self.finished += 1

    def _tell(self, names: str, moment: Moment) -> None:
        now = time.monotonic()
        if moment.stage != self.stage:
            self.stage, self.stage_at, self.started_from = moment.stage, now, moment.done
        finished = moment.done >= moment.total
        if not finished and now - self.shown_at < (0.2 if self.on_terminal else _EVERY_S):
            return
        self.shown_at = now
        parts = [names, f"stage={moment.stage}", f"done={moment.done}/{moment.total}"]
        so_far = moment.so_far
        what = "clean" if moment.stage == "clean" else "robust"
        parts.append(f"{what}={percent(so_far.value)}({percent(so_far.low)}-{percent(so_far.high)})")
        if finished and what == "robust":
            parts.append(f"survivors={moment.total - moment.over}")
        done_here = moment.done - self.started_from
        if not finished and done_here:
            parts.append(f"eta={_duration((now - self.stage_at) / done_here * (moment.total - moment.done))}")
        if self.finished:
            left = (now - self.began) / self.finished * (self.num_jobs - self.finished)
            parts.append(f"attacks={self.finished}/{self.num_jobs} eta_all={_duration(left)}")
        self._write(parts, moment.done / max(moment.total, 1), finished)

    def _write(self, parts: list[str], share: float, finished: bool) -> None:
        if self.on_terminal:
            bar = "#" * round(20 * share)
            sys.stderr.write(f"\r[{bar:<20}] {' '.join(parts)}\x1b[K" + "\n" * finished)
        else:
            sys.stderr.write(" ".join(parts) + "\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
