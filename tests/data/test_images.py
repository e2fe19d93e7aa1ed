"""Sources in all their layouts: declared splits are kept, splits share nothing, batches come in their order."""

import os
import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from backsight.data.decode import ImageError
from backsight.data.images import SPLITS, batches, crop_box, open_images, tensor
from backsight.errors import BacksightError, SourceError
from backsight.scenes.photographs import PHOTOGRAPHS, photograph
from backsight.targets.base import Preprocessing


def fill(folder: Path, names, size=(8, 8)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 7 % 256, 50, 100)).save(folder / name)
    return folder


def ids(source) -> list[str]:
    return [entry.id for entry in source.entries]


def by_split(folder: Path) -> dict[str, list[str]]:
    return {split: ids(open_images(folder, split, 8)) for split in SPLITS}


# -------------------------------------------------------------------------------------------------------- geometry


def test_a_crop_keeps_the_centre_and_an_image_of_the_right_size_stays(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    for third in range(3):
        pixels[:, 40 * third : 40 * (third + 1), third] = 255
    Image.fromarray(pixels).save(tmp_path / "thirds.png")
    image = open_images(tmp_path, None, (20, 20))[0]["image"]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 20, 20))
    assert (image[1, :, 2:-2] == 255).all()
    assert image[[0, 2], :, 2:-2].max() == 0
    assert image[1].min() > 200  # resized before the cut: the filter sees a little across the edge
    whole = open_images(tmp_path, None, (40, 120))[0]["image"]
    np.testing.assert_array_equal(whole.permute(1, 2, 0).numpy(), pixels)


def test_leaves_and_parts_join_the_training_images_of_a_folder_alone(tmp_path):
    for split, number in (("train", 2), ("val", 1), ("test", 1)):
        for index in range(number):
            pixels = np.random.default_rng([number, index]).integers(0, 255, (5, 7, 3), np.uint8)
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(pixels.repeat(16, 0).repeat(16, 1)).save(tmp_path / split / f"{split}{index}.png")
    with_leaves = f"{tmp_path}+leaves"
    source = open_images(with_leaves, "train", (40, 56), seed=3)
    assert source.name == f"{tmp_path.name}+leaves"
    assert len(source) == 2 * (2 + 7 * 2)
    assert len(set(ids(source))) == len(source)
    assert [item["id"] for item in source] == ids(source)
    whole, parts = source[0]["image"], [source.image(index) for index in range(2, 5)]  # of the first picture
    scale = [float((part[:, 1:] != part[:, :-1]).float().mean()) for part in (whole, *parts)]
    assert all(of_part < scale[0] for of_part in scale[1:])  # fewer edges: what is shown is larger
    assert len({part.numpy().tobytes() for part in parts}) == 3
    again, other = (open_images(with_leaves, "train", (40, 56), seed=seed) for seed in (3, 4))
    assert torch.equal(tensor(again), tensor(source))
    assert not torch.equal(tensor(other)[2:], tensor(source)[2:])
    for split in ("validation", "test"):
        alone = open_images(tmp_path, split, 8)
        assert ids(open_images(with_leaves, split, 8)) == ids(alone)
    with pytest.raises(SourceError, match="no folder 'nowhere"):
        open_images("nowhere+leaves", "train", 8)


def target(**preprocessing):
    return SimpleNamespace(preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3, **preprocessing))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("size", "fraction"), [((28, 28), 0.875), ((30, 45), 1.0), ((64, 64), 0.8)])
