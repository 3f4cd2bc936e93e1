"""Converting folders of images, and checking what came out."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_factory import encode_image, make_image, make_shards, write_index, write_tar

from zsr.data.convert import convert
from zsr.data.decode import decode_whole
from zsr.data.inspect import info, sample, verify
from zsr.data.make_shard import ShardMaker
from zsr.data.shards import ShardSet


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eleven images of three classes, of four formats, one of them in a deeper folder."""
    source = tmp_path / "animals"
    for number in range(11):
        folder = source / ("black_cat", "dog", "emu")[number % 3]
        extension = ("jpg", "png", "webp")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"photo.{number}.{extension}").write_bytes(encode_image(make_image(number, 40, 30), extension))
    (source / "dog" / "more").mkdir()
    Image.fromarray(make_image(99, 20, 20)).save(source / "dog" / "more" / "x.bmp")
    return source


def run(source: Path, target: Path, **options):
    return convert(source, target, samples_per_shard=5, show_progress=False, **options)


def test_every_image_is_stored_once_with_its_class(source, tmp_path):
    run(source, tmp_path / "out", licence="CC0", templates=["a {}.", "the {}."])
    shards = ShardSet(tmp_path / "out")
    assert shards.classes == ["black cat", "dog", "emu"]
    assert shards.index.class_counts == [4, 5, 3]
    assert shards.index.shard_sizes == [5, 5, 2]
    assert (shards.index.name, shards.index.licence, shards.templates) == ("animals", "CC0", ["a {}.", "the {}."])
    stored = {}
    for number in range(len(shards)):
        raw = shards.read(number)
        label = int(raw.parts.pop("cls"))
        ((extension, content),) = raw.parts.items()
        stored[content] = (label, extension)
    for number in range(11):
        extension = ("jpg", "png", "webp")[number % 3]
        original = next(source.rglob(f"photo.{number}.*")).read_bytes()
        assert stored.pop(original) == (number % 3, extension)  # bytes untouched
    ((content, (label, extension)),) = stored.items()
    assert (label, extension) == (1, "png")
    assert (decode_whole({"png": content}) == make_image(99, 20, 20)).all()
    out = tmp_path / "out"
    assert (out / "classnames.txt").read_text() == "black cat\ndog\nemu\n"
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a {c}.\nthe {c}.\n"


def test_equal_input_gives_equal_bytes_and_the_seed_another_order(source, tmp_path):
    for name, seed in {"one": 0, "two": 0, "three": 1}.items():
        run(source, tmp_path / name, shuffle=seed)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["000000.tar", "000001.tar", "000002.tar", "classnames.txt", "index.json"] + files[5:]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    keys = [[ShardSet(tmp_path / name).read(i).key for i in range(12)] for name in ("one", "three")]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != sorted(keys[0])  # classes are mixed


def test_larger_images_are_resized(source, tmp_path):
    run(source, tmp_path / "out", image_size=24)
    shards = ShardSet(tmp_path / "out")
    shapes = {decode_whole(shards.read(i).parts).shape for i in range(12)}
    assert shapes == {(32, 24, 3), (20, 20, 3)}


