"""Every file format becomes the right RGB, splits share nothing, and what cannot be read is named."""

import json
import multiprocessing
import os
import random
import signal
import struct
import warnings
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import backsight
from backsight.data import images as data
from backsight.data.images import ImageError, SourceError, batches, open_images, read_rgb, tensor
from backsight.errors import BacksightError
from backsight.scenes.photographs import PHOTOGRAPHS, PhotographError, photograph

COCO = Path(backsight.__file__).parents[2].parent / "shared" / "data" / "coco_sample"
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="the COCO sample is not beside the project")

# 3 x 2 pixels with colours that no channel swap, rotation or flip maps onto themselves
RGB = np.array(
    [[[200, 30, 10], [20, 180, 40]], [[10, 20, 220], [240, 230, 15]], [[90, 0, 130], [255, 255, 255]]], np.uint8
)
GREY = np.array([[0, 64, 128], [192, 255, 17]], np.uint8)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def flat(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


# ------------------------------------------------------------------------------------------------ one file to RGB


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "ppm"])
def test_rgb_is_read_as_written(tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if extension == "webp" else {}))
    pixels = read_rgb(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, RGB)


@pytest.mark.parametrize("extension", ["png", "tiff", "gif", "bmp"])
def test_grey_is_repeated(tmp_path, extension):
    path = tmp_path / f"grey.{extension}"
    Image.fromarray(GREY).save(path)
    np.testing.assert_array_equal(read_rgb(path), repeated(GREY))


def test_black_and_white_is_0_and_255(tmp_path):
    path = tmp_path / "bits.png"
    Image.fromarray(GREY > 100).save(path)
    np.testing.assert_array_equal(read_rgb(path), repeated(np.where(GREY > 100, 255, 0).astype(np.uint8)))