def test_a_targets_own_size_crop_and_interpolation_are_used(tmp_path, interpolation, size, fraction):
    """As torchvision evaluates; every image was bicubic with a full crop before."""
    Image.fromarray(photograph("coffee")).save(tmp_path / "coffee.png")
    source = open_images(tmp_path, None, target(size=size, interpolation=interpolation, crop_fraction=fraction))
    assert source.size == size
    height, width = photograph("coffee").shape[:2]
    scale = max(size[0] / height, size[1] / width) / fraction
    usual = v2.Compose(
        [
            v2.Resize((round(height * scale), round(width * scale)), v2.InterpolationMode(interpolation)),
            v2.CenterCrop(size),
            v2.PILToTensor(),
        ]
    )(Image.fromarray(photograph("coffee")))
    near = (source[0]["image"].float() - usual.float()).square().mean().sqrt()
    other = tensor(open_images(tmp_path, None, size))[0] * 255
    plain = (other - usual.float()).square().mean().sqrt()
    assert near < (40 if interpolation == "nearest" else 1)  # there the nearest to other places
    assert near < plain or (fraction, interpolation) == (1.0, "bicubic")
    assert torch.equal(source.image(0), source[0]["image"])


def test_generated_images_are_never_cropped():
    made = open_images("scenes", "test", target(size=(32, 32), crop_fraction=0.5), 2)
    assert torch.equal(tensor(made), tensor(open_images("scenes", "test", 32, 2)))


sides = st.integers(1, 700)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 130), st.integers(1, 130), st.sampled_from([1.0, 0.9, 0.5]))
def test_crops_stay_inside_the_image_and_keep_its_aspect(height, width, rows, columns, fraction):
    left, top, right, bottom = crop_box((width, height), (rows, columns), fraction)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / columns == pytest.approx((bottom - top) / rows, rel=1e-6)
    assert right - left == pytest.approx(fraction * width) or bottom - top == pytest.approx(fraction * height)


# ------------------------------------------------------------------------------------------------- files of a folder


def test_a_folder_is_searched_to_its_depths_in_stable_order(tmp_path):
    fill(tmp_path, ["b.png", "a/z.jpg", "a/B.JPG", "c/d/e.webp", ".hidden/x.png", "._b.png", "__MACOSX/b.png"])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "c" / "back").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    source = open_images(tmp_path)
    assert ids(source) == ["a/B.JPG", "a/z.jpg", "b.png", "c/d/e.webp"]
    assert (source.split, source.name, source.skipped) == ("all", tmp_path.name, [])
    assert [item["index"] for item in source] == [0, 1, 2, 3]
    assert source[-1]["index"] == 3
    with pytest.raises(IndexError):
        source[4]


def test_what_is_an_image_is_told_by_its_content_where_its_name_does_not(tmp_path):
    fill(tmp_path, ["a.jpg", "b.avif", "c.png", "d.jfif", "e.png", "f.jpg"])
    (tmp_path / "c.png").rename(tmp_path / "blob")
    (tmp_path / "e.png").rename(tmp_path / "e.HEIC")
    (tmp_path / "f.jpg").rename(tmp_path / "f.jpe")
    (tmp_path / "README").write_text("no image")
    (tmp_path / "g.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    with pytest.warns(UserWarning, match=r"g\.heic"):
        source = open_images(tmp_path)
    assert ids(source) == ["a.jpg", "b.avif", "blob", "d.jfif", "e.HEIC", "f.jpe"]
    assert [Path(path).name for path, _ in source.skipped] == ["g.heic"]
    assert len(tensor(source)) == 6


def test_broken_files_are_counted_named_and_skipped(tmp_path):
    fill(tmp_path, ["fine.png", "other.jpg"], (64, 64))
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "none.gif").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")  # it was waited for, for ever
    with pytest.warns(UserWarning, match=r"phone\.heic") as caught:
        source = open_images(tmp_path)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert [item["id"] for item in source] == ["fine.png", "other.jpg"]
    assert len(caught) == 1
    named = {Path(path).name for path, _ in source.skipped}
    assert named == {"text.png", "none.gif", "phone.heic", "gone.jpg", "pipe.jpg"}


@pytest.fixture
def read_by_threads(monkeypatch):
    monkeypatch.setattr("backsight.data.images.available_cores", lambda: 3)
    monkeypatch.setattr("backsight.data.images.WORTH_WORKERS", 0)