def test_webdataset_reads_our_shards(source, tmp_path):
    """The format is an ordinary one: the library that named it finds the same samples."""
    run(source, tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = [ShardSet(tmp_path / "out").read(number) for number in range(12)]
    assert [row["__key__"] for row in theirs] == [raw.key for raw in ours]
    assert [{k: v for k, v in row.items() if not k.startswith("__")} for row in theirs] == [raw.parts for raw in ours]


def test_images_that_cannot_be_decoded_are_named_and_no_set_is_left(source, tmp_path):
    (source / "emu" / "torn.jpg").write_bytes(encode_image(make_image(1, 40, 30), "jpg")[:200])
    (source / "dog" / "no.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"2 of 14 images cannot be used") as caught:
        run(source, tmp_path / "out")
    assert "emu/torn.jpg: the image cannot be decoded" in str(caught.value)
    assert "dog/no.png: the image cannot be decoded" in str(caught.value)
    assert not (tmp_path / "out" / "index.json").exists()


def test_other_files_are_counted(source, tmp_path, caplog):
    (source / "emu" / "notes.txt").write_text("x")
    (source / "README").write_text("x")
    with caplog.at_level(logging.WARNING):
        run(source, tmp_path / "out")
    assert "event=files_ignored count=2" in caplog.text


def test_mistakes_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="one folder of images a class"):
        run(source / "emu", tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no \{\} for the class name"):
        run(source, tmp_path / "out", templates=["a photo"])
    (source / "gnu").mkdir()
    with pytest.raises(ValueError, match=r"gnu holds no images"):
        run(source, tmp_path / "out")
    (source / "gnu").rmdir()
    run(source, tmp_path / "out")
    with pytest.raises(ValueError, match="holds a set already"):
        run(source, tmp_path / "out")


def test_verify_finds_nothing_in_a_sound_set(tmp_path):
    assert verify(make_shards(tmp_path / "set"), show_progress=False) == []


def test_verify_names_what_is_wrong(tmp_path):
    folder = make_shards(tmp_path / "set", num_samples=24, num_classes=3, shard_size=6)
    content = bytearray((folder / "000000.tar").read_bytes())
    content[512] = ord("7")  # the first label
    image = content.index(b"RIFF")
    content[image : image + 4] = b"XXXX"
    (folder / "000000.tar").write_bytes(content)
    (folder / "000002.tar").unlink()
    (folder / "000003.tar").write_bytes((folder / "000003.tar").read_bytes()[:-512])
    report = "\n".join(verify(folder, show_progress=False))
    assert "shard 000000.tar: its sha256 is" in report
    assert "shard 000000.tar, sample 's000000': the image cannot be decoded" in report
    assert "1 samples have the label 7, but there are 3 classes" in report
    assert "shard 000002.tar of" in report
    assert "is missing" in report
    assert "shard 000003.tar of" in report
    assert "class 'class 0' has 3 readable samples, the index says 8" in report


def test_verify_finds_double_keys(tmp_path):
    parts = {"cls": b"0", "png": encode_image(make_image(0, 8, 8), "png")}
    entries = [write_tar(tmp_path / f"{n}.tar", [("a", parts), (key, parts)]) for n, key in enumerate("bc")]
    report = verify(write_index(tmp_path, entries, [0] * 4, 1), show_progress=False)
    assert report == ["shard 1.tar, sample 'a': the key occurs twice in the set"]


def test_info_can_be_written_as_json(tmp_path):
    summary = json.loads(json.dumps(info(make_shards(tmp_path / "set"))))
    assert (summary["samples"], summary["classes"], summary["samples_per_class"]) == (20, 4, [5, 5])


def test_the_montage_shows_the_images(tmp_path):
    folder = make_shards(tmp_path / "set", num_samples=5, image_size=32)
    sample(folder, tmp_path / "sheet.png", columns=3, rows=2, side=32)
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())))
    assert sheet.shape == (2 * 52 + 6, 3 * 38 + 6, 3)
    assert (sheet[6:38, 6:38] == make_image(0, 32, 32)).all()


def test_any_number_of_workers_gives_the_same_bytes(source, tmp_path):
    contents = []
    for workers in (1, 3):
        run(source, tmp_path / str(workers), workers=workers, name="one")
        files = sorted((tmp_path / str(workers)).iterdir())
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    assert set(contents[0]) >= {"index.json", "000002.tar"} and "convert-journal.json" not in contents[0]


def test_without_shuffling_the_order_is_the_sources(source, tmp_path):
    run(source, tmp_path / "out", shuffle=None)
    labels = [int(ShardSet(tmp_path / "out").read(number).parts["cls"]) for number in range(12)]
    assert labels == sorted(labels)


def convert_apart(source: Path, target: Path, **options) -> multiprocessing.Process:
    """A conversion in a process of its own, to be killed."""
    options = {"show_progress": False, **options}
    process = multiprocessing.get_context("fork").Process(target=convert, args=(source, target), kwargs=options)
    process.start()
    return process


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    """Killed twice at different places, taken up with another number of workers."""
    quick = ShardMaker.make

    def slow(self, shard):
        time.sleep(0.1)  # or a busy machine sees the end of a conversion before anyone could kill it
        return quick(self, shard)

    source = tmp_path / "images"
    for number in range(240):
        folder = source / f"class_{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encode_image(make_image(number, 150, 200), "jpg"))
    options = {"samples_per_shard": 3, "image_size": 100, "name": "one", "show_progress": False}
    target, finished = tmp_path / "out", []
    for workers, kill_at in ((2, 20), (1, 45)):
        with monkeypatch.context() as patch:
            patch.setattr(ShardMaker, "make", slow)  # the processes are forks
            process = convert_apart(source, target, workers=workers, **options)
        try:
            deadline = time.monotonic() + 60
            while len(list(target.glob("*.tar"))) < kill_at and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            process.kill()
            process.join()
        finished.append(len(list(target.glob("*.tar"))))
        assert kill_at <= finished[-1] < 80
        assert not (target / "index.json").exists()
    done = convert(source, target, workers=3, **options)
    assert done.resumed >= finished[-1] - 2  # but what a worker had stored and not yet reported
    convert(source, tmp_path / "whole", **options)
    one, other = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (target, tmp_path / "whole"))
    assert one == other


