"""The page that goes with a registered model: what it is, what it reaches, what was checked, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zsr.config import RunConfig, to_yaml


def model_card(
    config: RunConfig,
    metrics: Mapping[str, float],
    *,
    title: str,
    checks: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
) -> str:
    """Markdown for people: numbers first, then checks, origin and all settings.

    Args:
        config: settings of the run.
        metrics: final numbers.
        title: heading.
        checks: findings that a reader should know before trusting the numbers.
        origin: run, sweep, commit or whatever leads back to where the model came from.
    """
    lines = [
        f"# {title}",
        "",
        f"CLIP `{config.model.name}` fine-tuned with `{config.objective.name}` against `{config.attack.name}`"
        f" on `{config.data.train}`, selected on `{config.data.val}`.",
        "",
        *markdown_table(["metric", "value"], [[key, show(value)] for key, value in sorted(metrics.items())]),
        "",
        "Robust accuracy is against the quick attack `eval.attack`, on the validation set: good for choosing between",
        "runs, no substitute for a strong evaluation.",
        "",
        "## Checks",
        "",
        *[f"- {check}" for check in checks or ["none recorded"]],
        "",
    ]
    if origin:
        lines += ["## Origin", "", *markdown_table(["", ""], [[key, str(value)] for key, value in origin.items()]), ""]
    lines += [
        "## Load",
        "",
        "```python",
        "import open_clip",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")  # the downloaded files',
        "```",
        "",
        "## Settings",
        "",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows],
    ]


def show(value: float | None) -> str:
    """A number for a table: short, and a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}"