@pytest.mark.parametrize("threads", [False, True])
def test_what_breaks_later_is_skipped_and_named_once(tmp_path, threads, request):
    if threads:
        request.getfixturevalue("read_by_threads")
    fill(tmp_path, [f"{i}.jpg" for i in range(7)], (40, 30))
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:-20])
    source = open_images(tmp_path, None, (4, 6))
    assert source.skipped == []
    with pytest.warns(UserWarning, match=r"3\.jpg") as caught:
        shapes = [[len(batch) for batch in batches(source, 2)] for _ in range(2)]
    assert shapes == [[2, 1, 2, 1]] * 2
    assert len(caught) == 1
    assert [Path(path).name for path, _ in source.skipped] == ["3.jpg"]
    assert len(list(source)) == 6
    assert tensor(source).shape == (6, 3, 4, 6)
    assert tensor(source, 4).shape == (4, 3, 4, 6)
    with pytest.raises(ImageError):
        source[3]


@pytest.mark.parametrize("steps", [None, 5])
def test_a_source_that_breaks_altogether_ends_with_an_error(tmp_path, steps):
    fill(tmp_path, ["a.png", "b.png"])
    source = open_images(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("broken")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(SourceError, match=r"b\.png"):
        list(batches(source, 1, steps=steps))


# ---------------------------------------------------------------------------------------------------------- splits


def test_a_plain_folder_is_cut_by_the_names_alone(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(60)], (2, 2))
    parts = by_split(tmp_path)
    assert sorted(chain(*parts.values())) == sorted(ids(open_images(tmp_path, "all")))
    assert [len(part) for part in parts.values()] == [48, 5, 7]
    assert parts["test"] == ["23.png", "27.png", "31.png", "41.png", "49.png", "5.png", "59.png"]
    few = fill(tmp_path / "few", ["a.png"])
    for split in ("validation", "test"):
        with pytest.raises(SourceError, match=rf"'{split}'.*split='all'"):
            open_images(few, split)


def test_a_count_is_a_seeded_choice_that_grows(tmp_path):
    fill(tmp_path, [f"{i:02}.png" for i in range(20)], (2, 2))
    few = ids(open_images(tmp_path, count=5, seed=3))
    more = ids(open_images(tmp_path, count=9, seed=3))
    assert few == ["03.png", "08.png", "12.png", "16.png", "18.png"]
    assert set(few) < set(more)
    assert more == sorted(more)
    assert ids(open_images(tmp_path, count=5, seed=4)) != few
    assert len(open_images(tmp_path, count=500)) == 20


@pytest.mark.parametrize(
    "names",
    [
        *(("train", "val", "test"), ("Train", "Valid", "Test"), ("training", "validation", "testing")),
        *(("training_set", "val_set", "test_set"), ("seg_train", "seg_val", "seg_test"), ("train1", "val1", "test1")),
    ],
)
@pytest.mark.parametrize("below", ["", "images/"])
def test_declared_splits_are_kept(tmp_path, names, below):
    """As Roboflow, Kaggle, fastai and YOLO lay them out; labels, notes and a picture beside them change nothing."""
    for name, count in zip(names, (20, 5, 4), strict=True):
        fill(tmp_path, [f"{below}{name}/images/{i}.jpg" for i in range(count)])
        (tmp_path / below / name / "labels").mkdir()
        (tmp_path / below / name / "labels" / "0.txt").write_text("0 0.5 0.5 1 1")
    fill(tmp_path, [f"{below}cover.png"])
    with pytest.warns(UserWarning, match=r"cover\.png"):
        parts = by_split(tmp_path)
    assert {split: {id.split("/")[0] for id in part} for split, part in parts.items()} == {
        split: {name} for split, name in zip(SPLITS, names, strict=True)
    }
    assert [len(part) for part in parts.values()] == [20, 5, 4]
    with pytest.warns(UserWarning, match=r"cover\.png"):
        everything = open_images(tmp_path, "all", 8)
    assert len(everything) == 29
    assert everything.classes == ()


def test_annotations_that_split_one_folder_are_refused(tmp_path):
    """As CVAT and MMDetection lay them out: cut anew, images of one's validation file were trained on."""
    fill(tmp_path, [f"images/{i}.png" for i in range(9)])
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text('{"images": [], "categories": []}')
    with pytest.raises(SourceError, match="a folder of its own"):
        open_images(tmp_path, "train")
    assert len(open_images(tmp_path, "all")) == 9