def test_transparency_lies_over_white(tmp_path):
    path = tmp_path / "clear.png"
    image = Image.merge("RGBA", (*Image.fromarray(RGB).split(), flat(255, (2, 3), "L")))
    image.putpixel((0, 0), (200, 30, 10, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth opaque
    image.save(path)
    expected = RGB.copy()
    expected[0, 0] = 255
    expected[0, 1] = 204
    np.testing.assert_array_equal(read_rgb(path), expected)


def test_grey_with_alpha_lies_over_white(tmp_path):
    path = tmp_path / "clear.png"
    image = flat((40, 255), (3, 2), "LA")
    image.putpixel((2, 1), (40, 0))
    image.save(path)
    pixels = read_rgb(path)
    assert pixels[1, 2].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [40, 40, 40]


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_transparency(tmp_path, extension):
    path = tmp_path / f"palette.{extension}"
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").copy()
    image = Image.frombytes("P", (3, 1), image.tobytes())
    image.putpalette([250, 0, 0, 0, 120, 0, 0, 0, 60])
    image.save(path, transparency=1)
    assert read_rgb(path).tolist() == [[[250, 0, 0], [255, 255, 255], [0, 0, 60]]]


def test_a_grey_level_declared_transparent(tmp_path):
    levels = np.array([[0, 1000, 65535]], np.uint16)
    path = tmp_path / "key.png"
    Image.fromarray(levels).save(path, transparency=1000)
    assert read_rgb(path)[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    levels = np.array([[0, 257, 32896, 65535], [128, 129, 50000, 12345]], np.uint16)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(levels).save(path)
    np.testing.assert_array_equal(read_rgb(path), repeated(np.round(levels / 257).astype(np.uint8)))


@pytest.mark.parametrize(("byteorder", "photometric"), [("<", "minisblack"), (">", "minisblack"), ("<", "miniswhite")])
def test_16_bit_grey_tiff_of_either_polarity(tmp_path, byteorder, photometric):
    levels = np.array([[0, 257, 32896, 65535], [0, 514, 50000, 12345]], np.uint16)
    path = tmp_path / "deep.tiff"
    tifffile.imwrite(path, levels, photometric=photometric, byteorder=byteorder)
    expected = np.round(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(path), repeated(255 - expected if "white" in photometric else expected))


def test_16_bit_rgb(tmp_path):
    deep = RGB.astype(np.uint16) * 257
    path = tmp_path / "deep.tiff"
    tifffile.imwrite(path, deep, photometric="rgb")
    np.testing.assert_array_equal(read_rgb(path), RGB)
    path = tmp_path / "deep.png"
    path.write_bytes(png(deep, 16, 2, deep.astype(">u2").reshape(len(deep), -1)))
    np.testing.assert_array_equal(read_rgb(path), RGB)


def test_16_bit_planes_that_pillow_misreads_are_refused(tmp_path):
    path = tmp_path / "planes.tiff"
    tifffile.imwrite(path, np.full((3, 4, 5), 500, np.uint16), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="separate planes"):
        read_rgb(path)


def test_a_transparent_colour_in_the_depth_of_the_file(tmp_path):
    path = tmp_path / "key.png"
    deep = np.array([[[0x1234, 0x5678, 0x9ABC], [0x34FF, 0x78FF, 0xBCFF]]], np.uint16)
    path.write_bytes(png(deep, 16, 2, deep.astype(">u2").reshape(1, -1), key=(0x1234, 0x5678, 0x9ABC)))
    assert read_rgb(path).tolist() == [[[255, 255, 255], [0x34, 0x78, 0xBC]]]
    path.write_bytes(png(np.zeros((1, 2)), 4, 0, np.array([[0x3A]], np.uint8), key=(3,)))
    assert read_rgb(path)[0, :, 0].tolist() == [255, 170]


def png(values: np.ndarray, bits: int, colour_type: int, rows: np.ndarray, key: tuple[int, ...] = ()) -> bytes:
    """A PNG that Pillow itself cannot write; values give the size, rows the packed samples."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour_type, 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    packed = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + packed + chunk(b"IEND", b"")


def test_float_samples_in_the_unit_range(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(path)
    assert read_rgb(path)[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [np.array([[0.0, 300.0]], np.float32), np.array([[0, 70000]], np.int32)])
def test_samples_without_a_white_are_refused(tmp_path, values):
    path = tmp_path / "odd.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(ImageError, match="white"):
        read_rgb(path)


@pytest.mark.parametrize("extension", ["jpg", "tiff"])
def test_cmyk(tmp_path, extension):
    """A JPEG of Adobe's kind stores the inks inverted, a TIFF does not; both are the same red."""
    path = tmp_path / f"inks.{extension}"
    flat((0, 255, 255, 0), (16, 16), "CMYK").save(path, **({"quality": 100} if extension == "jpg" else {}))
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    if extension == "jpg":
        assert b"Adobe" in path.read_bytes()
    np.testing.assert_allclose(read_rgb(path), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=3)


def test_cmyk_with_a_broken_profile_is_read_without_it(tmp_path):
    path = tmp_path / "inks.tiff"
    flat((0, 0, 0, 255), (4, 4), "CMYK").save(path, icc_profile=b"no profile")
    assert read_rgb(path).max() == 0


def test_cmyk_with_a_profile_of_another_colour_space_is_read_without_it(tmp_path):
    path = tmp_path / "inks.tiff"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    flat((255, 0, 0, 0), (4, 4), "CMYK").save(path, icc_profile=profile)
    assert read_rgb(path)[0, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tiff", "webp"])
def test_exif_orientation(tmp_path, orientation, extension):
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB),
        7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    Image.fromarray(np.ascontiguousarray(stored)).save(
        path, exif=exif, **({"lossless": True} if extension == "webp" else {})
    )
    np.testing.assert_array_equal(read_rgb(path), RGB)


def test_first_frame_of_an_animation(tmp_path):
    path = tmp_path / "film.gif"
    flat((255, 0, 0)).save(path, save_all=True, append_images=[flat((0, 0, 255))])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert (read_rgb(path) == [255, 0, 0]).all()


def test_jpeg_within_its_own_error(tmp_path):
    path = tmp_path / "image.jpg"
    flat((200, 30, 60), (17, 9)).save(path, quality=95)
    pixels = read_rgb(path)
    assert pixels.shape == (9, 17, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to([200, 30, 60], pixels.shape), atol=4)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: there is no such file"):
        read_rgb(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(BacksightError, match=r"text\.png"):
        read_rgb(tmp_path / "text.png")


# -------------------------------------------------------------------------------------------------------- geometry


@pytest.fixture
def half_and_half(tmp_path):
    """One image 40 high, 120 wide: red, green and blue thirds."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    for third in range(3):
        pixels[:, 40 * third : 40 * (third + 1), third] = 255
    Image.fromarray(pixels).save(tmp_path / "thirds.png")
    return tmp_path


def test_crop_keeps_the_centre(half_and_half):
    image = open_images(half_and_half, size=(20, 20))[0]["image"]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 20)
    assert (image[1, :, 2:-2] == 255).all()
    assert image[[0, 2], :, 2:-2].max() == 0
    assert image[1].min() > 200  # resized before the cut: the filter sees a little across the edge


def test_stretch_shows_everything(half_and_half):
    image = open_images(half_and_half, size=(48, 81), fit="stretch", interpolation="nearest")[0]["image"]
    assert image.shape == (3, 48, 81)
    assert (image[0, :, :27] == 255).all()
    assert (image[2, :, 54:] == 255).all()


def test_pad_keeps_the_aspect_and_tells_where(half_and_half):
    item = open_images(half_and_half, size=(48, 60), fit="pad")[0]
    assert item["image"].shape == (3, 48, 60)
    assert item["padding"].shape == (48, 60)
    assert not item["padding"][:20].any()
    assert item["padding"][20:].all()
    assert (item["image"][:, 20:] == 0).all()
    assert (item["image"][:, :20].amax(0) > 120).all()


def test_an_image_of_the_right_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    for fit in ("crop", "pad", "stretch"):
        image = open_images(tmp_path, size=(48, 80), fit=fit)[0]["image"]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_downsampling_is_antialiased(tmp_path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(repeated(board.astype(np.uint8))).save(tmp_path / "board.png")
    image = open_images(tmp_path, size=16, interpolation="bilinear")[0]["image"].float()
    assert (image - 127.5).abs().max() < 8


sides = st.integers(1, 700)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 130), st.integers(1, 130), st.sampled_from(["crop", "pad", "stretch"]))
def test_frames_stay_inside_image_and_result(height, width, rows, columns, fit):
    placed = data.frame(height, width, (rows, columns), fit)
    left, top, right, bottom = placed.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert 1 <= placed.content[0] <= rows
    assert 1 <= placed.content[1] <= columns
    across, down = placed.scale
    if fit == "crop":
        assert across == pytest.approx(down, rel=1e-6)
        assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    elif fit == "pad":
        assert placed.content[0] == rows or placed.content[1] == columns
    masks = data._framed_masks(np.ones((1, height, width), bool), placed)
    assert masks.sum() == placed.content[0] * placed.content[1]


# --------------------------------------------------------------------------------------------------------- folders


def fill(folder: Path, names, size=(8, 8)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        flat((number * 7 % 256, 50, 100), size).save(folder / name)
    return folder


def ids(source) -> list[str]:
    return [item["id"] for item in source]


def test_a_folder_is_searched_to_its_depths_in_stable_order(tmp_path):
    fill(tmp_path, ["b.png", "a/z.jpg", "a/B.JPG", "c/d/e.webp", ".hidden/x.png", "._b.png"])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "c" / "back").symlink_to(tmp_path)
    source = open_images(tmp_path)
    assert ids(source) == ["a/B.JPG", "a/z.jpg", "b.png", "c/d/e.webp"]
    assert source.split == "all"
    assert source.name == tmp_path.name
    assert source.skipped == []
    assert [item["index"] for item in source] == [0, 1, 2, 3]
    assert source[-1]["index"] == 3
    with pytest.raises(IndexError):
        source[4]


def test_splits_of_a_plain_folder_are_disjoint_and_complete(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(60)], (2, 2))
    parts = [ids(open_images(tmp_path, split=split, size=2)) for split in data.SPLITS]
    assert all(parts)
    assert len(parts[0]) > len(parts[1]) + len(parts[2])
    assert sorted(chain(*parts)) == sorted(ids(open_images(tmp_path, split="all", size=2)))


def test_a_count_is_a_seeded_choice_that_grows(tmp_path):
    fill(tmp_path, [f"{i:02}.png" for i in range(20)], (2, 2))
    few = ids(open_images(tmp_path, size=2, count=5, seed=3))
    more = ids(open_images(tmp_path, size=2, count=9, seed=3))
    assert len(few) == 5
    assert set(few) < set(more)
    assert more == sorted(more)
    assert ids(open_images(tmp_path, size=2, count=5, seed=4)) != few
    assert len(open_images(tmp_path, size=2, count=500)) == 20


def test_broken_files_are_counted_named_and_skipped(tmp_path):
    fill(tmp_path, ["fine.png", "cut.jpg", "other.jpg"], (64, 64))
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "none.gif").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0" * 20)
    with pytest.warns(UserWarning, match="4 files skipped") as caught:
        source = open_images(tmp_path)
    assert len(caught) == 1
    assert ids(source) == ["fine.png", "other.jpg"]
    assert {Path(path).name for path, _ in source.skipped} == {"cut.jpg", "text.png", "none.gif", "phone.heic"}
    assert "truncated" in dict(source.skipped)[str(tmp_path / "cut.jpg")].lower()
    with pytest.warns(UserWarning, match="skipped"):
        assert len(open_images(tmp_path, count=2)) == 2  # readable ones make up for what is broken


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_photograph_cut_anywhere_is_found_at_open(tmp_path, share):
    Image.fromarray(photograph("chelsea")).save(tmp_path / "cut.jpg")
    fill(tmp_path, ["fine.png"])
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * share)])
    with pytest.warns(UserWarning, match=r"cut\.jpg"):
        assert ids(open_images(tmp_path)) == ["fine.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_large_sources_are_verified_as_they_are_read(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data, "VERIFIED_AT_OPEN", 3)
    fill(tmp_path, [f"{i}.png" for i in range(7)], (4, 4))
    (tmp_path / "3.png").write_text("broken")
    source = open_images(tmp_path, size=4)
    assert len(source) == 7
    assert source.skipped == []
    with pytest.warns(UserWarning, match=r"3\.png") as caught:
        sizes = [[len(batch) for batch in batches(source, 2, workers=number)] for number in (workers, 0)]
    assert sizes == [[2, 1, 2, 1]] * 2
    assert len(caught) == 1
    assert [Path(path).name for path, _ in source.skipped] == ["3.png"]
    assert len(ids(source)) == 6
    assert tensor(source).shape == (6, 3, 4, 4)
    assert tensor(source, 4).shape == (4, 3, 4, 4)
    with pytest.raises(ImageError):
        source[3]


@pytest.mark.parametrize("steps", [None, 5])
def test_a_source_that_breaks_altogether_ends_with_an_error(tmp_path, steps):
    fill(tmp_path, ["a.png", "b.png"])
    source = open_images(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("broken")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(SourceError, match="none of the images"):
        list(batches(source, 1, steps=steps))


def test_train_and_val_folders_of_classes_are_read_as_imagenet(tmp_path):
    fill(
        tmp_path, [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("n01", "n02") for i in range(30)]
    )
    fill(tmp_path, ["test/1.png"])
    train, validation, test = (open_images(tmp_path, split=split, size=8) for split in data.SPLITS)
    assert open_images(tmp_path).split == "test"
    assert train.classes == ("n01", "n02")
    assert len(test) == 60
    assert len(train) + len(validation) == 60
    assert len(validation) > 0
    assert not set(ids(train)) & set(ids(validation))
    assert all(item["id"].startswith(f"val/{test.classes[item['label']]}/") for item in test)
    assert len(open_images(tmp_path, split="all")) == 120


def test_split_folders_are_taken_as_they_are(tmp_path):
    fill(tmp_path, ["train/1.png", "val/2.png", "test/3.png"])
    assert [ids(open_images(tmp_path, split=split)) for split in data.SPLITS] == [
        ["train/1.png"],
        ["val/2.png"],
        ["test/3.png"],
    ]


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (lambda folder: folder / "absent", {}, "there is no folder"),
        (lambda folder: "scene", {}, "did you mean 'scenes'"),
        (lambda folder: folder, {}, "is empty: put images"),
        (lambda folder: (folder / "a.TXT").write_text("") or folder, {}, r"holds no images, only \.txt \(1\)"),
        (lambda folder: (folder / "a.png").touch() or folder / "a.png", {}, "is a file"),
        (lambda folder: fill(folder, ["a.png"]), {"split": "val"}, r"no split 'val' \(nearest: 'validation'\)"),
        (lambda folder: fill(folder, ["a.png"]), {"fit": "squash"}, "no fit 'squash'"),
        (lambda folder: fill(folder, ["a.png"]), {"interpolation": "cubic"}, "nearest: 'bicubic'"),
        (lambda folder: fill(folder, ["a.png"]), {"size": (0, 3)}, "size is"),
        (lambda folder: fill(folder, ["a.png"]), {"size": "64"}, "size is"),
        (lambda folder: fill(folder, ["a.png"]), {"count": 0}, "count is 0"),
        (lambda folder: fill(folder, ["a.png"]), {"masks": True}, "has no masks"),
        (lambda folder: fill(folder, ["a.png"]), {"options": object()}, "options are for"),
        (lambda folder: fill(folder, ["train/a.png"]), {"split": "test"}, "no folder for split 'test'"),
        (lambda folder: fill(folder, ["train2017/a.png"]), {"split": "test"}, r"download val2017\.zip"),
        (lambda folder: fill(folder, ["val2017/a.png"]), {"masks": True}, r"annotations_trainval2017\.zip"),
        (lambda folder: "scenes", {"split": "all"}, "no split of scenes 'all'"),
        (lambda folder: "photographs", {"masks": True}, "has no masks"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, make, arguments, said):
    with pytest.raises(SourceError, match=said) as caught:
        open_images(make(tmp_path), **arguments)
    assert "\n" not in str(caught.value)


def test_a_small_folder_with_an_empty_split_says_so(tmp_path):
    fill(tmp_path, ["a.png"])
    empty = [split for split in data.SPLITS if not data._Part(tmp_path, *data._THREE_WAY[split]).holds("a.png")]
    for split in empty:
        with pytest.raises(SourceError, match="split='all'"):
            open_images(tmp_path, split=split)
    assert len(empty) == 2


def test_a_folder_in_which_nothing_can_be_read(tmp_path):
    (tmp_path / "a.png").write_text("broken")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(SourceError, match="none of the 1 images"):
        open_images(tmp_path)


# ----------------------------------------------------------------------------------------------------- photographs


def test_photographs_are_ten_and_offline():
    assert len(PHOTOGRAPHS) == 10
    for name in PHOTOGRAPHS:
        pixels = photograph(name)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= 300
        assert not pixels.flags.writeable
    with pytest.raises(PhotographError, match="nearest: astronaut"):
        photograph("astronut")


def test_photographs_split_by_photograph():
    parts = [ids(open_images("photographs", split=split, size=(48, 80))) for split in data.SPLITS]
    assert sorted(chain(*parts)) == sorted(PHOTOGRAPHS)
    everything = open_images("photographs", split="all", size=(48, 80))
    assert ids(everything) == list(PHOTOGRAPHS)
    assert tensor(everything).shape == (10, 3, 48, 80)
    assert open_images("photographs").split == "test"


# ---------------------------------------------------------------------------------------------------- scenes, COCO


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    return tmp_path


def test_scenes_and_their_truth(scenes, capsys):
    from backsight.scenes.render import CLASS_NAMES, render

    source = open_images("scenes", split="test", size=(32, 32), count=6, masks=True)
    assert capsys.readouterr().out == ""
    assert len(source) == 6
    assert source.classes == CLASS_NAMES
    for index, item in enumerate(source):
        truth = render("test", index, size=32)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), truth.image)
        np.testing.assert_array_equal(item["masks"].numpy(), truth.masks)
        np.testing.assert_array_equal(item["labels"].numpy(), truth.labels)
        expected = np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], 1)
        np.testing.assert_allclose(item["boxes"].numpy(), expected)
        assert item["boxes"].dtype == torch.float32
        assert not item["crowd"].any()


def test_scenes_of_another_shape_and_options(scenes):
    from backsight.scenes.render import SceneOptions

    plain = open_images("scenes", size=(16, 24), count=3)
    grey = open_images("scenes", size=(16, 24), count=3, options=SceneOptions(grey=True))
    assert plain[0]["image"].shape == (3, 16, 24)
    assert "masks" not in plain[0]
    assert not torch.equal(tensor(plain), tensor(grey))


def annotated(folder: Path, annotations, size=(40, 30), name="1.png", listed=None, exif=None) -> Path:
    """A COCO root with one image (width, height = size) in val2017."""
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    Image.new("RGB", size).save(folder / "val2017" / name, **({"exif": exif} if exif else {}))
    images = [{"id": 1, "file_name": name, "width": size[0], "height": size[1]}]
    images += [{"id": 2, "file_name": other, "width": 4, "height": 4} for other in listed or ()]
    content = {
        "images": images,
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "iscrowd": 0} | a for i, a in enumerate(annotations)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
    }
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder


SQUARE = {"segmentation": [[4, 6, 14, 6, 14, 16, 4, 16]], "bbox": [4, 6, 10, 10]}


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        ("stretch", (60, 40), [4, 12, 14, 32]),
        ("pad", (60, 60), [6, 9, 21, 24]),
        ("pad", (15, 80), [2, 3, 7, 8]),
        ("crop", (30, 30), [0, 6, 9, 16]),  # 5 columns are cut off on the left
        ("crop", (15, 15), [0, 3, 4.5, 8]),
    ],
)
def test_boxes_and_masks_follow_the_image(tmp_path, fit, size, box):
    item = open_images(annotated(tmp_path, [SQUARE]), size=size, fit=fit, masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx(box)
    assert item["masks"].shape == (1, *size)
    assert item["masks"].dtype == torch.bool
    assert item["masks"].sum().item() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=0.15)
    assert item["labels"].tolist() == [1]  # "ant" (3) comes before "cat" (7)


def test_run_length_crowds_and_what_the_crop_leaves_out(tmp_path):
    crowd = {
        "segmentation": {"size": [30, 40], "counts": [30 * 20, 30 * 4, 30 * 16]},
        "bbox": [20, 0, 4, 30],
        "iscrowd": 1,
    }
    outside = {"segmentation": [[0, 0, 3, 0, 3, 9, 0, 9]], "bbox": [0, 0, 3, 9]}
    item = open_images(annotated(tmp_path, [outside, crowd]), size=30, masks=True)[0]
    assert item["crowd"].tolist() == [True]
    assert item["boxes"].tolist() == [[15, 0, 19, 30]]
    assert item["masks"][0].sum() == 4 * 30


def test_a_cut_box_shrinks_to_what_is_seen(tmp_path):
    """An L whose upright is cut away: only the foot, at the bottom, is left."""
    ell = {"segmentation": [[0, 0, 4, 0, 4, 26, 20, 26, 20, 30, 0, 30]], "bbox": [0, 0, 20, 30]}
    item = open_images(annotated(tmp_path, [ell]), size=30, masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx([0, 26, 15, 30], abs=1)


def test_an_image_without_objects_has_empty_truth(tmp_path):
    item = open_images(annotated(tmp_path, []), size=(7, 5), masks=True)[0]
    assert item["masks"].shape == (0, 7, 5)
    assert item["boxes"].shape == (0, 4)
    assert item["labels"].shape == (0,)


def test_annotations_made_without_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    item = open_images(annotated(tmp_path, [SQUARE], exif=exif), size=(30, 40), masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx([4, 6, 14, 16])


def test_files_and_annotations_that_do_not_match_are_named(tmp_path):
    annotated(tmp_path, [SQUARE], listed=["gone.png"])
    flat((1, 2, 3)).save(tmp_path / "val2017" / "extra.png")
    with pytest.warns(UserWarning, match="2 files skipped"):
        source = open_images(tmp_path, masks=True)
    assert ids(source) == ["1"]
    assert {Path(path).name: reason.split(",")[0] for path, reason in source.skipped} == {
        "extra.png": "instances_val2017.json does not list it",
        "gone.png": "listed in instances_val2017.json",
    }


def test_a_malformed_annotation_or_file_is_named(tmp_path):
    annotated(tmp_path, [{"segmentation": [], "bbox": [0, 0, 1, 1]}])
    source = open_images(tmp_path, masks=True)
    with pytest.raises(ImageError, match="annotation 0 in instances_val2017"):
        source[0]
    with pytest.warns(UserWarning, match="malformed"):
        assert list(source) == []
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(SourceError, match="is not a COCO instances file"):
        open_images(tmp_path, masks=True)


@needs_coco
def test_coco_splits_are_disjoint(capsys):
    parts = {split: open_images(COCO, split=split, size=32, masks=True) for split in data.SPLITS}
    names = {split: {entry.id for entry in part.entries} for split, part in parts.items()}
    assert capsys.readouterr().out == ""
    assert len(names["test"]) == 80
    assert len(names["train"]) + len(names["validation"]) == 80
    assert names["validation"]
    assert not names["train"] & names["validation"]
    assert not names["test"] & (names["train"] | names["validation"])
    assert len(parts["test"].classes) == 80
    plain = open_images(COCO, split="validation", size=32)
    assert {entry.id for entry in plain.entries} == names["validation"]


@needs_coco
@pytest.mark.parametrize(("fit", "size"), [("crop", (224, 224)), ("pad", (240, 321)), ("stretch", (130, 200))])
def test_coco_masks_agree_with_boxes(fit, size):
    source = open_images(COCO, size=size, count=16, fit=fit, masks=True)
    gaps = []
    for item in source:
        assert item["image"].shape == (3, *size)
        for mask, box in zip(item["masks"], item["boxes"], strict=True):
            rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
            tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            assert (box[:2] >= 0).all()
            assert box[2] <= size[1]
            assert box[3] <= size[0]
            assert (tight[:2] >= box[:2] - 1.5).all()
            assert (tight[2:] <= box[2:] + 1.5).all()
            gaps.append((tight - box).abs().max().item())
    # Parts thinner than a pixel of the frame may be missed by the nearest neighbour, so not every gap is small.
    assert len(gaps) > 60
    assert np.mean(np.array(gaps) <= 1.5) > 0.9


# --------------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def numbered(tmp_path):
    """Ten images whose red level is 20 times their number."""
    for number in range(10):
        flat((20 * number, 0, 0), (6, 4)).save(tmp_path / f"{number}.png")
    return open_images(tmp_path, size=(4, 6))


def numbers(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0, 0, 0] * 255 / 20).round().int().tolist()


def test_one_pass_keeps_the_last_partial_batch(numbered):
    found = list(batches(numbered, 4))
    assert [numbers(batch) for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found[0].dtype == torch.float32
    assert found[0].shape == (4, 3, 4, 6)
    assert found[2].max() == pytest.approx(180 / 255)
    assert len(list(batches(numbered, 1))) == 10


def test_epochs_are_shuffled_anew_and_complete(numbered):
    drawn = list(chain(*(numbers(batch) for batch in batches(numbered, 5, shuffle_seed=1, steps=4))))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[:10] != list(range(10))


def test_full_batches_across_epochs_even_when_larger_than_the_source(numbered):
    assert [len(batch) for batch in batches(numbered, 4, shuffle_seed=0, steps=7)] == [4] * 7
    assert [len(batch) for batch in batches(numbered, 23, steps=2)] == [23, 23]


@pytest.mark.parametrize("steps", [None, 9])
def test_batches_are_the_same_from_workers_tensors_and_a_later_start(numbered, steps):
    expected = [numbers(batch) for batch in batches(numbered, 3, shuffle_seed=5, steps=steps)]
    assert [numbers(b) for b in batches(numbered, 3, shuffle_seed=5, steps=steps, workers=2)] == expected
    assert [numbers(b) for b in batches(tensor(numbered), 3, shuffle_seed=5, steps=steps)] == expected
    assert [numbers(b) for b in batches(numbered, 3, shuffle_seed=5, steps=steps, start=2)] == expected[2:]
    assert list(batches(numbered, 3, steps=2, start=2)) == []


def test_outside_randomness_is_not_touched(numbered):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    list(batches(numbered, 3, shuffle_seed=5, workers=1))
    open_images(Path(numbered.entries[0].path).parent, count=3, seed=7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_tensor_stacks_and_limits(numbered):
    stack = tensor(numbered, 3)
    assert stack.shape == (3, 3, 4, 6)
    assert numbers(stack) == [0, 1, 2]
    assert tensor(numbered, 99).shape[0] == 10
    levels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal((tensor(levels) * 255).round(), levels.float())


@pytest.mark.parametrize(
    "call",
    [
        lambda: batches(torch.zeros(2, 4, 4), 1),
        lambda: batches(torch.zeros(2, 3, 4, 4, dtype=torch.int64), 1),
        lambda: batches(torch.zeros(0, 3, 4, 4), 1),
        lambda: batches(torch.zeros(2, 3, 4, 4), 0),
        lambda: tensor(torch.zeros(0, 3, 4, 4)),
        lambda: tensor(torch.zeros(2, 3, 4, 4), 0),
    ],
)
def test_bad_batches_are_refused_at_the_call(call):
    with pytest.raises(SourceError):
        call()


def test_no_warning_without_a_reason(numbered):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(batches(numbered, 3))
        open_images("photographs", size=16)[0]


def test_a_killed_worker_is_one_sentence(numbered):
    """Killed between two batches, while the consumer computes: the next batches say so, and the consumer goes on."""
    before = {process.pid for process in multiprocessing.active_children()}
    handler = signal.getsignal(signal.SIGCHLD)
    stream = batches(numbered, 2, steps=100, workers=2)
    next(stream)
    workers = [process for process in multiprocessing.active_children() if process.pid not in before]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    assert signal.getsignal(signal.SIGCHLD) == handler
    with pytest.raises(SourceError, match=r"a process that reads .* ahead was killed .*fewer workers") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (4, 3), (64, 5)])
def test_automatic_workers_fit_the_machine_and_the_batches(numbered, monkeypatch, cores, workers):
    """Ten images in batches of two: never more than the five batches; and eight at most."""
    monkeypatch.setattr(data, "available_cores", lambda: cores)
    asked: list[int] = []
    monkeypatch.setattr(data, "_read_ahead", lambda reader, indices, number: asked.append(number) or iter(()))
    list(batches(numbered, 2, workers="auto"))
    list(batches(numbered, 2, workers="auto", steps=1000))
    assert asked == ([workers, min(cores - 1, 8)] if workers else [])


@pytest.mark.parametrize("workers", [-1, "many", 1.5])
def test_a_number_of_workers_that_is_none_is_refused(numbered, workers):
    with pytest.raises(SourceError, match="workers is"):
        batches(numbered, 2, workers=workers)


def test_a_stream_that_starts_behind_its_end_is_empty(tmp_path: Path) -> None:
    assert list(batches(torch.zeros(4, 3, 2, 2), 2, steps=3, start=5)) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    assert list(batches(open_images(tmp_path, "all", 8), 1, steps=2, start=3)) == []
