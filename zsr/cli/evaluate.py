"""``zsr eval``: clean and robust zero-shot accuracy of one model on several sets and budgets, as a table."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer


class Precision(enum.StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Norm(enum.StrEnum):
    linf = "linf"
    l2 = "l2"


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint, run or exported folder, or a model's name.")],
    data: Annotated[str, typer.Option("--data", help="Sets to evaluate on, separated by commas.")] = (
        "zsr:emoji/test_both,zsr:emoji/test_style,zsr:emoji/test_concepts"
    ),
    eps: Annotated[
        str, typer.Option("--eps", help="Budgets in pixel units, separated by commas.")
    ] = "1/255,2/255,4/255",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of PGD.")] = 10,
    step_size: Annotated[str | None, typer.Option("--step-size", help="Of PGD; a quarter of eps by default.")] = None,
    norm: Annotated[Norm, typer.Option("--norm")] = Norm.linf,
    restarts: Annotated[int, typer.Option("--restarts", min=1)] = 1,
    num_samples: Annotated[int, typer.Option("--num-samples", min=0, help="Of each set; 0 takes all.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 128,
    template: Annotated[
        str | None, typer.Option("--template", help="Prompt with {}; each set's own first by default.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="open_clip's tag, for an architecture name.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the encoder.")] = Precision.fp32,
    seed: Annotated[int, typer.Option("--seed", help="Of the attack's random starts.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cuda where there is one, else cpu.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results, with their protocol, here.")
    ] = None,
) -> None:
    """Evaluate a model under PGD and print a table."""
    import torch

    from zsr.cli.models import load_named
    from zsr.cli.output import percent, print_table, progress_line
    from zsr.data.shards import ShardSet
    from zsr.engine.quick_eval import ZeroShotHead
    from zsr.engine.quick_eval import evaluate as evaluate_set
    from zsr.models import TextBank

    if template is not None and "{}" not in template:
        raise ValueError(f"--template {template!r}: needs {{}} where the class name goes")
    budgets = _attacks(eps, steps, step_size, norm.value, restarts)
    sets = [ShardSet(address.strip()) for address in data.split(",") if address.strip()]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip, trained_template = load_named(model, pretrained, precision.value, device)
    bank = TextBank(clip)

    records: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for shards in sets:
        prompt = template or trained_template or shards.templates[0]
        head = ZeroShotHead(clip, bank, shards.classes, [prompt])
        cells: list[str] = []
        for label, attack in budgets.items():
            result = evaluate_set(
                head,
                shards,
                attack,
                num_samples=num_samples,
                batch_size=batch_size,
                seed=seed,
                progress=progress_line(f"{shards.address} eps={label}"),
            )
            robust, zero = result.robust_acc or 0.0, result.zero_grad_frac or 0.0
            cells = cells or [
                shards.address,
                str(result.num_samples),
                str(result.num_classes),
                percent(result.clean_acc),
            ]
            # Zero input gradients mean that the attack was blind there, not that the model is robust.
            cells.append(percent(robust) + (f" ({100 * zero:.0f}% blind)" if zero else ""))
            records.append({"data": shards.address, "eps": label, "template": prompt, **dataclasses.asdict(result)})
        rows.append(cells)
    header = ["set", "images", "classes", "clean", *(f"{norm.value} {label}" for label in budgets)]
    print_table(f"{model}: accuracy in %, PGD-{steps}", header, rows)
    if json_file is not None:
        protocol = {
            "model": model,
            "image_size": clip.image_size,
            "attacks": {label: attack.config.model_dump(mode="json") for label, attack in budgets.items()},
            "batch_size": batch_size,
            "precision": precision.value,
            "seed": seed,
        }
        json_file.write_text(json.dumps({"protocol": protocol, "results": records}, indent=2) + "\n")


def _attacks(eps: str, steps: int, step_size: str | None, norm: str, restarts: int) -> dict[str, Any]:
    """One attack for each budget, by the text the user wrote it as."""
    from zsr.config import ATTACKS
    from zsr.config.base import parse_fraction

    attacks: dict[str, Any] = {}
    for label in (part.strip() for part in eps.split(",") if part.strip()):
        try:
            length = parse_fraction(step_size) if step_size else float(parse_fraction(label)) / 4
        except ValueError:
            raise ValueError(f"--eps {label}: should be a number or a fraction such as 2/255") from None
        config = ATTACKS.config_class("pgd").model_validate(
            {"name": "pgd", "eps": label, "step_size": length, "steps": steps, "norm": norm, "restarts": restarts}
        )
        attacks[label] = ATTACKS.build(config)
    if not attacks:
        raise ValueError("--eps: names no budget; write such as 1/255,4/255")
    return attacks
