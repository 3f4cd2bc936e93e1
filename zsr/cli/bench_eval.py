"""zsr bench eval: what an evaluation costs here, against the public AutoAttack, text encoded anew, and the bare tower."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zsr.bench.eval_attack import AttackRow
    from zsr.bench.eval_prompts import PromptsRow
    from zsr.bench.eval_rate import RateRow
    from zsr.bench.sides import Sides

PARTS = ("autoattack", "prompts", "throughput")


def eval_(
    model: Annotated[
        str, typer.Option("--model", help="A run's folder, an exported folder or a model's name.")
    ] = "zsr:emoji-vit",
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="open_clip's tag, for an architecture name; random for none.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="The set that is attacked and classified.")
    ] = "zsr:emoji/test_style",
    num_samples: Annotated[
        int,
        typer.Option("--num-samples", min=1, help="Images under AutoAttack; the throughput takes eight times as many."),
    ] = 32,
    eps: Annotated[str, typer.Option("--eps", help="L-inf budget of AutoAttack, such as 2/255.")] = "2/255",
    parts: Annotated[str, typer.Option("--parts", help=f"Of {','.join(PARTS)}, with commas.")] = ",".join(PARTS),
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter AutoAttack, for both: 10 steps, 2 targets, 100 queries; PGD-2.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of both sides.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns; AutoAttack's images are split over them.")] = 2,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of both sides; 0 leaves torch's choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time an evaluation beside its public counterparts, in turns, in wall and in processor time."""
    from dataclasses import asdict

    import torch

    from zsr.attacks.autoattack import AutoAttackConfig
    from zsr.bench.eval_attack import compare_attacks
    from zsr.bench.eval_prompts import compare_prompts
    from zsr.bench.eval_rate import compare_rate
    from zsr.cli.bench import Eta
    from zsr.cli.models import load_named
    from zsr.data.shards import ShardSet
    from zsr.engine.quick_eval import ZeroShotHead
    from zsr.models import TextBank

    wanted = parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ValueError(f"--parts {unknown[0]}: is not one of {', '.join(PARTS)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use cpu")
    if threads:
        torch.set_num_threads(threads)
    shorter = {"steps": 10, "target_classes": 2, "queries": 100} if quick else {}
    attack = AutoAttackConfig.model_validate({"eps": eps, **shorter})
    clip, template = load_named(model, pretrained, "fp32", device)
    clip.eval()
    shards = ShardSet(data)
    head = ZeroShotHead(clip, TextBank(clip), shards.classes, [template or shards.templates[0]])
    show = Eta(len(wanted), "part")
    found: dict[str, AttackRow | PromptsRow | RateRow] = {}
    if "autoattack" in wanted:
        rows = compare_attacks(
            head, shards, attack, num_samples=num_samples, batch_size=batch_size, rounds=rounds, device=device,
            progress=show,
        )  # fmt: skip
        found |= {f"autoattack {row.precision}": row for row in rows}
    if "prompts" in wanted:
        found["prompts"] = compare_prompts(clip, steps=2 if quick else 10, rounds=rounds, device=device, progress=show)
    if "throughput" in wanted:
        found["throughput"] = compare_rate(
            head, shards, num_samples=8 * num_samples, batch_size=batch_size, rounds=max(rounds, 5), device=device,
            progress=show,
        )  # fmt: skip
    reached = {part: row.reached(device) for part, row in found.items()}
    if "autoattack" in wanted:  # the faster of the two is the one that has a bar
        reached["autoattack fp32"] = reached["autoattack bf16"] = (
            reached["autoattack fp32"] or reached["autoattack bf16"]
        )
    if as_json:
        typer.echo(
            json.dumps({part: asdict(row) | {"reached": reached[part]} for part, row in found.items()}, indent=2)
        )
    else:
        _print(found, f"{model}, {device}, {torch.get_num_threads()} threads", device)
    missed = [part for part, ok in reached.items() if not ok]
    if missed:
        typer.echo(f"missed: {', '.join(missed)}", err=True)
        if check:
            raise typer.Exit(1)


def _print(found: dict[str, AttackRow | PromptsRow | RateRow], title: str, device: str) -> None:
    from zsr.bench import eval_attack, eval_prompts, eval_rate
    from zsr.cli.output import print_table

    rows, notes = [], []
    for row in found.values():
        if isinstance(row, eval_attack.AttackRow):
            rows.append(_row(f"AutoAttack in {row.precision} against pyautoattack", row.time, f"{eval_attack.BAR:g}x"))
            notes.append(
                f"AutoAttack, {row.precision}: of {row.samples} images {row.clean} right without it, {row.robust} after ours, "
                f"{row.their_robust} after theirs; {row.differ} verdicts differ"
            )
            notes.append(f"  passes of the image tower: {row.passes} ours, {row.their_passes} theirs")
        elif isinstance(row, eval_prompts.PromptsRow):
            what = f"PGD-{row.steps}, {row.prompts} prompts, against encoding them anew"
            rows.append(_row(what, row.time, f"{eval_prompts.BAR:g}x"))
            notes.append(
                f"prompts: encoded once in {row.text.cpu_s:.2f} s; counted to these batches alone the ratio is "
                f"{row.with_text:.2f}; both see the same class on {row.agree:.1%} of the images"
            )
        else:
            rows.append(_row("bare tower against the runner", row.whole, f"{1 / eval_rate.BAR:.2f}x at most"))
            rows.append(_row("bare tower against the runner, decoded before", row.decoded, "-"))
            notes.append(
                f"throughput: {row.share(row.whole, device):.1%} of the bare tower's rate, "
                f"{row.share(row.decoded, device):.1%} with images decoded before, bar {eval_rate.BAR:.0%}; decoding "
                f"alone takes {row.decoding.cpu_s / row.bare.cpu_s:.1%} of the tower's processor time"
            )
    header = ["what", "ours s", "theirs s", "ratio", "rounds", "ours wall s", "theirs wall s", "wall ratio", "bar"]
    print_table(f"{title}; seconds of processor time unless wall is said", header, rows)
    for note in notes:
        typer.echo(note)


def _row(what: str, sides: Sides, bar: str) -> list[str]:
    rounds = f"{sides.cpu_rounds.low:.2f}-{sides.cpu_rounds.high:.2f}"
    seconds = [f"{side.cpu_s:.2f}" for side in (sides.ours, sides.theirs)]
    walls = [f"{side.wall_s:.1f}" for side in (sides.ours, sides.theirs)]
    return [what, *seconds, f"{sides.cpu_ratio:.2f}", rounds, *walls, f"{sides.wall_ratio:.2f}", bar]