def test_workers_end_with_a_killed_conversion(source, tmp_path):
    process = convert_apart(source, tmp_path / "out", samples_per_shard=1, workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids: list[str] = []
    deadline = time.monotonic() + 60
    while not pids and time.monotonic() < deadline:
        pids = children.read_text().split()
    process.kill()
    process.join()
    assert pids

    def has_ended(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True

    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(has_ended, pids))


def break_some(source: Path) -> list[str]:
    """Two images that cannot be used, in the order in which a source lists them."""
    (source / "dog" / "no.png").write_bytes(b"<html>404</html>")
    (source / "emu" / "torn.jpg").write_bytes(encode_image(make_image(1, 40, 30), "jpg")[:200])
    return ["dog/no.png", "emu/torn.jpg"]


@pytest.mark.parametrize("max_bad", [2, 0.2])
def test_bad_images_are_left_out_as_far_as_allowed_and_named(source, tmp_path, max_bad):
    names = break_some(source)
    (source / "README").write_text("x")
    done = run(source, tmp_path / "out", max_bad=max_bad)
    assert [bad.file for bad in done.rejected] == names
    with (tmp_path / "out" / "rejected.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [*names, "README"]
    assert rows[0]["reason"] == "the image cannot be decoded: its format is not known"
    assert (done.index.samples, sum(done.index.class_counts)) == (12, 12)
    assert verify(tmp_path / "out", show_progress=False) == []


def test_after_repair_only_the_shards_of_bad_images_are_made_anew(source, tmp_path):
    break_some(source)
    with pytest.raises(ValueError, match=r"2 of 14 images cannot be used and --max-bad allows 1"):
        run(source, tmp_path / "out", max_bad=1)
    assert "dog/no.png" in (tmp_path / "out" / "rejected.csv").read_text()
    for name, number in (("dog/no.png", 50), ("emu/torn.jpg", 51)):
        (source / name).write_bytes(encode_image(make_image(number, 40, 30), name[-3:]))
    done = run(source, tmp_path / "out")
    holding = {number // 5 for number in range(14) if done_keys(tmp_path / "out")[number].endswith(("-no", "-torn"))}
    assert done.resumed == 3 - len(holding)
    assert not (tmp_path / "out" / "rejected.csv").exists()
    run(source, tmp_path / "anew", name="animals")
    for path in (tmp_path / "anew").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def done_keys(folder: Path) -> list[str]:
    shards = ShardSet(folder)
    return [shards.read(number).key for number in range(len(shards))]


def test_a_shard_of_bad_images_alone_is_no_shard(tmp_path):
    for number in range(4):
        (tmp_path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        content = b"no" if number < 2 else encode_image(make_image(number, 20, 20), "jpg")
        (tmp_path / "images" / "cat" / f"{number}.jpg").write_bytes(content)
    done = convert(
        tmp_path / "images", tmp_path / "out", samples_per_shard=2, shuffle=None, max_bad=2, show_progress=False
    )
    assert [shard.file for shard in done.index.shards] == ["000001.tar"]
    assert verify(tmp_path / "out", show_progress=False) == []


def test_an_unfinished_conversion_with_other_settings_is_not_mixed_with_this_one(source, tmp_path):
    break_some(source)
    with pytest.raises(ValueError, match="cannot be used"):
        run(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"unfinished conversion with other settings \(shuffle=0, now 3\); go on"):
        run(source, tmp_path / "out", shuffle=3)


def test_a_lost_or_torn_shard_is_made_anew(source, tmp_path):
    break_some(source)
    with pytest.raises(ValueError, match="cannot be used"):
        run(source, tmp_path / "out")
    (tmp_path / "out" / "000000.tar").unlink()
    (tmp_path / "out" / "000001.tar").write_bytes(b"torn")
    assert run(source, tmp_path / "out", max_bad=2).resumed == 1
    assert verify(tmp_path / "out", show_progress=False) == []


def test_resizing_tells_what_it_saves(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for number in range(4):
        image = encode_image(make_image(number, 600, 800), "jpg")
        (tmp_path / "images" / "cat" / f"{number}.jpg").write_bytes(image)
    cost = convert(tmp_path / "images", tmp_path / "out", image_size=224, quality=80, show_progress=False).cost
    assert cost is not None
    assert cost.after_ms < cost.before_ms / 2 and cost.after_bytes < cost.before_bytes / 4
    stored = [sum(map(len, ShardSet(tmp_path / "out").read(n).parts.values())) - 1 for n in range(4)]
    assert cost.after_bytes == np.mean(stored)


def test_the_share_of_bad_images_is_read_from_the_command_line(tmp_path):
    from zsr.cli.data import _count_or_share

    assert [_count_or_share(text) for text in ("0", "20", "0.5", "1%", "0.1%")] == [0, 20, 0.5, 0.01, 0.001]
    for wrong in ("many", "-1", "1.5", "100%", "nan", "inf"):
        with pytest.raises(ValueError, match=f"--max-bad {wrong}: is neither"):
            _count_or_share(wrong)
