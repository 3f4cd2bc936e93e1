"""Every kind of source gives the same images, labels and names as its files say."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_factory import encode_image, make_image, make_shards

from zsr.data.convert import convert
from zsr.data.decode import decode_whole
from zsr.data.inspect import verify
from zsr.data.shards import ShardSet
from zsr.data.sources.class_names import name_classes
from zsr.data.sources.find import Where, open_source

WNIDS = ["n01440764", "n01443537", "n02119789"]


def jpeg(number: int) -> bytes:
    return encode_image(make_image(number, 12, 16), "jpg")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_train_tar(path: Path, layout: int = tarfile.GNU_FORMAT) -> dict[bytes, str]:
    """A tar of tars as ILSVRC has it, out of order; returns the class of each image's bytes."""
    known = {}
    with tarfile.open(path, "w", format=layout) as outer:
        for place, wnid in enumerate(reversed(WNIDS)):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=layout) as inner:
                for number in range(3 + place):
                    content = jpeg(10 * place + number)
                    known[content] = wnid
                    add(inner, f"{wnid}_{number}.JPEG", content)
                if place == 0:
                    add(inner, "notes.txt", b"hello")
            add(outer, f"{wnid}.tar", buffer.getvalue())
    return known


def stored(folder: Path) -> dict[bytes, str]:
    """The class name of each image's bytes in a set."""
    shards = ShardSet(folder)
    raws = [shards.read(number) for number in range(len(shards))]
    return {raw.parts["jpg"]: shards.classes[int(raw.parts["cls"])] for raw in raws}


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_tars_is_read_in_place(tmp_path, layout):
    known = write_train_tar(tmp_path / "train.tar", layout)
    done = convert(tmp_path / "train.tar", tmp_path / "out", samples_per_shard=5, show_progress=False)
    assert stored(tmp_path / "out") == known
    assert done.index.classes == WNIDS and done.index.class_counts == [5, 4, 3]
    assert done.ignored == 1
    assert "n02119789.tar/notes.txt,not the name of an image" in (tmp_path / "out" / "rejected.csv").read_text()
    assert verify(tmp_path / "out", show_progress=False) == []


