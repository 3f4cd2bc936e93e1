"""What ``zsr data suite`` prints: the protocols, their sets, and which of those are there."""

from __future__ import annotations

import typer

from zsr.cli.output import print_pairs, print_table
from zsr.data.index import INDEX_FILE
from zsr.data.shards import read_index
from zsr.data.storage import FileMissing, open_storage
from zsr.data.suite import Dataset, Suite, load_suite, suite_names


def show(name: str | None, root: str | None, count: bool) -> None:
    """Print one protocol in full, or all in short; then the sets.

    Args:
        name: of a protocol, or its file.
        root: where to look for the sets; embedded ones are always there.
        count: open sets that have no index.json, which reads their tars once.

    Raises:
        ValueError: no such protocol, or a place that cannot be looked at.
    """
    suites = [load_suite(one) for one in ([name] if name else suite_names())]
    if name:
        _print_protocol(suites[0])
    else:
        rows = [[s.protocol.key, str(len(s.datasets)), s.protocol.attack_resolution, s.protocol.title] for s in suites]
        print_table("Protocols", ["suite", "sets", "attack at", "title"], rows)
    users: dict[tuple[str, str], list[str]] = {}
    datasets: dict[tuple[str, str], Dataset] = {}
    for suite in suites:
        for dataset in suite.datasets:
            users.setdefault((dataset.key, dataset.split), []).append(suite.protocol.key)
            datasets.setdefault((dataset.key, dataset.split), dataset)
    order = list(datasets) if name else sorted(datasets)
    missing: list[Dataset] = []
    rows = []
    for key in order:
        dataset = datasets[key]
        state = _state(dataset, root, count)
        if state == "missing":
            missing.append(dataset)
        expected = [str(dataset.card.num_classes), str(dataset.expected.samples)]
        metric = dataset.metric if name else dataset.card.metric
        rows.append([dataset.key, dataset.split, *expected, metric, " ".join(users[key]), state])
    print_table("Sets", ["set", "split", "classes", "samples", "metric", "suites", "there"], rows)
    if root and missing:
        typer.echo(f"\n{missing[0].how_to_get(root)}")
        if len(missing) > 1:
            typer.echo(f"The other {len(missing) - 1} likewise; zsr eval says it of each.")


def _state(dataset: Dataset, root: str | None, count: bool) -> str:
    if root is None and not dataset.expected.address:
        return ""
    address = dataset.find(root or "")
    if address is None:
        return "missing"
    storage = open_storage(address)
    if not count:
        try:
            storage.read_text(INDEX_FILE)
        except FileMissing:
            return f"{len(storage.list_tars())} tars in {address}, not counted"
    try:
        differences = dataset.differences(read_index(storage))
    except ValueError as fault:
        return str(fault)
    return "; ".join(differences) or f"as expected in {address}"


def _print_protocol(suite: Suite) -> None:
    protocol = suite.protocol
    pairs = [
        ("title", protocol.title),
        ("source", protocol.source),
        ("attack at", f"{protocol.attack_resolution}: {protocol.preprocessing}"),
        ("normalization", protocol.normalization),
        ("images of each set", str(protocol.num_samples or "all")),
        ("training set", str(protocol.training_set or "none")),
    ]
    for attack in protocol.attacks:
        eps = attack.eps if isinstance(attack.eps, str) else " ".join(f"{255 * e:g}/255" for e in attack.eps)
        settings = [f"{key}={value}" for key, value in attack.settings.items()]
        settings += [f"{key}=unknown" for key in attack.unknown]
        pairs.append((attack.name, " ".join([f"eps={eps}", *settings]) + f" ({attack.note})" * bool(attack.note)))
    for name, keys in suite.averages().items():
        out = [dataset.key for dataset in suite.datasets if dataset.key not in keys]
        pairs.append((f"average {name}", f"{len(keys)} sets" + f", without {', '.join(out)}" * bool(out)))
    pairs += [("note", note) for note in protocol.notes]
    print_pairs(protocol.key, pairs)
