"""Every file format becomes the right RGB, and what cannot be read is named with its kind."""

import os
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from backsight.data.decode import ImageError, decode, read_rgb, refusal
from backsight.scenes.photographs import photograph

# 3 x 2 pixels with colours that no channel swap, rotation or flip maps onto themselves
RGB = np.array(
    [[[200, 30, 10], [20, 180, 40]], [[10, 20, 220], [240, 230, 15]], [[90, 0, 130], [255, 255, 255]]], np.uint8
)
GREY = np.array([[0, 64, 128], [192, 255, 17]], np.uint8)
DEEP = np.array([[0, 257, 32896, 65535], [0, 514, 50000, 12345]], np.uint16)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def flat(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "ppm"])
def test_rgb_is_read_as_written(tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if extension == "webp" else {}))
    np.testing.assert_array_equal(read_rgb(path), RGB)


@pytest.mark.parametrize("extension", ["jpg", "avif"])
def test_lossy_kinds_within_their_own_error(tmp_path, extension):
    flat((200, 30, 60), (17, 9)).save(tmp_path / f"image.{extension}", quality=95)
    pixels = read_rgb(tmp_path / f"image.{extension}")
    np.testing.assert_allclose(pixels, np.broadcast_to([200, 30, 60], (9, 17, 3)), atol=4)


@pytest.mark.parametrize("extension", ["png", "tiff", "gif"])
def test_grey_and_black_and_white(tmp_path, extension):
    Image.fromarray(GREY).save(path := tmp_path / f"grey.{extension}")
    np.testing.assert_array_equal(read_rgb(path), repeated(GREY))
    Image.fromarray(GREY > 100).save(path)
    np.testing.assert_array_equal(read_rgb(path), repeated(np.where(GREY > 100, 255, 0).astype(np.uint8)))


