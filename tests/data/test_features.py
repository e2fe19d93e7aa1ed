"""The feature store: the same numbers within the stated error, in the same order, whatever kills or damages it."""

import multiprocessing
import os
import signal
import time
from collections import namedtuple
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import backsight.data.features as features
from backsight.data.features import FeatureStore, record_features
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, SourceError
from backsight.representation import Predictions, Tokens
from backsight.targets import load_target, module_target
from backsight.targets.base import Target, seeded


class Pyramid(nn.Module):
    """Two convolutions, of a known cost and size."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels, 2, 2), nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images))).mean((2, 3))


def pyramid(channels: int = 16, seed: int = 0) -> Target:
    with seeded(seed):
        return module_target(Pyramid(channels), ["first", "second"], image_size=(12, 20), name="pyramid")


def pictures(count: int, size: tuple[int, int] = (12, 20)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def folder_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures(count, (16, 24))):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def count_passes(monkeypatch: pytest.MonkeyPatch, target: Target) -> list[int]:
    """Images that the target records from here on, as a list that grows."""
    seen: list[int] = []
    record = target.record

    def counted(images: Tensor, *arguments: Any) -> Any:
        seen.append(len(images))
        return record(images, *arguments)

    monkeypatch.setattr(target, "record", counted)
    return seen


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("name", ["scenes-vit", "scenes-detr"])
def test_representations_come_back_within_the_stated_error(name, tmp_path) -> None:
    target = load_target(name, pretrained=False)
    images = pictures(5, target.image_size)
    store = record_features(target, images, folder=tmp_path, batch_size=2, progress=False)
    assert store.taps == target.taps
    assert (store.weights_hash, len(store)) == (target.weights_hash, 5)
    read, kept = store.read([4, 0, 1, 3, 2])
    assert torch.equal(read, images[[4, 0, 1, 3, 2]].float() / 255)
    for tap, representation in target.record(read).items():
        assert kept[tap].form == representation.form
        assert type(kept[tap]) is type(representation)
        for part in ("logits", "boxes") if isinstance(representation, Predictions) else ("values",):
            found, true = getattr(kept[tap], part), getattr(representation, part)
            assert found.dtype == torch.float32
            assert (found - true).norm() < 3e-4 * true.norm()
        assert 0 < store.errors[tap] < 3e-4
        if isinstance(representation, Tokens):
            assert (kept[tap].grids, kept[tap].prefix) == (representation.grids, representation.prefix)
            assert not kept[tap].context
            if representation.position is not None:
                torch.testing.assert_close(kept[tap].position, representation.position[:1])


@pytest.mark.parametrize("how", [{}, {"shuffle_seed": 3}, {"shuffle_seed": 3, "steps": 9}, {"steps": 7, "start": 4}])
def test_passes_are_the_batches_of_the_images(how, tmp_path) -> None:
    target, images = pyramid(), pictures(13).float() / 300  # no multiples of 1 / 255
    store = record_features(target, images, folder=tmp_path, batch_size=2, progress=False)
    for batch_size in (1, 5):
        passes = store.passes(batch_size, **how)
        for expected, (batch, recorded) in zip(batches(images, batch_size, **how), passes, strict=True):
            assert torch.equal(batch, expected)
            for tap, truth in target.record(expected).items():
                torch.testing.assert_close(recorded[tap].values, truth.values, rtol=1e-3, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(batches(images, 4, **how), batches(store, 4, **how), strict=True))


def test_parts_taps_and_copies_of_a_store(tmp_path) -> None:
    store = record_features(pyramid(), pictures(40), folder=tmp_path, progress=False)
    assert list(store.read([2], ["second"])[1]) == ["second"]
    assert all(list(recorded) == ["first"] for _, recorded in store.passes(20, taps=["first"]))
    with pytest.raises(BacksightError, match=r"'third'.*first, second"):
        list(store.passes(2, taps=["third"]))
    with pytest.raises(IndexError):
        store.read([0, 40])
    first = store.read([3])[1]["first"].values
    part = store.subset(slice(1, None, 2))
    assert torch.equal(part.read([1])[1]["first"].values, first)


def test_unreadable_images_are_left_out(tmp_path) -> None:
    folder, target = folder_of(tmp_path / "pictures", 12), pyramid()
    source = open_images(folder, None, target)
    lost = (0, 4, 5, 6, 7, 10)  # two whole batches among them
    for number in lost:
        (folder / f"{number:02}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"pictures: .* skipped"):
        store = record_features(target, source, folder=tmp_path, batch_size=2, progress=False)
    assert (store.name, store.split, len(store)) == ("pictures", "all", 6)
    assert sorted(Path(path).name for path, _ in store.skipped) == [f"{n:02}.png" for n in lost]
    kept = torch.stack([source.image(number) for number in range(12) if number not in lost])
    assert torch.equal(store.image(4), kept[4])
    for how in ({"batch_size": 2}, {"batch_size": 3, "shuffle_seed": 1, "steps": 9}):
        expected = list(batches(kept, **how))
        assert all(torch.equal(a, b) for a, b in zip(batches(store, **how), expected, strict=True))
        for (batch, recorded), truth in zip(store.passes(**how), expected, strict=True):
            assert torch.equal(batch, truth)
            torch.testing.assert_close(
                recorded["first"].values, target.record(truth)["first"].values, rtol=1e-3, atol=1e-4
            )
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="none of the"):
        record_features(target, source, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: replace(x, position=x.values * 0 + 1), "several forms.* at first"),
        (lambda x: replace(x, padding=torch.zeros(x.batch, 60, dtype=torch.bool)), "padded"),
        (lambda x: Tokens(x.values, ((1, 60),), 0, None, x.position), "several forms.* at first"),
        (lambda x: x.replace(x.values / 0), "at first are not finite"),
    ],
)
def test_what_a_store_cannot_keep_is_refused(change, sentence, monkeypatch, tmp_path) -> None:
    target, calls = pyramid(), []
    record = target.record

    def altered(*arguments: Any) -> Any:  # from its third pass on the target gives something else
        calls.append(0)
        recorded = {t: replace(x, position=torch.zeros_like(x.values[:1])) for t, x in record(*arguments).items()}
        return {tap: change(each) for tap, each in recorded.items()} if len(calls) > 2 else recorded

    monkeypatch.setattr(target, "record", altered)
    with pytest.raises(BacksightError, match=sentence):
        record_features(target, pictures(6), folder=tmp_path, batch_size=2, progress=False)


# --------------------------------------------------------------------------------------------------- found again


def test_a_store_is_found_again_after_one_image(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    target, images = load_target("scenes-vit", pretrained=False), pictures(3, (64, 64))
    first = record_features(target, images, ["blocks.0"], progress=False)
    assert first.folder.parent == tmp_path / "features"
    passed = count_passes(monkeypatch, target)
    assert record_features(target, images.clone(), "blocks.0", progress=False).folder == first.folder
    assert passed == [1]


def test_whatever_decides_about_a_representation_is_in_the_key(tmp_path) -> None:
    target, images = pyramid(), pictures(3)
    folder = folder_of(tmp_path / "pictures", 3)
    other = images.clone()
    other[2, 1, 0, 0] ^= 1
    normalised, cropped = pyramid(), pyramid()
    normalised.preprocessing = replace(normalised.preprocessing, mean=(0.5, 0.5, 0.4))
    cropped.preprocessing = replace(cropped.preprocessing, crop_fraction=0.9)

    def named(target: Target, images: Any, *taps: str) -> str:
        return record_features(target, images, *taps, folder=tmp_path / "stores", progress=False).folder.name

    source = open_images(folder, None, target)
    before = named(target, source)
    os.utime(folder / "01.png", ns=(0, 0))
    names = [
        before,
        named(target, source),
        named(target, images),
        named(target, images.float() / 255),
        named(target, images[:2]),
        named(target, other),
        named(target, images, "first"),
        named(pyramid(seed=1), images),
        named(normalised, images),
        named(target, open_images(folder, None, cropped)),
    ]
    assert len(set(names)) == len(names)
    assert named(pyramid(), images.clone()) == names[2]


def test_other_code_with_the_same_weights_is_seen(tmp_path, monkeypatch) -> None:
    target, images = pyramid(), pictures(4)
    record_features(target, images, folder=tmp_path, progress=False)
    record = target.record
    monkeypatch.setattr(
        target, "record", lambda *given: {tap: each.replace(2 * each.values) for tap, each in record(*given).items()}
    )
    with pytest.raises(BacksightError, match="other features at first"):
        record_features(target, images, folder=tmp_path, progress=False)
    with pytest.raises(BacksightError, match="not of pyramid with"):
        record_features(pyramid(), images, folder=tmp_path, progress=False).check(pyramid(seed=1))


# ------------------------------------------------------------------------------------- full disks, damage, kills


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage(10**6, 9 * 10**5, 10**5))
    target, images = pyramid(), pictures(40)
    with pytest.raises(BacksightError, match="free"):
        record_features(target, images, progress=False)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(BacksightError, match="cannot be written"):
        record_features(target, images, folder=tmp_path / "file" / "features", progress=False)


@pytest.mark.parametrize("damage", ["cut", "delete", "index"])
def test_a_damaged_store_is_named_and_mended(damage, tmp_path, monkeypatch) -> None:
    target, images = pyramid(), pictures(11)
    how: dict[str, Any] = {"folder": tmp_path, "batch_size": 2, "progress": False}
    store = record_features(target, images, **how)
    before = contents(store.folder)
    path = store.folder / ("index.json" if damage == "index" else "rows.bin")
    path.write_bytes(b"{" if damage == "index" else before[path.name][: len(before[path.name]) * 5 // 11 + 7])
    if damage == "delete":
        path.unlink()
    if damage != "index":
        with pytest.raises(BacksightError, match=r"rows\.bin .* missing or damaged"):
            replace(store).read([0])
    seen = count_passes(monkeypatch, target)
    assert contents(record_features(target, images, **how).folder) == before
    assert sum(seen) == 1 + (11 - 4 if damage == "cut" else 11)  # of the fifth image a batch was whole in part only


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one which has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backsight.data.features", "backsight.targets", "torch._dynamo", "pytest"])
    return context


def _recording(folder: Path, connection: Connection, pause: float, channels: int = 16, barrier: Any = None) -> None:
    """In a process: record, a pass taking `pause` seconds at least, and tell how many passes it took."""
    torch.set_num_threads(1)
    target = pyramid(channels)
    record, passes = target.record, []

    def slow(images: Tensor, *arguments: Any) -> Any:
        passes.append(len(images))
        time.sleep(pause)
        return record(images, *arguments)

    target.record = slow  # type: ignore[method-assign]
    if barrier is not None:
        barrier.wait()
    record_features(target, pictures(40), folder=folder, batch_size=2, progress=False)
    connection.send(len(passes))


def test_a_killed_recording_goes_on_and_ends_in_the_same_bytes(processes, tmp_path, monkeypatch) -> None:
    target, images = pyramid(512), pictures(40)  # wide enough that rows reach the disk before the end
    whole = record_features(target, images, folder=tmp_path / "a", batch_size=2, progress=False)
    _, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_recording, args=(tmp_path / "b", sender, 0.02, 512))
    child.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (written := [*tmp_path.glob("b/*/rows.bin")]) and written[0].stat().st_size > 6 * whole.row.itemsize:
            break
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    seen = count_passes(monkeypatch, target)
    store = record_features(target, images, folder=tmp_path / "b", batch_size=2, progress=False)
    assert 1 < sum(seen) <= 1 + 40 - 2
    assert contents(store.folder) == contents(whole.folder)


def test_of_two_processes_one_records_and_both_read(processes, tmp_path) -> None:
    barrier = processes.Barrier(2)
    pipes = [processes.Pipe(duplex=False) for _ in range(2)]
    children = [processes.Process(target=_recording, args=(tmp_path, sender, 0.01, 16, barrier)) for _, sender in pipes]
    for child in children:
        child.start()
    results = [receiver.recv() if receiver.poll(60) else pytest.fail("no answer") for receiver, _ in pipes]
    for child in children:
        child.join(60)
    assert sorted(results) == [1, 21]


def _memory(folder: Path, connection: Connection) -> None:
    """In a process: bytes of a store, and how many more are held at most as it is written, and as it is read."""
    torch.set_num_threads(1)
    target, held = pyramid(768), []

    def own() -> int:  # without the pages of mapped files, which the system takes back when it needs them
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def record(count: int) -> FeatureStore:
        return record_features(
            target, pictures(1).expand(count, -1, -1, -1), folder=folder, batch_size=8, progress=False
        )

    forward = target.record
    target.record = lambda *arguments: (held.append(own()), forward(*arguments))[1]  # type: ignore[method-assign]
    record(60)  # so that the allocator already keeps what it keeps from one batch to the next
    before = own()
    held.clear()
    store = record(600)
    held += [own() for _ in store.passes(8, shuffle_seed=0)]
    connection.send((store.images * store.row.itemsize, max(held) - before))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_memory_does_not_grow_with_the_images(processes, tmp_path) -> None:
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_memory, args=(tmp_path, sender))
    child.start()
    size, grown = receiver.recv() if receiver.poll(60) else pytest.fail("no answer")
    child.join(60)
    assert size > 768 * 2 * 120 * 600
    assert grown < 20e6 < size  # batches in float32 are 6 MB