def test_members_with_extended_headers_are_found_inside_another_tar(tmp_path):
    """Long names give headers that only the tarfile module reads, at offsets that it counts from the inner tar."""
    long, content = "n" * 150, jpeg(1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as inner:
        add(inner, f"{long}.JPEG", content)
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        add(outer, "first.tar", buffer.getvalue())
        add(outer, "second.tar", buffer.getvalue())
    listing, classes = open_source(Where(str(tmp_path / "train.tar")))
    assert classes == ["first", "second"]
    assert [listing.read(number) for number in range(2)] == [{"jpeg": content}] * 2


def test_a_folder_of_class_tars_equals_the_tar_of_tars(tmp_path):
    known = write_train_tar(tmp_path / "train.tar")
    with tarfile.open(tmp_path / "train.tar") as tar:
        tar.extractall(tmp_path / "classes", filter="data")
    for source in ("train.tar", "classes"):
        convert(tmp_path / source, tmp_path / f"{source}-out", name="one", show_progress=False)
    assert stored(tmp_path / "classes-out") == known
    one, other = (tmp_path / f"{source}-out" / "000000.tar" for source in ("train.tar", "classes"))
    assert one.read_bytes() == other.read_bytes()


def test_imagenets_names(tmp_path):
    write_train_tar(tmp_path / "train.tar")
    _, classes = open_source(Where(str(tmp_path / "train.tar"), class_names="imagenet"))
    assert classes == ["tench", "goldfish", "kit fox"]
    whole = name_classes([str(number) for number in range(1000)], "imagenet")
    assert len(whole) == 1000 and whole[278] == "kit fox"  # n02119789 is the 279th of the sorted ids


@pytest.fixture
def val_tar(tmp_path: Path) -> Path:
    """Five validation images in a flat tar, not in order."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in (3, 1, 5, 2, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number))
    return tmp_path / "val.tar"


IN_ORDER = ["n02119789", "n01440764", "n01443537", "n01440764", "n02119789"]  # of images 1 to 5
NAME = "ILSVRC2012_val_{:08d}.JPEG"


def write_meta(path: Path) -> dict[str, int]:
    """The devkit's table, whose numbers are in another order than the ids; inner nodes of the tree are there too."""
    from scipy.io import savemat

    ids = {"n02119789": 1, "n01443537": 2, "n01440764": 3}
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, wnid, "words", 0) for wnid, number in ids.items()] + [(1001, "n00000001", "entity", 3)]
    savemat(path, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    return ids


def truth_texts(folder: Path) -> dict[str, Path]:
    """The same labels in every form that is in use."""
    (folder / "devkit" / "data").mkdir(parents=True)
    ids = write_meta(folder / "devkit" / "data" / "meta.mat")
    numbers = "".join(f"{ids[wnid]}\n" for wnid in IN_ORDER)
    official = folder / "devkit" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    official.write_text(numbers)
    with tarfile.open(folder / "devkit.tar.gz", "w:gz") as tar:
        tar.add(folder / "devkit", "ILSVRC2012_devkit_t12")
    (folder / "clsloc").mkdir()
    (folder / "clsloc" / "map_clsloc.txt").write_text("".join(f"{w} {i} some_name\n" for w, i in ids.items()))
    (folder / "clsloc" / "truth.txt").write_text(numbers)
    (folder / "ids.txt").write_text("".join(f"{wnid}\n" for wnid in IN_ORDER))
    pairs = list(enumerate(IN_ORDER, start=1))
    (folder / "pairs.txt").write_text("".join(f"{NAME.format(n)} {wnid}\n" for n, wnid in reversed(pairs)))
    kaggle = "".join(f"{NAME.format(n)[:-5]},{wnid} 1 2 3 4 \n" for n, wnid in pairs)
    (folder / "kaggle.csv").write_text("ImageId,PredictionString\n" + kaggle)
    names = ("devkit", "devkit.tar.gz", "clsloc/truth.txt", "ids.txt", "pairs.txt", "kaggle.csv")
    return {name: folder / name for name in names} | {"official": official}


@pytest.mark.parametrize(
    "form", ["official", "devkit", "devkit.tar.gz", "clsloc/truth.txt", "ids.txt", "pairs.txt", "kaggle.csv"]
)
def test_validation_labels_in_all_their_forms(tmp_path, val_tar, form):
    truth = truth_texts(tmp_path)[form]
    convert(val_tar, tmp_path / "out", truth=truth, show_progress=False)
    assert stored(tmp_path / "out") == {jpeg(n): wnid for n, wnid in enumerate(IN_ORDER, start=1)}


def test_labels_that_are_numbers_count_from_zero_in_the_order_of_the_ids(tmp_path, val_tar):
    (tmp_path / "val.txt").write_text("".join(f"{NAME.format(n)} {n % 3}\n" for n in range(1, 6)))
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nkit fox\n")
    folder = tmp_path / "flat"
    with tarfile.open(val_tar) as tar:
        tar.extractall(folder, filter="data")
    convert(
        folder,
        tmp_path / "out",
        truth=tmp_path / "val.txt",
        class_names=str(tmp_path / "names.txt"),
        show_progress=False,
    )
    names = ["tench", "goldfish", "kit fox"]
    assert stored(tmp_path / "out") == {jpeg(n): names[n % 3] for n in range(1, 6)}


def test_ground_truth_that_would_mislead_is_refused(tmp_path, val_tar):
    def refused(text: str, sentence: str) -> None:
        (tmp_path / "truth.txt").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            open_source(Where(str(val_tar), truth=tmp_path / "truth.txt"))

    refused("490\n361\n171\n822\n297\n", "numbers of the ILSVRC devkit, which are not in the order of the WordNet ids")
    refused("n01440764\nn01440764\n", "has 2 labels for 5 images")
    refused(f"{NAME.format(1)} n01440764\n", "no label for 4 of 5 images, such as ILSVRC2012_val_00000002")
    refused("", "holds no labels")
    with pytest.raises(ValueError, match=r"the tar val.tar has no labels; name a ground-truth file with --truth"):
        open_source(Where(str(val_tar)))
    assert open_source(Where(str(val_tar), labels=False))[1] == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n01440764 tench, Tinca tinca\nn02119789 fox\nn01443537 goldfish\n", ["tench, Tinca tinca", "goldfish", "fox"]),
        ("n01440764,tench\nn02119789,kit fox\nn01443537,goldfish\nn9,more\n", ["tench", "goldfish", "kit fox"]),
        ("n01440764\ttench\nn02119789\tkit fox\nn01443537\tgoldfish\n", ["tench", "goldfish", "kit fox"]),
        ("tench\ngoldfish\nkit fox\n", ["tench", "goldfish", "kit fox"]),
    ],
)  # fmt: skip
def test_class_names_from_a_file(tmp_path, text, names):
    (tmp_path / "names.txt").write_text(text)
    assert name_classes(WNIDS, str(tmp_path / "names.txt")) == names