def test_transparency_lies_over_white(tmp_path):
    image = Image.merge("RGBA", (*Image.fromarray(RGB).split(), flat(255, (2, 3), "L")))
    image.putpixel((0, 0), (200, 30, 10, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth opaque
    image.save(tmp_path / "clear.png")
    expected = RGB.copy()
    expected[0, 0], expected[0, 1] = 255, 204
    np.testing.assert_array_equal(read_rgb(tmp_path / "clear.png"), expected)
    grey = flat((40, 255), (3, 2), "LA")
    grey.putpixel((2, 1), (40, 0))
    grey.save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png")[1, 1:].tolist() == [[40, 40, 40], [255, 255, 255]]


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_transparency(tmp_path, extension):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([250, 0, 0, 0, 120, 0, 0, 0, 60])
    image.save(path := tmp_path / f"palette.{extension}", transparency=1)
    assert read_rgb(path).tolist() == [[[250, 0, 0], [255, 255, 255], [0, 0, 60]]]


def test_16_bits_are_scaled_not_clipped(tmp_path):
    expected = np.round(DEEP / 257).astype(np.uint8)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(DEEP).save(tmp_path / name)
        np.testing.assert_array_equal(read_rgb(tmp_path / name), repeated(expected))
    for order in "<>":
        tifffile.imwrite(path := tmp_path / "deep.tiff", DEEP, photometric="minisblack", byteorder=order)
        np.testing.assert_array_equal(read_rgb(path), repeated(expected))
    tifffile.imwrite(path, RGB.astype(np.uint16) * 257, photometric="rgb")
    np.testing.assert_array_equal(read_rgb(path), RGB)
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tiff")
    assert read_rgb(tmp_path / "float.tiff")[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "how"),
    [
        (np.array([[0.0, 300.0]], np.float32), {}),
        (np.array([[0, 70000]], np.int32), {}),
        (np.full((4, 5), 500, np.uint16), {"photometric": "miniswhite"}),
        (np.full((3, 4, 5), 500, np.uint16), {"photometric": "rgb", "planarconfig": "separate"}),
        (np.full((4, 5), 0.5), {}),
        (np.full((4, 5, 3), 0.5, np.float32), {"photometric": "rgb"}),
    ],
)
def test_samples_that_would_be_misread_are_refused(tmp_path, values, how):
    tifffile.imwrite(tmp_path / "odd.tiff", values, **how)
    with pytest.raises(ImageError, match=r"odd\.tiff.*save it"):
        read_rgb(tmp_path / "odd.tiff")


@pytest.mark.parametrize("extension", ["jpg", "tiff"])
def test_cmyk(tmp_path, extension):
    """A JPEG of Adobe's kind stores the inks inverted, a TIFF does not; both are the same red."""
    path = tmp_path / f"inks.{extension}"
    flat((0, 255, 255, 0), (16, 16), "CMYK").save(path, **({"quality": 100} if extension == "jpg" else {}))
    np.testing.assert_allclose(read_rgb(path), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=3)


def profile(**primaries: tuple[float, float, float]) -> bytes:
    """sRGB's curves, and its name, with other primaries (XYZ)."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack(">I", content[128:132])[0]):
        entry = 132 + 12 * number
        if values := primaries.get(bytes(content[entry : entry + 4]).decode()):
            at = struct.unpack(">I", content[entry + 4 : entry + 8])[0]
            content[at + 8 : at + 20] = b"".join(struct.pack(">i", round(value * 65536)) for value in values)
    return bytes(content)


DISPLAY_P3 = {
    "rXYZ": (0.51512, 0.2412, -0.00105),
    "gXYZ": (0.29198, 0.69225, 0.04189),
    "bXYZ": (0.1571, 0.06657, 0.78407),
}


@pytest.mark.parametrize("name", ["p3.png", "p3.webp", "p3.tiff", "clear.png"])
def test_wide_gamut_colours_become_srgb(tmp_path, name):
    """Every recent phone writes Display P3; measured with lcms alone: (0, 183, 57)."""
    how = {"lossless": True} if name.endswith("webp") else {}
    image = flat((60, 180, 75, 255), (9, 5), "RGBA") if name.startswith("clear") else flat((60, 180, 75), (9, 5))
    image.save(tmp_path / name, icc_profile=profile(**DISPLAY_P3), **how)
    assert np.abs(read_rgb(tmp_path / name).astype(int) - [0, 183, 57]).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
@pytest.mark.parametrize("kind", ["srgb", "broken"])
def test_a_profile_of_srgb_or_of_nothing_changes_nothing(tmp_path, mode, kind):
    content = b"no profile" if kind == "broken" else ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = flat({"RGB": (60, 180, 75), "CMYK": (255, 0, 0, 0), "L": 9}[mode], (4, 3), mode)
    image.save(tmp_path / "image.tiff", icc_profile=content)
    assert read_rgb(tmp_path / "image.tiff")[0, 0].tolist() == list(image.convert("RGB").getpixel((0, 0)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
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
    for extension in ("png", "tiff", "webp"):
        path = tmp_path / f"turned.{extension}"
        how = {"lossless": True} if extension == "webp" else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **how)
        np.testing.assert_array_equal(read_rgb(path), RGB)


def test_first_frame_of_an_animation(tmp_path):
    flat((255, 0, 0)).save(tmp_path / "film.gif", save_all=True, append_images=[flat((0, 0, 255))])
    assert (read_rgb(tmp_path / "film.gif") == [255, 0, 0]).all()


def test_texts_of_image_generators_are_no_bombs(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(RGB).save(tmp_path / "made.png", pnginfo=texts)
    np.testing.assert_array_equal(read_rgb(tmp_path / "made.png"), RGB)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "HEIC"),
        (b"<html>404", "HTML"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "PostScript"),
        (b"text", "it is no image"),
        (b"", "it is no image"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, monkeypatch, content, said):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=said) as caught:
        read_rgb(tmp_path / "cat.jpg")
    assert caught.value.path.endswith("cat.jpg")
    assert refusal(str(tmp_path / "cat.jpg")) == caught.value.reason
    assert not (tmp_path / "ran").exists()  # Pillow gives PostScript to an outside program


def test_missing_and_cut_files_and_pipes_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.fromarray(photograph("chelsea")).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
    for name, said in (("absent.png", "no such file"), ("pipe.jpg", "no regular file"), ("cut.jpg", "truncated")):
        with pytest.raises(ImageError, match=said):
            read_rgb(tmp_path / name)


def test_a_large_jpeg_is_decoded_small_where_that_leaves_twice_the_size(tmp_path):
    pixels = Image.fromarray(photograph("retina")).resize((1600, 1200), Image.Resampling.BICUBIC)
    pixels.save(tmp_path / "large.jpg", quality=95)
    assert decode(str(tmp_path / "large.jpg"), enough=128).size == (200, 150)
    assert decode(str(tmp_path / "large.jpg"), enough=150).size == (200, 150)
    assert decode(str(tmp_path / "large.jpg"), enough=151).size == (400, 300)
    assert decode(str(tmp_path / "large.jpg")).size == (1600, 1200)
    small, whole = (
        np.asarray(
            decode(str(tmp_path / "large.jpg"), enough=enough).resize((149, 112), Image.Resampling.BICUBIC), float
        )
        for enough in (224, None)
    )
    assert np.sqrt(((small - whole) ** 2).mean()) < 1  # levels of 255
    pixels.resize((500, 375)).save(tmp_path / "small.jpg")
    assert decode(str(tmp_path / "small.jpg"), enough=64).size == (500, 375)
    pixels.save(tmp_path / "large.png", compress_level=1)
    assert decode(str(tmp_path / "large.png"), enough=64).size == (1600, 1200)
