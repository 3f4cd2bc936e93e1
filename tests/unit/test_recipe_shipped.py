"""Test sets out of packages: made here from small packages of the same layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsr.data.decode import decode_whole, read_label
from zsr.data.shards import ShardSet
from zsr.data.suite import load_card, load_suite
from zsr.recipes import shipped
from zsr.recipes.shipped_images import FOLDER_SIDE, MAX_A_CLASS, FolderClass, cut_out, pick_folders, read_idx
from zsr.recipes.shipped_packages import Package, find_package, read_members


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def spot(number: int, size: tuple[int, int] = (60, 60), box: tuple[int, int, int, int] = (10, 10, 50, 40)) -> bytes:
    """A rectangle on nothing, in a colour of its own."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((number % 200, number // 200, 120, 255), box)
    return png(image)


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def write_deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """A Debian package as deb(5) describes it: three members, each padded to an even length."""
    data = lzma.compress(tar_of({f"./{name}": content for name, content in files.items()}, links))
    content = b"!<arch>\n"
    for name, body in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", lzma.compress(b"odd")[:-1]),
        ("data.tar.xz", data),
    ):
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path.write_bytes(content)
    return path


def pinned(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """Let a set be made from this package instead of the real one."""
    package = shipped.SETS[name].package._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(shipped.SETS, name, shipped.SETS[name]._replace(package=package))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def idx_pair(labels: list[int], side: int = 4) -> tuple[bytes, bytes, np.ndarray]:
    pixels_NHW = np.arange(len(labels) * side * side, dtype=np.uint8).reshape(-1, side, side)
    images = struct.pack(">4I", 0x803, len(labels), side, side) + pixels_NHW.tobytes()
    return gzip.compress(images), gzip.compress(struct.pack(">2I", 0x801, len(labels)) + bytes(labels)), pixels_NHW


def test_fashion_mnist_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    labels = [9, 0, 4, *range(10)]
    images, numbers, pixels_NHW = idx_pair(labels)
    root = shipped.SETS["fashion_mnist"].root
    train = {f"{root}train-images-idx3-ubyte.gz": b"not looked at"}
    pair = {f"{root}t10k-images-idx3-ubyte.gz": images, f"{root}t10k-labels-idx1-ubyte.gz": numbers}
    path = write_deb(tmp_path / "fashion.deb", train | pair)
    pinned(monkeypatch, "fashion_mnist", path)
    arguments = ["fashion_mnist", "--out", str(tmp_path / "sets"), "--packages", str(tmp_path), "--package", str(path)]
    assert shipped.main(arguments) == 0
    assert "event=made set=fashion_mnist classes=10 samples=13" in capsys.readouterr().out

    shards = ShardSet(tmp_path / "sets" / "fashion_mnist" / "test")
    assert shards.classes == load_card("fashion_mnist").classes
    assert shards.index.class_counts == [2, 1, 1, 1, 2, 1, 1, 1, 1, 2]
    assert shards.index.source.endswith("dataset-fashion-mnist 0.0~git20200523.55506a9-1 (Debian)")
    for sample in range(13):
        raw = shards.read(sample)
        number = int(raw.key.split("-")[-1])  # in the idx file
        assert read_label(raw.parts) == labels[number]
        assert (decode_whole(raw.parts) == pixels_NHW[number][:, :, None]).all()

    assert shipped.main(arguments) == 0
    assert "event=kept set=fashion_mnist" in capsys.readouterr().out
    arguments[2] = str(tmp_path / "again")
    assert shipped.main(arguments) == 0
    first, second = (contents(tmp_path / place / "fashion_mnist" / "test") for place in ("sets", "again"))
    assert first == second
    assert {path.name for path in (tmp_path / "sets").iterdir()} == {"fashion_mnist"}  # nothing half-made beside it


def test_idx_files_that_contradict_themselves_are_refused():
    images, numbers, _ = idx_pair([0, 1])
    with pytest.raises(ValueError, match="do not hold what their headers say"):
        read_idx(images, numbers, ["a"])  # the label 1 has no class
    with pytest.raises(ValueError, match="with 2 images and 0x801 with 3"):
        read_idx(images, idx_pair([0, 1, 1])[1], ["a", "b"])
    with pytest.raises(ValueError, match="end before their headers"):
        read_idx(gzip.compress(b""), numbers, ["a", "b"])


CATS, DOGS = FolderClass("cat", ("animals/cats",), ("dog*",)), FolderClass("dog", ("animals/dogs", "more/dogs"))


def test_folders_become_classes_without_what_shows_something_else():
    files = {
        "animals/cats/a.png": spot(1), "animals/cats/deep/b.png": spot(2), "animals/cats/b_mirror.png": spot(3),
        "animals/cats/dog_at_a_cat.png": spot(4), "animals/cats/cartoon/c.png": spot(5), "animals/catsup/d.png": spot(6),
        "animals/dogs/e.png": spot(7), "more/dogs/f.png": spot(8), "animals/g.png": spot(9),
    }  # fmt: skip
    found = pick_folders(files, [DOGS, CATS], no_folders=["cartoon"])
    assert [(picture.class_name, picture.stem) for picture in found] == [
        ("dog", "e"), ("dog", "f"), ("cat", "a"), ("cat", "b")
    ]  # fmt: skip


def test_twins_leave_their_class_or_both_classes():
    cats = {f"animals/cats/{name}.png": spot(number) for name, number in {"a": 1, "b": 1, "c": 2, "dog": 5}.items()}
    dogs = {f"animals/dogs/{name}.png": spot(number) for name, number in {"d": 2, "e": 3}.items()}
    found = pick_folders(cats | dogs, [CATS, DOGS])
    assert [picture.stem for picture in found] == ["a", "e"]


def test_large_classes_are_thinned_evenly():
    files = {f"animals/dogs/{number:03d}.png": spot(number) for number in range(2 * MAX_A_CLASS)}
    stems = [int(picture.stem) for picture in pick_folders(files, [DOGS])]
    assert stems == list(range(0, 2 * MAX_A_CLASS, 2))


def test_a_choice_that_does_not_fit_the_package_is_refused():
    with pytest.raises(ValueError, match=r"'cat' leaves out dog\*, which is not in its folders"):
        pick_folders({"animals/cats/a.png": spot(1)}, [CATS])
    with pytest.raises(ValueError, match="nothing is left of the class 'dog'"):
        pick_folders({"animals/cats/a.png": spot(1)}, [DOGS])
    with pytest.raises(ValueError, match=r"called \.png is none"):
        pick_folders({"animals/dogs/a.png": b"GIF89a"}, [DOGS])
    with pytest.raises(ValueError, match="cannot be decoded"):
        pick_folders({"animals/dogs/a.png": spot(1)[:60]}, [DOGS])


def test_what_is_drawn_is_centred_on_white_and_never_enlarged():
    image = cut_out(spot(7, (90, 60), (5, 10, 55, 40)))  # 50 x 30 pixels are drawn
    assert image is not None
    assert image.size == (54, 54)  # 8 % of margin
    pixels_HWC = np.asarray(image)
    assert (pixels_HWC[12:42, 2:52] == (7, 0, 120)).all()
    assert (np.delete(pixels_HWC, np.s_[12:42], 0) == 255).all()
    large = cut_out(spot(7, (1000, 500), (0, 0, 1000, 500)))
    assert large is not None and large.size == (FOLDER_SIDE, FOLDER_SIDE)


def test_next_to_nothing_is_left_out():
    assert cut_out(png(Image.new("RGBA", (80, 80), (0, 0, 0, 0)))) is None
    assert cut_out(png(Image.new("RGB", (80, 80), (250, 252, 255)))) is None  # paper
    assert cut_out(spot(1, box=(10, 10, 33, 33))) is None
    assert cut_out(spot(1, box=(10, 10, 34, 12))) is not None
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s2I", 13, b"IHDR", 30_000, 20_000)
    assert cut_out(header) is None  # too large to decode, so it is not


def test_folder_sets_are_what_their_files_in_the_registry_say():
    for name, classes in {"tuxpaint_photos": shipped.TUXPAINT, "openclipart": shipped.OPENCLIPART}.items():
        assert load_card(name).classes == [chosen.name for chosen in classes]
    suite = {dataset.key: dataset for dataset in load_suite("shipped").datasets}
    assert set(shipped.SETS) == {key for key in suite if not suite[key].expected.address}
    for name in shipped.SETS:
        assert suite[name].expected.made_with == f"python -m zsr.recipes.shipped {name}"
        assert f"`python -m zsr.recipes.shipped {name} --out /data` makes it" in suite[name].how_to_get("/data/")


def icon(color: str) -> dict[str, str]:
    return {"body": f'<rect width="72" height="72" fill="{color}"/>'}


def test_openmoji_draws_the_concepts_of_the_embedded_splits(tmp_path, monkeypatch):
    """A strawberry and a trumpet are held out, a grinning face is not, a flag is no concept at all."""
    colors = {"strawberry": "#ff0000", "trumpet": "#00ff00", "grinning-face": "#0000ff", "flag-x": "#777777"}
    icons = {"prefix": "openmoji", "width": 72, "height": 72, "icons": {slug: icon(c) for slug, c in colors.items()}}
    chars = {"1f353": "strawberry", "1f3ba-fe0f": "trumpet", "1f600": "grinning-face", "1f1e6": "flag-x"}
    files = {"package/icons.json": icons, "package/chars.json": chars}
    path = tmp_path / "openmoji.tgz"
    path.write_bytes(gzip.compress(tar_of({name: json.dumps(tree).encode() for name, tree in files.items()})))
    for name, expected in {"openmoji_both": ["strawberry", "trumpet"], "openmoji_style": ["grinning face"]}.items():
        pinned(monkeypatch, name, path)
        index = shipped.make_set(name, tmp_path / "sets", tmp_path, [path])
        assert index.classes == expected
        shards = ShardSet(tmp_path / "sets" / name / "test")
        assert shards.templates == ShardSet("zsr:emoji/test_both").templates
        for sample in range(len(shards)):
            raw = shards.read(sample)
            color = colors[shards.classes[read_label(raw.parts)].replace(" ", "-")]
            drawn_HWC = decode_whole(raw.parts)
            assert drawn_HWC.shape == (64, 64, 3)
            assert (drawn_HWC == [int(color[place : place + 2], 16) for place in (1, 3, 5)]).all()


def test_links_are_not_read_and_torn_packages_are_refused(tmp_path):
    path = write_deb(
        tmp_path / "a.deb", {"usr/b.png": b"b", "usr/a.png": b"a", "usr/c.txt": b"c"}, {"./usr/l.png": "a.png"}
    )
    assert read_members(path, lambda name: name.endswith(".png")) == {"usr/a.png": b"a", "usr/b.png": b"b"}
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.deb cannot be read"):
        read_members(path, bool)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="it is no Debian package"):
        read_members(path, bool)