@pytest.mark.parametrize("text", ["n01440764 tench\nn01443537 goldfish\nx y\n", "one\ntwo\n", "a\nb\nc\nd\n"])
def test_class_names_that_do_not_fit_are_refused(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=r"has no name for \d of 3 classes, such as n0"):
        name_classes(WNIDS, str(tmp_path / "names.txt"))


TABLES = {
    "path,label\n0.jpg,1\n1.jpg,0\nsub/2.jpg,1\n": ["0", "1"],
    "file,class\n0.jpg,dog\n1.jpg,cat\nsub/2.jpg,dog\n": ["cat", "dog"],
    "\ufeffimage,label,class_name,more\n0.jpg,1,dog,x\n1.jpg,0,cat,\nsub/2.jpg,1,dog,x\n": ["cat", "dog"],
    "path,label\n0.jpg,dog\n1.jpg,cat\nsub/2.jpg,dog\n": ["cat", "dog"],
}


@pytest.mark.parametrize("text", list(TABLES))
def test_tables(tmp_path, text):
    (tmp_path / "sub").mkdir()
    for number in range(3):
        (tmp_path / ("sub" if number == 2 else "") / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "all.csv").write_text(text, encoding="utf-8")
    convert(tmp_path / "all.csv", tmp_path / "out", show_progress=False)
    names = TABLES[text]
    assert stored(tmp_path / "out") == {jpeg(0): names[1], jpeg(1): names[0], jpeg(2): names[1]}
    assert ShardSet(tmp_path / "out").index.name == "all"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,label\n0.jpg,1\n", "has no column path"),
        ("path,size\n0.jpg,1\n", "neither a column label nor a column class"),
        ("path,label\n0.jpg,1\n1.jpg,\n", "line 3 has nothing in the column label"),
        ("path,label\n0.jpg,1\n0.jpg,2\n", "names 0.jpg twice"),
        ("path,label,class\n0.jpg,0,a\n1.jpg,0,b\n", "the label 0 is named 'a' and 'b'"),
        ("path,label\n", "has no rows"),
        ("path,label\nnone.jpg,0\n", r"1 of 1 images cannot be used .*none.jpg: cannot be read: No such file"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, sentence):
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "all.csv", tmp_path / "out", show_progress=False)


