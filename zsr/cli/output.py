"""How commands speak: rich tables on a terminal, plain lines elsewhere, log lines of ``key=value`` on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence


def log_to_stderr(level: int = logging.INFO) -> None:
    """Show zsr's log lines, once."""
    logger = logging.getLogger("zsr")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Piped into a file a table must not be cut to the eighty columns that rich then assumes.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values below each other."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


class ProgressLine:
    """Keeps one line on stderr up to date; away from a terminal it is a line now and then."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.shown_at = time.monotonic()

    def __call__(self, data: str, label: str, done: int, total: int) -> None:
        finished = done >= total
        if not finished and time.monotonic() - self.shown_at < (0.2 if self.on_terminal else 20):
            return
        self.shown_at = time.monotonic()
        line = f"set={data} eps={label} done={done}/{total}"
        sys.stderr.write(f"\r{line}\x1b[K" + "\n" * finished if self.on_terminal else f"{line}\n")
        sys.stderr.flush()


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
