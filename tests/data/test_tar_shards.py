"""Images in tar shards: the same source as a folder of them, read by offset; what is damaged says so."""

import io
import os
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backsight.data import tar as tar_shards
from backsight.data.decode import ImageError
from backsight.data.images import SPLITS, open_images, tensor
from backsight.errors import SourceError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(level: int, size=(9, 7)) -> bytes:
    """An image (width, height = size) whose red is `level`."""
    content = io.BytesIO()
    Image.new("RGB", size, (level, 50, 100)).save(content, "PNG")
    return content.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files |= {
            f"n{number:03}.png": png(number),
            f"n{number:03}.cls": str(number % 3).encode(),
            f"n{number:03}.json": b"{}",
        }
    return files


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Two training shards of 40 images each and a held-out one of 5, named as they are published."""
    root = tmp_path / "wds"
    write_shard(root / "imagenet1k-train-0000.tar", samples(0, 40))
    write_shard(root / "imagenet1k-train-0001.tar", samples(40, 40))
    write_shard(root / "imagenet1k-validation-00.tar", samples(100, 5))
    (root / "_info.json").write_text("{}")
    return root


def ids(source) -> list[str]:
    return [item["id"] for item in source]


def test_shards_give_what_the_same_files_in_a_folder_give(tmp_path):
    """Odd sizes, folders inside the shard, PNG and JPEG: every pixel of both sources is equal."""
    files = {"b/x.cls": b"4"}
    for number, size in enumerate([(9, 7), (1, 1), (31, 64), (5, 200)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        for name, form in ((f"a/{number}.png", "PNG"), (f"{number}.JPEG", "JPEG")):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, form)
            files[name] = content.getvalue()
    write_shard(tmp_path / "shards" / "photos-0.tar", files)
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    packed = open_images(tmp_path / "shards", None, (10, 12))
    loose = open_images(tmp_path / "folder", None, (10, 12))
    assert ids(packed) == [f"photos-0/{id}" for id in ids(loose)]
    assert torch.equal(tensor(packed), tensor(loose))
    assert packed.split == "all"
    assert packed[0]["image"].shape == (3, 10, 12)


def test_a_name_ends_at_its_first_dot(tmp_path):
    """c.seg.png belongs to c.png and is no image of its own."""
    files = {"a.png": png(3), "c.png": png(4), "c.seg.png": png(5), "c.cls": b" 7\n", "d.txt": b"x"}
    write_shard(tmp_path / "bare" / "val-0.tar", files)
    assert ids(open_images(tmp_path / "bare", None, 4)) == ["val-0/a.png", "val-0/c.png"]


def test_no_image_is_in_two_splits(imagenet):
    parts = {split: ids(open_images(imagenet, split, 3)) for split in SPLITS}
    assert len(parts["test"]) == 5
    assert all("validation-00" in id for id in parts["test"])
    assert 1 <= len(parts["validation"]) < 25
    found = list(chain(*parts.values()))
    assert len(found) == len(set(found)) == 85
    assert sorted(found) == sorted(ids(open_images(imagenet, "all", 3)))
    assert open_images(imagenet, None, 3).split == "test"


def test_shards_without_a_split_in_their_names_are_cut_as_a_plain_folder(tmp_path):
    write_shard(tmp_path / "s" / "00000.tar", samples(0, 60))
    write_shard(tmp_path / "s" / "00001.tar", samples(60, 30))
    parts = [ids(open_images(tmp_path / "s", split, 2)) for split in SPLITS]
    assert len(parts[0]) > len(parts[1]) + len(parts[2])
    assert sorted(chain(*parts)) == sorted(ids(open_images(tmp_path / "s", None, 2)))
    write_shard(tmp_path / "s" / "train-0.tar", samples(0, 1))
    with pytest.warns(UserWarning, match=r"00000\.tar"):
        assert len(open_images(tmp_path / "s", "all")) == 1


def test_test_shards_are_the_test_split(imagenet):
    write_shard(imagenet / "imagenet1k-test-00.tar", {"t.png": png(9), "t.cls": b"1"})
    assert ids(open_images(imagenet, None, 2)) == ["imagenet1k-test-00/t.png"]
    assert len(open_images(imagenet, "validation", 2)) == 5


def test_a_broken_member_is_skipped_and_named(tmp_path):
    write_shard(tmp_path / "s" / "train-0.tar", {**samples(0, 30), "broken.png": b"no image", "half.png": png(1)[:40]})
    source = open_images(tmp_path / "s", "all", 4)
    with pytest.warns(UserWarning, match="skipped"):
        assert len(list(source)) == 30
    assert [Path(path).name for path, _ in source.skipped] == ["train-0.tar::broken.png", "train-0.tar::half.png"]


def test_a_shard_that_shrinks_after_it_was_opened_is_no_image(imagenet):
    source = open_images(imagenet, None, 4)
    os.truncate(imagenet / "imagenet1k-validation-00.tar", 700)
    with pytest.raises(ImageError, match=r"validation-00\.tar::n104\.png: the shard has 0 of its"):
        source[4]


def test_the_index_is_made_once_for_a_shard_as_it_is(imagenet, cache, monkeypatch):
    scanned: list[str] = []
    scan = tar_shards._scanned
    monkeypatch.setattr(tar_shards, "_scanned", lambda shard: scanned.append(shard.name) or scan(shard))
    first = tensor(open_images(imagenet, "all", 4))
    assert len(scanned) == len(list((cache / "shards").iterdir())) == 3
    assert torch.equal(tensor(open_images(imagenet, "all", 4)), first)
    assert len(scanned) == 3
    write_shard(imagenet / "imagenet1k-validation-00.tar", samples(200, 6))
    assert len(open_images(imagenet, None, 4)) == 6
    assert scanned[3:] == ["imagenet1k-validation-00.tar"]


def whole(path: Path) -> Path:
    return write_shard(path / "train-0.tar", samples(0, 3))


def end_of(path: Path) -> int:
    """The byte at which the last member ends."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset


def truncated(path: Path, to: str) -> None:
    shard = whole(path)
    os.truncate(shard, {"data": 1024 + 20, "header": 1024 + 300, "end": end_of(shard)}[to])


def damaged(path: Path) -> None:
    content = bytearray(whole(path).read_bytes())
    content[1024:1100] = b"\xff" * 76  # the second header
    (path / "train-0.tar").write_bytes(content)


def compressed(path: Path) -> None:
    with tarfile.open(path / "train-0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: truncated(path, "data"), "cut short"),
        (lambda path: truncated(path, "header"), "cut short"),
        (lambda path: truncated(path, "end"), "cut short"),
        (damaged, "damaged"),
        (compressed, "compressed"),
        (lambda path: (path / "train-0.tar").write_bytes(b""), "cut short"),
        (lambda path: write_shard(path / "train-0.tar", {"n01.tar": b"x", "n02.tar": b"y"}), "unpack tar files inside"),
    ],
)
def test_a_shard_that_cannot_be_used_is_one_sentence(tmp_path, cache, make, said):
    make(tmp_path)
    with pytest.raises(SourceError, match=said) as caught:
        open_images(tmp_path, split="train")
    assert "train-0.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.json"))


def test_a_picture_beside_the_shards_is_skipped_not_the_shards(imagenet):
    """It was the only test image."""
    Image.new("RGB", (4, 4)).save(imagenet / "cover.png")
    (imagenet / "notes").mkdir()
    with pytest.warns(UserWarning, match=r"cover\.png"):
        assert len(open_images(imagenet)) == 5


def test_what_shards_do_not_have_is_refused(imagenet, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="has no masks"):
        open_images(imagenet, masks=True)
    write_shard(tmp_path / "s" / "train-0.tar", samples(0, 2))
    with pytest.raises(SourceError, match=r"'test' \(it has train\): add val"):
        open_images(tmp_path / "s")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set BACKSIGHT_CACHE"):
        open_images(tmp_path / "s", split="train")