def test_pictures_that_are_not_opened_are_named(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(9)])
    for name in ("old.tga", "site.ico", "notes.txt"):
        (tmp_path / name).write_bytes(b"some bytes")
    with pytest.warns(UserWarning, match="2 files skipped"):
        source = open_images(tmp_path, "all")
    assert {path.rsplit("/", 1)[-1] for path, _ in source.skipped} == {"old.tga", "site.ico"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_no_shard(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(9)])
    os.mkfifo(tmp_path / "train.tar")  # it once was waited for without end
    assert len(open_images(tmp_path, "all")) == 9


def test_held_out_images_never_enter_the_training_part(tmp_path):
    fill(tmp_path, [f"{part}/{i}.png" for part in ("valid", "test") for i in range(9)])
    assert len(open_images(tmp_path, "validation")) == len(open_images(tmp_path, "test")) == 9
    with pytest.raises(SourceError, match="'train'"):
        open_images(tmp_path, "train")
    fill(tmp_path, [f"two/{part}/{i}.png" for part in ("train", "valid") for i in range(30)])
    parts = by_split(tmp_path / "two")
    assert [len(part) for part in parts.values()] == [27, 3, 30]
    assert all(id.startswith("valid/") for id in parts["test"])


@pytest.mark.parametrize(
    "files",
    [
        [f"archive/{part}/{i}.png" for part in ("train", "val", "test") for i in range(5)],
        [f"{kind}/{part}/{i}.png" for kind in ("cats", "dogs") for part in ("train", "test") for i in range(5)],
        [f"{part}/{i}.png" for part in ("test", "more") for i in range(9)],
    ],
)
def test_splits_that_are_declared_further_down_are_not_cut_anew(tmp_path, files):
    fill(tmp_path, files)
    for split in SPLITS:
        with pytest.raises(SourceError, match="side by side"):
            open_images(tmp_path, split)
    assert len(open_images(tmp_path)) == len(files)


def test_a_folder_beside_the_declared_splits_is_named(tmp_path):
    fill(tmp_path, [f"{part}/{i}.png" for part in ("train_images", "test_images", "dev") for i in range(9)])
    with pytest.warns(UserWarning, match="dev"):
        parts = by_split(tmp_path)
    assert {id.split("/")[0] for id in parts["test"]} == {"test_images"}
    assert {id.split("/")[0] for id in parts["train"]} == {"train_images"}


def test_class_folders_are_read_as_imagenet(tmp_path):
    fill(
        tmp_path, [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("n01", "n02") for i in range(30)]
    )
    fill(tmp_path, ["test/1.png", "val/n03/1.png"])  # the test images have no classes; n03 is known from val alone
    for junk in ("__MACOSX", "empty"):
        (tmp_path / "train" / junk).mkdir()
    train, validation, test = (open_images(tmp_path, split=split) for split in SPLITS)
    assert open_images(tmp_path).split == "test"
    assert train.classes == test.classes == ("n01", "n02", "n03")
    assert [len(source) for source in (train, validation, test)] == [54, 6, 61]
    assert not set(ids(train)) & set(ids(validation))
    assert all(item["id"].startswith(f"val/{test.classes[item['label']]}/") for item in test)
    assert len(open_images(tmp_path, split="all")) == 121


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (lambda folder: folder / "absent", {}, "absent"),
        (lambda folder: "scene", {}, "nearest: scenes"),
        (lambda folder: "", {}, "there are: scenes"),
        (lambda folder: "~nobody/photographs", {}, "~nobody"),
        (lambda folder: folder, {}, "nothing"),
        (lambda folder: (folder / "a.TXT").write_text("") or folder, {}, r"\.txt \(1\)"),
        (lambda folder: (folder / "a.png").touch() or folder / "a.png", {}, r"a\.png"),
        (lambda folder: fill(folder, ["a.png"]), {"split": "val"}, "'val'.*validation"),
        (lambda folder: fill(folder, ["a.png"]), {"target_or_size": (0, 3)}, r"\(0, 3\)"),
        (lambda folder: fill(folder, ["a.png"]), {"target_or_size": "64"}, "'64'"),
        (lambda folder: fill(folder, ["a.png"]), {"count": 0}, "0"),
        (lambda folder: fill(folder, ["a.png"]), {"masks": True}, "no masks"),
        (lambda folder: fill(folder, ["train/a.png"]), {"split": "test"}, "'test'.*train"),
        (lambda folder: "scenes", {"split": "all"}, "'all'"),
        (lambda folder: "photographs", {"masks": True}, "no masks"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, make, arguments, said):
    with pytest.raises(SourceError, match=said) as caught:
        open_images(make(tmp_path), **arguments)
    assert "\n" not in str(caught.value)


