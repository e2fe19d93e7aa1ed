"""The feature store: the same numbers within the stated error, in the same order, whatever kills or damages it."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from collections import namedtuple
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import backsight.data.features as store_module
from backsight.data.features import FeatureStore, StoreError, estimate, features_or_images, record_features
from backsight.data.images import ImageError, SourceError, batches, open_images
from backsight.errors import BacksightError
from backsight.representation import Predictions, Tokens
from backsight.targets import load_target, module_target
from backsight.targets.base import Target, seeded

SHARD = 100_000  # bytes: several shards of a few images


class Pyramid(nn.Module):
    """Two convolutions, of a known cost and size."""

    def __init__(self, channels: int = 16, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.first, self.second = nn.Conv2d(3, channels, 2, 2), nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images)) * self.gain).mean((2, 3))


def _pyramid(channels: int = 16, gain: float = 1.0, seed: int = 0) -> Target:
    with seeded(seed):
        return module_target(Pyramid(channels, gain), ["first", "second"], image_size=(12, 20), name="pyramid")


def _images(count: int, size: tuple[int, int] = (12, 20), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _vit() -> Target:
    return load_target("scenes-vit", pretrained=False)


def _detr() -> Target:
    from targets.examples import small_detector

    return small_detector()


def _mask2former() -> Target:
    from targets.examples import small_detector

    return small_detector("mask2former")


def _stores(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _shards(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in _contents(folder).items() if name.startswith("shard")}


@pytest.fixture
def count_passes(monkeypatch):
    """Images that a target records from here on, as a list that grows."""

    def count(target: Target) -> list[int]:
        seen: list[int] = []
        record = target.record

        def counted(images: Tensor, *arguments: Any) -> Any:
            seen.append(len(images))
            return record(images, *arguments)

        monkeypatch.setattr(target, "record", counted)
        return seen

    return count


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("make", [_vit, _detr, _mask2former])
def test_representations_come_back_within_the_stated_error(make, tmp_path) -> None:
    target = make()
    images = _images(11, target.image_size)
    store = record_features(target, images, folder=tmp_path, batch_size=2, shard_bytes=2**20, progress=False)
    assert store.taps == target.taps
    assert (store.weights_hash, store.size, len(store)) == (target.weights_hash, target.image_size, 11)
    read, kept = store.read(range(11))
    assert torch.equal(read, images.float() / 255)
    recorded = target.record(read)
    for tap, representation in recorded.items():
        assert kept[tap].signature == representation.signature
        assert type(kept[tap]) is type(representation)
        assert kept[tap].values.dtype == torch.float32
        lost = []
        for name in ("logits", "boxes", "masks") if isinstance(representation, Predictions) else ("values",):
            found, true = getattr(kept[tap], name), getattr(representation, name)
            assert (found is None) == (true is None)
            if true is not None:
                lost.append(float((found - true).norm() / true.norm()))
        assert 0 < max(lost) < 3e-4
        assert store.errors[tap] == pytest.approx(max(lost), rel=0.05)
        if isinstance(representation, Tokens):
            assert kept[tap].grids == representation.grids
            assert not kept[tap].context
            assert (kept[tap].position is None) == (representation.position is None)
            if representation.position is not None:
                torch.testing.assert_close(kept[tap].position, representation.position[:1])


def test_float32_keeps_every_digit(tmp_path) -> None:
    target, images = _pyramid(), _images(7).float() / 300  # no multiples of 1 / 255
    store = record_features(target, images, folder=tmp_path, dtype="float32", batch_size=7, progress=False)
    read, kept = store.read(range(7))
    assert torch.equal(read, images)
    assert all(torch.equal(kept[tap].values, each.values) for tap, each in target.record(images).items())
    assert store.errors == {"first": 0.0, "second": 0.0}


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e5, 1e30])
def test_no_magnitude_overflows_or_loses_digits(magnitude: float) -> None:
    values = torch.randn(5, 3, 4) * magnitude
    values[1], values[2] = 0, values[2] * 1e-4  # an image of zeros, and one that is much smaller than the others
    halves, scale = store_module._halved(values)
    assert halves.dtype == torch.float16
    assert torch.equal(scale.log2(), scale.log2().round())
    back = torch.from_numpy(store_module._unhalved(halves.numpy(), scale.numpy()))
    assert (back[1] == 0).all()
    assert ((back - values).abs() <= values.abs() * 2.0**-11).all()


def test_every_finite_half_is_read_as_numpy_reads_it() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(2, -1)
    scale = np.array([1.0, 2.0**-20], np.float32)
    expected = halves.astype(np.float32) * scale[:, None]
    assert np.array_equal(store_module._unhalved(halves, scale), expected)


# ------------------------------------------------------------------------------------------------- the same order


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 2**28])
@pytest.mark.parametrize("how", [{}, {"shuffle_seed": 3}, {"shuffle_seed": 3, "steps": 9}, {"steps": 7, "start": 4}])
def test_passes_are_the_batches_of_the_images(how, shard_bytes, tmp_path) -> None:
    target, images = _pyramid(), _images(13)
    store = record_features(target, images, folder=tmp_path, batch_size=4, shard_bytes=shard_bytes, progress=False)
    assert len(_shards(store.folder)) == {1: 13, 30_000: 4, 2**28: 1}[shard_bytes]
    for batch_size in (1, 5):
        for source in (images, store):
            passes = store.passes(batch_size, **how)
            for expected, (batch, recorded) in zip(batches(source, batch_size, **how), passes, strict=True):
                assert torch.equal(batch, expected)
                truth = target.record(expected)
                assert all(
                    torch.allclose(recorded[tap].values, truth[tap].values, rtol=1e-3, atol=1e-4) for tap in truth
                )


def test_some_of_the_taps_are_read(tmp_path) -> None:
    store = record_features(_pyramid(), _images(4), folder=tmp_path, progress=False)
    assert list(store.read([2], ["second"])[1]) == ["second"]
    assert all(list(recorded) == ["first"] for _, recorded in store.passes(2, taps=["first"]))
    with pytest.raises(BacksightError, match="has no tap 'third'; it has first, second"):
        store.passes(2, taps=["third"])
    with pytest.raises(BacksightError, match="has no image 4: it has 4"):
        store.read([0, 4])
    with pytest.raises(SourceError, match="batch_size 0"):
        store.passes(0)


def test_another_process_gets_a_store_without_its_maps(tmp_path) -> None:
    store = record_features(_pyramid(), _images(40), folder=tmp_path, progress=False)
    first = store.read([3])[1]["first"].values
    packed = pickle.dumps(store)
    assert len(packed) < 5000
    assert torch.equal(pickle.loads(packed).read([3])[1]["first"].values, first)


# ---------------------------------------------------------------------------------------------------- image files


def _folder_of_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, picture in enumerate(_images(count, (16, 24))):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    return folder


def test_unreadable_images_keep_their_index_and_are_left_out(tmp_path) -> None:
    folder = _folder_of_images(tmp_path / "pictures", 12)
    target = _pyramid()
    source = open_images(folder, size=target.image_size)
    for number in (0, 4, 5, 6, 7, 10):  # the second shard of three has no image at all
        (folder / f"{number:02}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"pictures: .* skipped"):
        store = record_features(target, source, folder=tmp_path, batch_size=2, shard_bytes=20_000, progress=False)
    assert [shard["images"] for shard in json.loads((store.folder / "index.json").read_text())["shards"]] == [3, 0, 3]
    assert (store.name, store.split, store.fit, len(store)) == ("pictures", "all", "crop", 12)
    assert sorted(Path(path).name for path, _ in store.skipped) == [f"{n:02}.png" for n in (0, 4, 5, 6, 7, 10)]
    assert torch.equal(store.image(8), source.image(8))
    with pytest.raises(ImageError, match=r"05\.png"):
        store.image(5)
    for how in ({"batch_size": 2}, {"batch_size": 3, "shuffle_seed": 1, "steps": 9}):
        expected = list(batches(source, **how))
        assert all(torch.equal(a, b) for a, b in zip(batches(store, **how), expected, strict=True))
        for (batch, recorded), truth in zip(store.passes(**how), expected, strict=True):
            assert torch.equal(batch, truth)
            assert recorded["first"].batch == len(truth)


def test_a_source_without_one_readable_image_is_refused(tmp_path) -> None:
    folder = _folder_of_images(tmp_path / "pictures", 2)
    source = open_images(folder, size=(12, 20))
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(SourceError, match="none of the images"):
        record_features(_pyramid(), source, folder=tmp_path, progress=False)
    assert _stores(tmp_path) == [folder]


def test_padded_images_and_unfit_arguments_are_refused(tmp_path) -> None:
    padded = open_images(_folder_of_images(tmp_path / "pictures", 2), size=(12, 20), fit="pad")
    with pytest.raises(BacksightError, match="'pictures' are padded"):
        record_features(_pyramid(), padded)
    with pytest.raises(BacksightError, match="stored as float16 or float32, not as 'int8'"):
        record_features(_pyramid(), _images(2), dtype="int8")
    with pytest.raises(SourceError, match="they are \\(N, 3, H, W\\)"):
        record_features(_pyramid(), torch.zeros(2, 12, 20))
    with pytest.raises(BacksightError, match="no tap 'third'"):
        record_features(_pyramid(), _images(2), "third")


def _altered(monkeypatch, target: Target, change) -> None:
    """From its third pass on the target gives something else."""
    record, calls = target.record, []

    def altered(*arguments: Any) -> Any:
        calls.append(0)
        recorded = record(*arguments)
        return {tap: change(each) for tap, each in recorded.items()} if len(calls) > 2 else recorded

    monkeypatch.setattr(target, "record", altered)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: replace(x, position=x.values * 0 + 1), "positional code of .* changes with the image"),
        (lambda x: replace(x, padding=torch.zeros(x.batch, 60, dtype=torch.bool)), "padded tokens at first"),
        (lambda x: Tokens(x.values, ((1, 60),), 0, None, x.position), "several forms at first"),
        (lambda x: x.replace(x.values / 0), "features of pyramid at first are not finite"),
    ],
)
def test_what_a_store_cannot_keep_is_refused(change, sentence, monkeypatch, tmp_path) -> None:
    target = _pyramid()
    record = target.record

    def positioned(*arguments: Any) -> Any:
        return {
            tap: replace(each, position=torch.zeros_like(each.values[:1])) for tap, each in record(*arguments).items()
        }

    monkeypatch.setattr(target, "record", positioned)
    _altered(monkeypatch, target, change)
    with pytest.raises(BacksightError, match=sentence):
        record_features(target, _images(6), folder=tmp_path, batch_size=2, progress=False)


# --------------------------------------------------------------------------------------------------- found again


def test_a_store_is_found_again_after_one_image_and_says_so(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    target, images = _vit(), _images(3, (64, 64))
    first = record_features(target, images, ["blocks.0"])
    assert first.folder.parent == tmp_path / "features"
    assert "features of 3 images: 0.1 MB in " in capsys.readouterr().err
    record, passed = target.record, []

    def counted(images: Tensor, *rest: Any) -> Any:
        passed.append(len(images))
        return record(images, *rest)

    monkeypatch.setattr(target, "record", counted)
    again = record_features(target, images.clone(), "blocks.0")
    assert again.folder == first.folder
    assert "features of 3 images: reused from " in capsys.readouterr().err
    assert passed == [1]
    record_features(target, images, "blocks.0", progress=False)
    assert capsys.readouterr().err == ""


def test_whatever_decides_about_a_representation_is_in_the_key(tmp_path) -> None:
    target, images = _pyramid(), _images(3)
    source = open_images(_folder_of_images(tmp_path / "pictures", 3), size=(12, 20))
    other = images.clone()
    other[2, 1, 0, 0] ^= 1
    normalised = _pyramid()
    normalised.preprocessing = replace(normalised.preprocessing, mean=(0.5, 0.5, 0.4))

    def folder(*arguments: Any, **how: Any) -> str:
        return estimate(*arguments, folder=tmp_path, **how).folder.name

    before = folder(target, source)
    os.utime(tmp_path / "pictures" / "01.png", ns=(0, 0))
    names = [
        before,
        folder(target, source),
        folder(target, images),
        folder(target, images.float() / 255),
        folder(target, images[:2]),
        folder(target, other),
        folder(target, images, "first"),
        folder(target, images, dtype="float32"),
        folder(_pyramid(seed=1), images),
        folder(normalised, images),
        folder(target, open_images(tmp_path / "pictures", size=(12, 20), fit="stretch")),
        folder(target, open_images(tmp_path / "pictures", size=(12, 20), interpolation="nearest")),
    ]
    assert len(set(names)) == len(names)
    assert folder(_pyramid(), images.clone()) == names[2]


def test_a_users_model_whose_code_has_changed_is_noticed(tmp_path) -> None:
    images = _images(3)
    store = record_features(_pyramid(), images, folder=tmp_path, progress=False)
    assert record_features(_pyramid(), images, folder=tmp_path, progress=False).folder == store.folder
    with pytest.raises(BacksightError, match=r"pyramid gives other features at second now .* delete this folder"):
        record_features(_pyramid(gain=2.0), images, folder=tmp_path, progress=False)


# ---------------------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_size_is_known_before(dtype, tmp_path) -> None:
    target, images = _pyramid(64), _images(40)
    expected = estimate(target, images, folder=tmp_path, dtype=dtype)
    assert not _stores(tmp_path)
    store = record_features(target, images, folder=tmp_path, dtype=dtype, progress=False)
    assert expected.folder == store.folder
    assert expected.images == 40
    assert store.bytes == sum(map(len, _shards(store.folder).values()))
    assert store.bytes == pytest.approx(expected.bytes, rel=0.01)
    assert "MB in " in str(expected)
    assert expected.limit < expected.free


@pytest.mark.parametrize("what", ["limit", "disk"])
def test_too_small_a_disk_is_refused_before_anything_is_written(what, tmp_path, monkeypatch) -> None:
    target, images = _pyramid(), _images(40)
    how: dict[str, Any] = {"folder": tmp_path / "features", "progress": False}
    if what == "limit":
        how["limit"] = 100_000
    else:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 9 * 10**5, 10**5))
    assert not estimate(target, images, folder=tmp_path, limit=how.get("limit")).fits
    with pytest.raises(StoreError, match=r"features of 40 images of pyramid take 0\.2 MB, and 0\.1 MB may be used"):
        record_features(target, images, **how)
    assert not _stores(tmp_path)
    with pytest.warns(UserWarning, match="features are computed anew") as warned:
        assert features_or_images(target, images, **how) is images
    assert len(warned) == 1
    assert warned[0].filename == __file__
    monkeypatch.undo()
    assert isinstance(features_or_images(target, images, **{**how, "limit": None}), FeatureStore)


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        record_features(_pyramid(), _images(2), folder=tmp_path / "file" / "features", progress=False)


def test_a_full_disk_keeps_whole_shards_and_the_next_call_goes_on(tmp_path, monkeypatch, count_passes) -> None:
    target, images = _pyramid(), _images(40)
    whole = record_features(_pyramid(), images, folder=tmp_path / "a", batch_size=2, shard_bytes=SHARD, progress=False)
    save, calls = store_module.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        save(tensors, path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(StoreError, match=r"No space left on device.* after 20 of 40 images: make space"):
        record_features(target, images, folder=tmp_path / "b", batch_size=2, shard_bytes=SHARD, progress=False)
    [folder] = _stores(tmp_path / "b")
    assert sorted(_contents(folder)) == [".lock", "index.json", "shard-00000.safetensors"]
    with pytest.raises(BacksightError, match="holds no complete feature store: call record_features"):
        FeatureStore(folder)
    seen = count_passes(target)
    store = record_features(target, images, folder=tmp_path / "b", batch_size=2, shard_bytes=SHARD, progress=False)
    assert sum(seen) == 1 + 40 - 20
    assert _shards(store.folder) == _shards(whole.folder)
    assert store.errors == whole.errors


# --------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_named_and_recorded_again(damage, tmp_path, count_passes) -> None:
    target, images = _pyramid(), _images(40)
    how: dict[str, Any] = {"folder": tmp_path, "batch_size": 2, "shard_bytes": SHARD, "progress": False}
    store = record_features(target, images, **how)
    before = _shards(store.folder)
    path = store.folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-7] if damage == "cut" else content)
    if damage == "delete":
        path.unlink()
    opened = FeatureStore(store.folder)
    opened.read([0, 19])
    with pytest.raises(BacksightError, match=r"shard-00001\.safetensors .* is missing or damaged .* delete this file"):
        opened.read([0, 20])
    with pytest.raises(BacksightError, match=r"shard-00001"):
        list(opened.passes(4, shuffle_seed=0))
    path.unlink(missing_ok=damage != "flip")
    seen = count_passes(target)
    again = record_features(target, images, **how)
    assert sum(seen) == 1 + 20
    assert _shards(again.folder) == before
    again.read(range(40))


def test_an_index_that_is_no_json_is_made_again(tmp_path) -> None:
    target, images = _pyramid(), _images(4)
    store = record_features(target, images, folder=tmp_path, progress=False)
    before = _shards(store.folder)
    (store.folder / "index.json").write_text("{")
    with pytest.raises(BacksightError, match="holds no complete feature store"):
        FeatureStore(store.folder)
    assert _shards(record_features(target, images, folder=tmp_path, progress=False).folder) == before


# ------------------------------------------------------------------------------------------------------ processes

COUNT, BATCH = 40, 2  # of the recordings in other processes: 20 passes


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one which has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backsight.data.features", "backsight.targets", "torch._dynamo", "pytest"])
    return context


def _recording(
    folder: Path, connection: Connection, pause: float = 0.0, dies_before: str = "", barrier: Any = None
) -> None:
    """In a process: record, and tell how many passes it took and what was read; a pass takes `pause` seconds at least.

    dies_before: "rename" or "index" of the first shard that is written.
    """
    torch.set_num_threads(1)
    target = _pyramid()
    record, passes = target.record, []

    def slow(images: Tensor, *arguments: Any) -> Any:
        passes.append(len(images))
        time.sleep(pause)
        return record(images, *arguments)

    target.record = slow  # type: ignore[method-assign]
    if dies_before == "rename":
        chmod = Path.chmod

        def dying(path: Path, mode: int) -> None:
            chmod(path, mode)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.chmod = dying  # type: ignore[method-assign, assignment]
    elif dies_before == "index":
        store_module.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if barrier is not None:
        barrier.wait()
    store = record_features(target, _images(COUNT), folder=folder, batch_size=BATCH, shard_bytes=20_000, progress=False)
    connection.send((len(passes), store.read([COUNT - 1])[1]["second"].values.sum().item()))


def test_killed_at_any_moment_it_ends_in_the_same_bytes(processes, tmp_path) -> None:
    target, images = _pyramid(), _images(COUNT)
    whole = record_features(target, images, folder=tmp_path / "a", batch_size=BATCH, shard_bytes=20_000, progress=False)
    shards = len(_shards(whole.folder))
    assert shards == 10
    draw = random.Random(0)
    moments: list[tuple[int, str]] = [(0, ""), (1, "index"), (2, ""), (4, ""), (5, "rename"), (7, "")]
    killed, counts = 0, []
    for written, dies_before in moments:
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=_recording, args=(tmp_path / "b", sender, 0.02, dies_before))
        child.start()
        deadline = time.monotonic() + 60
        while not dies_before and time.monotonic() < deadline:
            found = [len(_shards_in_index(folder)) for folder in _stores(tmp_path / "b")]
            if found and found[0] >= written:
                time.sleep(draw.uniform(0, 0.05))  # a shard takes 0.04 s at least
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        child.join(60)
        killed += child.exitcode == -signal.SIGKILL
        [folder] = _stores(tmp_path / "b")
        counts.append(len(_shards_in_index(folder)))
        with pytest.raises(BacksightError, match="no complete feature store"):
            FeatureStore(folder)
        receiver.close()
    assert killed == len(moments)
    assert counts == sorted(counts)  # no whole shard is lost
    assert 0 < counts[-1] < shards
    store = record_features(target, images, folder=tmp_path / "b", batch_size=BATCH, shard_bytes=20_000, progress=False)
    assert _shards(store.folder) == _shards(whole.folder)
    assert sorted(_contents(store.folder)) == sorted(_contents(whole.folder))
    assert (store.folder / "index.json").read_bytes() == (whole.folder / "index.json").read_bytes()


def _shards_in_index(folder: Path) -> list[Any]:
    index = folder / "index.json"
    return json.loads(index.read_text())["shards"] if index.is_file() else []


def test_of_two_processes_one_records_and_both_read(processes, tmp_path) -> None:
    barrier = processes.Barrier(2)
    pipes = [processes.Pipe(duplex=False) for _ in range(2)]
    children = [processes.Process(target=_recording, args=(tmp_path, sender, 0.01, "", barrier)) for _, sender in pipes]
    for child in children:
        child.start()
    results = [receiver.recv() if receiver.poll(60) else pytest.fail("no answer") for receiver, _ in pipes]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert sorted(passes for passes, _ in results) == [1, 1 + COUNT // BATCH]
    assert results[0][1] == results[1][1]


def _memory(folder: Path, connection: Connection) -> None:
    """In a process: bytes of a store, and how many more are held at most as it is written, and as it is read."""
    torch.set_num_threads(1)
    target, save = _pyramid(256), store_module.save_file

    def own() -> int:  # without the pages of mapped files, which the system takes back when it needs them
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def record(count: int) -> tuple[FeatureStore, int]:
        """The memory is looked at where it is fullest: with a whole shard, as it is written."""
        held: list[int] = []
        store_module.save_file = lambda *arguments: (held.append(own()), save(*arguments))  # type: ignore[assignment]
        images = _images(1).expand(count, -1, -1, -1)
        store = record_features(target, images, folder=folder, batch_size=8, shard_bytes=2**21, progress=False)
        return store, max(held)

    record(200)  # several shards, so that the allocator already keeps what it keeps from one shard to the next
    before = own()
    store, most_written = record(1000)
    next(store.passes(8, shuffle_seed=0))
    most_read = max(own() for _ in store.passes(8, shuffle_seed=0))
    connection.send((store.bytes, most_written - before, most_read - before))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_memory_does_not_grow_with_the_images(processes, tmp_path) -> None:
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_memory, args=(tmp_path, sender))
    child.start()
    size, written, read = receiver.recv() if receiver.poll(60) else pytest.fail("no answer")
    child.join(60)
    assert size > 55e6
    # A shard and a batch of 2 MB each are held at a time; the rest of these bounds is what the allocator keeps.
    assert written < 16e6
    assert read < 24e6


def test_warnings_are_kept_for_trouble(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = features_or_images(_pyramid(), _images(4), folder=tmp_path, progress=False)
        assert isinstance(store, FeatureStore)
        list(store.passes(3))
