"""The real packages become the sets that the registry describes, class by class and byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsr.data.inspect import verify
from zsr.data.shards import ShardSet
from zsr.data.suite import load_suite
from zsr.recipes.shipped import SETS, make_set
from zsr.recipes.shipped_images import MAX_A_CLASS
from zsr.recipes.shipped_packages import find_package

PACKAGES = Path("~/.cache/zsr/packages").expanduser()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)  # half a minute of decompression where the machine is free, minutes where it is not
@pytest.mark.parametrize("name", SETS)
def test_a_real_package_becomes_the_set_of_the_registry(name: str, tmp_path: Path) -> None:
    package = SETS[name].package
    try:
        find_package(package, PACKAGES)
    except ValueError as fault:
        if (PACKAGES / package.file_name).exists():  # another file than the pinned one is a failure
            raise
        pytest.skip(str(fault))
    index = make_set(name, tmp_path / "one", PACKAGES)

    dataset = {dataset.key: dataset for dataset in load_suite("shipped").datasets}[name]
    shards = dataset.shards(str(tmp_path / "one"))
    assert dataset.differences(shards.index) == []
    assert verify(shards.address, show_progress=False) == []
    if name.startswith("openmoji"):
        assert index.classes == ShardSet(f"zsr:emoji/{name.replace('openmoji', 'test')}").classes
    elif name != "fashion_mnist":
        assert min(index.class_counts) >= 5 and max(index.class_counts) <= MAX_A_CLASS
    else:
        assert index.class_counts == [1000] * 10

    make_set(name, tmp_path / "two", PACKAGES)
    one, two = (sorted((tmp_path / place / name / "test").iterdir()) for place in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(path.read_bytes() == twin.read_bytes() for path, twin in zip(one, two))