def test_photographs_are_ten_offline_and_split_by_photograph():
    parts = [ids(open_images("photographs", split, (48, 80))) for split in SPLITS]
    assert sorted(chain(*parts)) == sorted(PHOTOGRAPHS)
    everything = open_images("photographs", "all", (48, 80))
    assert ids(everything) == list(PHOTOGRAPHS)
    assert tensor(everything).shape == (10, 3, 48, 80)
    assert open_images("photographs").split == "test"
    with pytest.raises(BacksightError, match="astronaut"):
        photograph("astronut")


# --------------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def numbered(tmp_path):
    """Ten images whose red level is 20 times their number."""
    for number in range(10):
        Image.new("RGB", (6, 4), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return open_images(tmp_path, None, (4, 6))


def numbers(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0, 0, 0] * 255 / 20).round().int().tolist()


def test_one_pass_keeps_the_last_partial_batch(numbered):
    found = list(batches(numbered, 4))
    assert [numbers(batch) for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (found[0].dtype, found[0].shape) == (torch.float32, (4, 3, 4, 6))
    assert found[2].max() == pytest.approx(180 / 255)
    assert len(list(batches(numbered, 1))) == 10
    assert numbers(next(batches(numbered.subset(slice(1, None, 3)), 9))) == [1, 4, 7]


def test_epochs_are_shuffled_anew_and_complete(numbered):
    drawn = list(chain(*(numbers(batch) for batch in batches(numbered, 5, shuffle_seed=1, steps=4))))
    assert drawn[:10] == [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]
    assert sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert [len(batch) for batch in batches(numbered, 23, steps=2)] == [23, 23]


@pytest.mark.parametrize("steps", [None, 9])
def test_batches_are_the_same_from_threads_tensors_and_a_later_start(numbered, steps, request):
    expected = [numbers(batch) for batch in batches(numbered, 3, shuffle_seed=5, steps=steps)]
    request.getfixturevalue("read_by_threads")
    assert [numbers(b) for b in batches(numbered, 3, shuffle_seed=5, steps=steps)] == expected
    assert [numbers(b) for b in batches(tensor(numbered), 3, shuffle_seed=5, steps=steps)] == expected
    assert [numbers(b) for b in batches(numbered, 3, shuffle_seed=5, steps=steps, start=2)] == expected[2:]
    assert list(batches(numbered, 3, steps=2, start=2)) == []


def test_outside_randomness_is_not_touched(numbered, read_by_threads):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    list(batches(numbered, 3, shuffle_seed=5))
    open_images(Path(numbered.entries[0].path).parent, count=3, seed=7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_tensor_stacks_and_limits(numbered):
    assert numbers(tensor(numbered, 3)) == [0, 1, 2]
    assert tensor(numbered, 99).shape == (10, 3, 4, 6)
    levels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal((tensor(levels) * 255).round(), levels.float())


@pytest.mark.parametrize(
    "call",
    [
        lambda: batches(torch.zeros(0, 3, 4, 4), 1),
        lambda: batches(torch.zeros(2, 3, 4, 4), 0),
        lambda: tensor(torch.zeros(0, 3, 4, 4)),
    ],
)
def test_bad_batches_are_refused_at_the_call(call):
    with pytest.raises(SourceError):
        call()
