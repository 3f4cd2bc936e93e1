"""``zsr eval``: clean and robust zero-shot accuracy of one model on several sets and budgets, as a table."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsr.cli.output import ProgressLine, percent, print_table

if TYPE_CHECKING:
    from zsr.eval import Accuracy


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
    attack: Annotated[
        str, typer.Option("--attack", help="pgd, cw, apgd, autoattack (or aa), square, fab: see zsr/attacks.")
    ] = "pgd",
    attack_set: Annotated[
        list[str] | None,
        typer.Option("--attack-set", metavar="KEY=VALUE", help="A setting of the attack; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of the attack; 10 for pgd and cw, 100 for the others.")
    ] = None,
    step_size: Annotated[
        str | None, typer.Option("--step-size", help="Of pgd and cw; a quarter of eps by default.")
    ] = None,
    norm: Annotated[Norm, typer.Option("--norm")] = Norm.linf,
    restarts: Annotated[int | None, typer.Option("--restarts", min=1, help="Of the attack; 1 by default.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=0, help="Of each set; 0 takes all.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 128,
    template: Annotated[
        str | None, typer.Option("--template", help="Prompt with {}; each set's own first by default.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="open_clip's tag, for an architecture name.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the encoder.")] = Precision.fp32,
    seed: Annotated[int, typer.Option("--seed", help="Of the attack's random starts and of a defence's noise.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cuda where there is one, else cpu.")] = None,
    defense: Annotated[
        str | None, typer.Option("--defense", help="Also measure with this test-time defence, such as ttc.")
    ] = None,
    defense_set: Annotated[
        list[str] | None,
        typer.Option("--defense-set", metavar="KEY=VALUE", help="A setting of the defence; may be repeated."),
    ] = None,
    gate_model: Annotated[
        str | None,
        typer.Option(
            "--gate-model", help="Pre-trained model that gates the defence; the one a checkpoint came from by default."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results, with their protocol, here.")
    ] = None,
) -> None:
    """Evaluate a model under an attack and print a table.

    With --defense each set gets two rows, without and with the defence, from one run of the attack. The attack does not know
    the defence: it is crafted on the bare model, on every sample that is right without the defence or with it.
    """
    import torch

    from zsr.cli.attacks import attack_title, read_attacks, stage_sentences
    from zsr.cli.defended import guard, read_defense
    from zsr.cli.models import load_named
    from zsr.data.shards import ShardSet
    from zsr.eval import evaluate_sets

    if template is not None and "{}" not in template:
        raise ValueError(f"--template {template!r}: needs {{}} where the class name goes")
    defense_config = read_defense(defense, defense_set or [], gate_model)
    attacks = read_attacks(
        attack,
        eps,
        norm=norm.value,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        settings=attack_set or [],
    )
    sets = [ShardSet(address.strip()) for address in data.split(",") if address.strip()]
    if not sets:
        raise ValueError("--data: names no set; write such as zsr:emoji/test_both")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip, trained_template = load_named(model, pretrained, precision.value, device)
    guarded = None
    if defense_config is not None:
        guarded = guard(
            clip,
            model,
            defense_config,
            gate_model,
            pretrained=pretrained,
            precision=precision.value,
            device=device,
            seed=seed,
        )
    rows = evaluate_sets(
        clip,
        sets,
        attacks,
        template=template or trained_template,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        progress=ProgressLine(),
        defended=None if guarded is None else guarded.defended,
    )
    header = ["set", "images", "chance", "clean", *(f"{norm.value} {label}" for label in attacks)]
    cells = [
        [
            row.data,
            str(row.clean.num_samples),
            percent(row.chance),
            _with_interval(row.clean),
            # Zero input gradients mean that the attack was blind there, not that the model is robust.
            *(_with_interval(row.robust[label]) + _blind(row.zero_grad_frac[label]) for label in attacks),
        ]
        for row in rows
    ]
    title = f"{model}: accuracy in %, {attack_title(next(iter(attacks.values())))}, with 95% intervals"
    if guarded is not None:
        title += "; attack oblivious of the defence"
        header.insert(1, "defence")
        for row, line in zip(rows, cells, strict=True):
            line.insert(1, row.defense or "none")
    print_table(title, header, cells)
    for sentence in (sentence for row in rows for sentence in stage_sentences(row)):
        typer.echo(sentence)
    for sentence in guarded.sentences() if guarded is not None else ():
        typer.echo(sentence)
    if json_file is not None:
        protocol = {
            "model": model,
            "image_size": clip.image_size,
            "attacks": {label: each.config.model_dump(mode="json") for label, each in attacks.items()},
            "batch_size": batch_size,
            "precision": precision.value,
            "seed": seed,
            "defense": None if guarded is None else guarded.protocol(),
        }
        results = [dataclasses.asdict(row) for row in rows]
        json_file.write_text(json.dumps({"protocol": protocol, "results": results}, indent=2) + "\n")


def _with_interval(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{percent(accuracy.value)} ({percent(low)}-{percent(high)})"


def _blind(zero_grad_frac: float) -> str:
    return f" {percent(zero_grad_frac)}% blind" if zero_grad_frac else ""