def test_another_package_is_refused_and_so_is_one_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    package = Package("npm", "@x/y", "1.2.3", hashlib.sha256(b"right").hexdigest())
    assert package.file_name == "x-y-1.2.3.tgz"
    right, wrong = tmp_path / "right.tgz", tmp_path / "wrong.tgz"
    right.write_bytes(b"right")
    wrong.write_bytes(b"wrong")
    cache = tmp_path / "cache"
    assert find_package(package, cache, [wrong, right]) == right
    monkeypatch.setenv("PATH", str(tmp_path))  # where no client is
    with pytest.raises(ValueError, match=r"fetched with npm, which is not here; .* give it with --package"):
        find_package(package, cache, [wrong])
    (cache / package.file_name).write_bytes(b"wrong")
    with pytest.raises(ValueError, match=r"is not @x/y 1\.2\.3 \(npm\) with the sha256"):
        find_package(package, cache)
    (cache / package.file_name).write_bytes(b"right")
    assert find_package(package, cache) == cache / package.file_name
    with pytest.raises(ValueError, match="there is no such file"):
        find_package(package, cache, [tmp_path / "none.tgz"])
    client = tmp_path / "npm"
    client.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 1\n")
    client.chmod(0o755)
    (cache / package.file_name).unlink()
    with pytest.raises(ValueError, match=r"`npm pack --silent @x/y@1\.2\.3` failed: no such version"):
        find_package(package, cache)


def test_mistakes_on_the_command_line_are_sentences(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        shipped.main(["openmoij_both", "--out", str(tmp_path)])
    assert "did you mean 'openmoji_both'" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shipped.main(["openclipart", "--out", str(tmp_path / "sets"), "--packages", str(tmp_path)]) == 1
    assert "openclipart-png 1:0.18+dfsg-19 (Debian) is fetched with apt-get" in capsys.readouterr().err
    (tmp_path / "sets" / "openclipart" / "test").mkdir(parents=True)
    with pytest.raises(ValueError, match="is there already; remove it"):
        shipped.make_set("openclipart", tmp_path / "sets", tmp_path)
