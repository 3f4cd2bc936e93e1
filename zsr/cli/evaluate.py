"""``zsr eval``: clean and robust zero-shot accuracy of models on sets and suites, as result cards and a table."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zsr.attacks.base import Attack

app = typer.Typer(help="Measure clean and robust zero-shot accuracy; write result cards.")


class Precision(enum.StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Norm(enum.StrEnum):
    linf = "linf"
    l2 = "l2"


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a result card."""
    from zsr.eval.card import card_schema

    typer.echo(json.dumps(card_schema(), indent=1))


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Checkpoint, run or exported folder, or a model's name; may be repeated."),
    ] = None,
    data: Annotated[
        str,
        typer.Option("--data", help="Sets to evaluate on, addresses or names of the registry, separated by commas."),
    ] = "zsr:emoji/test_both,zsr:emoji/test_style,zsr:emoji/test_concepts",
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="A protocol's sets, in its way; see zsr data suite. In place of --data."),
    ] = None,
    root: Annotated[
        str | None, typer.Option("--root", help="Folder or s3://bucket/prefix that holds the sets of the registry.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop where a set of the suite is missing.")] = False,
    eps: Annotated[
        str | None,
        typer.Option("--eps", help="Budgets in pixel units, separated by commas; 1/255,2/255,4/255 or the suite's."),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help="pgd (by default, or the suite's), cw, apgd, autoattack (aa), square, fab, adaptive or none; may be repeated.",
        ),
    ] = None,
    attack_set: Annotated[
        list[str] | None,
        typer.Option(
            "--attack-set",
            metavar="KEY=VALUE",
            help="A setting of the attack, of one of several as adaptive.eot=5; may be repeated.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of the attack; 10 for pgd and cw, 100 for the others.")
    ] = None,
    step_size: Annotated[
        str | None, typer.Option("--step-size", help="Of pgd and cw; a quarter of eps by default.")
    ] = None,
    norm: Annotated[Norm, typer.Option("--norm")] = Norm.linf,
    restarts: Annotated[int | None, typer.Option("--restarts", min=1, help="Of the attack; 1 by default.")] = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", min=0, help="Of each set; 0 takes all, as does a suite that names none."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 128,
    template: Annotated[
        str | None, typer.Option("--template", help="Prompt with {}; each set's own first by default.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="open_clip's tag, for an architecture name.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the attack's passes; verdicts are in fp32 always.")
    ] = Precision.fp32,
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
    craft_template: Annotated[
        str | None,
        typer.Option("--craft-template", metavar="PROMPT", help="The attack sees this prompt; the served ones judge."),
    ] = None,
    craft_superclasses: Annotated[
        bool, typer.Option("--craft-superclasses", help="The attack aims at superclasses; the served classes judge.")
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Ray workers that do the batches; 0 does them in this process.")
    ] = 0,
    mlflow_run: Annotated[
        str | None, typer.Option("--mlflow-run", metavar="NAME", help="Put cards and numbers on an MLflow run.")
    ] = None,
    log: Annotated[
        bool, typer.Option("--log", help="Put cards and numbers on the run that trained the model.")
    ] = False,
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow's address; MLFLOW_TRACKING_URI by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the cards; .zsr/results by default, under ZSR_HOME if set.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and measure nothing.")
    ] = False,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Also run the checks that need attacks of their own.")
    ] = True,
) -> None:
    """Evaluate models under attacks: a result card for each model, set, attack and budget, and a table of them.

    A card that is there is not measured again, and what was interrupted goes on at the last finished batch.

    With --defense each set gives two cards, without and with the defence, from one run of the attack. Unless it is the adaptive
    one, the attack does not know the defence: it is crafted on the bare model, on every sample that is right without the
    defence or with it.
    """
    if context.invoked_subcommand is not None:
        return
    from zsr.cli.attacks import EPS, read_attacks, read_craft, suite_attacks
    from zsr.cli.defended import read_defense
    from zsr.cli.eval_jobs import Order, run
    from zsr.cli.eval_sets import read_sets
    from zsr.cli.models import takes_pretrained
    from zsr.data.suite import load_suite

    if not model:
        raise ValueError("--model: names no model; write such as --model zsr:emoji-vit")
    if template is not None and "{}" not in template:
        raise ValueError(f"--template {template!r}: needs {{}} where the class name goes")
    if template is not None and suite is not None:
        raise ValueError("--template: the prompts are the suite's; leave it out, or name sets with --data")
    if pretrained is not None and not any(map(takes_pretrained, [*model, *([gate_model] if gate_model else [])])):
        raise ValueError(f"--pretrained {pretrained}: {model[0]} brings its own weights; leave it out")
    names = attack or ["pgd"]
    if "none" in names and len(names) > 1:
        raise ValueError("--attack none: stands alone; leave out the other attacks")
    protocol = None if suite is None else load_suite(suite)
    options: dict[str, Any] = {"norm": norm.value, "steps": steps, "step_size": step_size, "restarts": restarts}
    attacks: list[tuple[str, Attack[Any]]] = []
    if protocol is not None and protocol.protocol.attacks and not attack:
        attacks, words = suite_attacks(protocol.protocol, eps, given=options, settings=attack_set or [])
        for sentence in words:
            typer.echo(sentence, err=True)
    elif names != ["none"]:
        for name in names:
            own = read_attacks(name, eps or EPS, settings=attack_set or [], others=names, **options)
            attacks += own.items()
    defense_config = read_defense(defense, defense_set or [], gate_model)
    if defense_config is None and any(one.config.name == "adaptive" for _, one in attacks):
        raise ValueError("--attack adaptive: needs a defence to know; add --defense ttc")
    craft = read_craft(craft_template, craft_superclasses, [one.config.name for _, one in attacks])
    test_sets, missing = read_sets(protocol, data, root, num_samples, strict)
    order = Order(
        models=model,
        suite=protocol,
        test_sets=test_sets,
        missing=missing,
        attacks=attacks,
        template=template,
        pretrained=pretrained,
        precision=precision.value,
        seed=seed,
        device=device,
        defense=defense_config,
        gate_model=gate_model,
        craft=craft,
        out=out,
        workers=workers,
        mlflow_run=mlflow_run,
        log=log,
        tracking_uri=tracking_uri,
        batch_size=batch_size,
        probes=probes,
    )
    run(order, dry_run=dry_run)
