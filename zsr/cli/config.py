"""``zsr config``: look at settings before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Show, compare and check configurations.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="Name of a preset, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as attack.eps=2/255.", show_default=False)
]


@app.command()
def show(
    source: Source = "default",
    overrides: Overrides = None,
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="The same as PRESET_OR_FILE.")] = None,
) -> None:
    """Print the whole configuration as YAML, defaults filled in."""
    from zsr.config import load_config, to_yaml

    if preset is not None and "=" not in source:
        if source not in ("default", preset):
            raise ValueError(f"--preset {preset}: and {source!r} name two configurations; name one")
        source = preset
    source, overrides = _split(source, overrides, preset or "default")
    config = load_config(source, overrides)
    typer.echo(to_yaml(config), nl=False)
    typer.echo(f"# digest: {config.digest()}")


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE")],
    right: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE")],
) -> None:
    """Print the settings in which two configurations differ."""
    from zsr.config import load_config
    from zsr.config.errors import show as show_value

    one, other = (flatten(load_config(source).model_dump(mode="json")) for source in (left, right))
    for path in [*one, *(path for path in other if path not in one)]:
        if one.get(path, ...) != other.get(path, ...):
            values = [show_value(tree[path]) if path in tree else "(none)" for tree in (one, other)]
            typer.echo(f"{path}: {values[0]} -> {values[1]}")


@app.command()
def validate(
    sources: Annotated[list[str], typer.Argument(metavar="PRESET_OR_FILE", help="As many as there are.")],
) -> None:
    """Check configurations; print one sentence for each thing that is wrong."""
    from zsr.config import ConfigError, load_config

    wrong = False
    for source in sources:
        try:
            config = load_config(source)
        except ConfigError as error:
            wrong = True
            for problem in error.problems:
                typer.echo(f"{source}: {problem}" if source not in problem else problem, err=True)
        else:
            typer.echo(f"{source}: valid, digest {config.digest()}")
    if wrong:
        raise typer.Exit(2)


@app.command()
def schema() -> None:
    """Print the JSON schema, for an editor's completion."""
    import json

    from zsr.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def presets() -> None:
    """List the presets that come with zsr."""
    from zsr.cli.output import print_table
    from zsr.config import load_config, preset_names

    rows = []
    for name in preset_names():
        config = load_config(name)
        model = f"{config.model.name} {config.model.pretrained or ''}".strip()
        rows.append([name, config.objective.name, model, config.data.train, str(config.train.batch_size)])
    print_table("", ["preset", "objective", "model", "data", "batch"], rows)


def flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted paths to plain values."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _split(source: str, overrides: list[str] | None, preset: str) -> tuple[str, list[str]]:
    """Let ``zsr config show attack.eps=2/255`` mean a preset with that override."""
    if "=" in source:
        return preset, [source, *(overrides or [])]
    return source, overrides or []