def write_cifar(root: Path) -> np.ndarray:
    """CIFAR10's test batch on disk, of ten images instead of ten thousand; returns their pixels."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    images = np.stack([make_image(number, 32, 32) for number in range(10)])
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    batch = {"data": images.transpose(0, 3, 1, 2).reshape(10, -1), "labels": list(range(10))[::-1]}
    meta = {"label_names": [f"kind {number}" for number in range(10)]}
    digests = {}
    for name, content in {"test_batch": batch, "batches.meta": meta}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    CIFAR10.test_list = [["test_batch", digests["test_batch"]]]
    CIFAR10.train_list = []
    CIFAR10.meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    return images


def test_torchvisions_arrays_keep_their_pixels(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    for name in ("test_list", "train_list", "meta"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    images = write_cifar(tmp_path)
    convert("torchvision:CIFAR10", tmp_path / "out", root=tmp_path, split="test", shuffle=None, show_progress=False)
    shards = ShardSet(tmp_path / "out")
    assert shards.classes == [f"kind {number}" for number in range(10)] and shards.index.name == "CIFAR10"
    for number in range(10):
        parts = shards.read(number).parts
        assert (decode_whole(parts) == images[number]).all()
        assert int(parts["cls"]) == 9 - number


def test_torchvisions_files_keep_their_bytes(tmp_path):
    for number in range(6):
        folder = tmp_path / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    convert("torchvision:ImageFolder", tmp_path / "out", root=tmp_path / "images", show_progress=False)
    assert stored(tmp_path / "out") == {jpeg(number): ("cat", "dog")[number % 2] for number in range(6)}


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("CIFAR11", {}, "torchvision has no data set 'CIFAR11'; it has .*CIFAR10"),
        ("CIFAR10", {}, r"torchvision's CIFAR10 cannot be read from .* \(--root, --split train\): Dataset not found"),
        ("CIFAR10", {"split": "val"}, "--split val: torchvision's CIFAR10 has no such split"),
    ],
)
def test_torchvision_mistakes(tmp_path, name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_source(Where(f"torchvision:{name}", root=tmp_path, **options))


def test_a_set_is_laid_into_other_shards(tmp_path):
    old = make_shards(tmp_path / "old", num_samples=20, num_classes=3, shard_size=8, extension="jpg")
    done = convert(old, tmp_path / "new", samples_per_shard=6, show_progress=False)
    assert done.index.shard_sizes == [6, 6, 6, 2]
    assert (done.index.classes, done.index.templates) == (ShardSet(old).classes, ShardSet(old).templates)
    assert stored(tmp_path / "new") == stored(old)
    convert(tmp_path / "new", tmp_path / "newer", shuffle=None, show_progress=False)
    assert stored(tmp_path / "newer") == stored(old)
    assert max(len(ShardSet(tmp_path / "newer").read(n).key) for n in range(20)) == len("00000000-s000000")


def test_other_parts_of_a_sample_come_along(tmp_path):
    from shard_factory import write_index, write_tar

    parts = {"json": b"{}", "cls": b"0", "jpg": jpeg(0), "txt": b"a caption"}
    write_index(tmp_path, [write_tar(tmp_path / "0.tar", [("a", parts)])], [0], 1)
    convert(tmp_path, tmp_path / "out", show_progress=False)
    assert ShardSet(tmp_path / "out").read(0).parts == parts


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"hello" * 500)
    with pytest.raises(ValueError, match=r"x.bin is not a plain tar file"):
        open_source(Where(str(tmp_path / "x.bin")))
    with pytest.raises(ValueError, match="--from zip: is not one of folders, flat"):
        open_source(Where(str(tmp_path), kind="zip"))  # type: ignore[arg-type]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "readme.txt", b"hello")
    with pytest.raises(ValueError, match=r"the tar a.tar holds no images"):
        open_source(Where(str(tmp_path / "a.tar")))
    with pytest.raises(ValueError, match=r"holds no tars; ILSVRC2012_img_train.tar has one a class"):
        open_source(Where(str(tmp_path / "a.tar"), kind="ilsvrc-train"))
