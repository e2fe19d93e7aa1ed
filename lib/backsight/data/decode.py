"""One image file, of any usual kind, as upright sRGB."""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from backsight.errors import BacksightError

READABLE = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".pbm", ".avif"),
)
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF")  # no others: EPS would run ghostscript
LARGE = 2**20  # pixels from which on a JPEG is decoded at a fraction of its size, where that leaves enough
# What else a file may be, by its first bytes.
OTHERS = {
    rb"(?s)....ftyp(hei|mif1)": "HEIC: convert it to JPEG",
    rb"\xff\x0a|\0\0\0\x0c(JXL|jP)": "JPEG XL or JPEG 2000: convert it to PNG",
    rb"version https://git-lfs": "a git-lfs pointer: run `git lfs pull`",
    rb"%!PS|8BPS": "PostScript or a Photoshop file: convert it to PNG",
    rb"<": "HTML or SVG: convert it, or download it again",
    rb"II\*\0|MM\0\*": "a TIFF or raw photograph of unusual samples: save it with 8 or 16 bits",
}
NO_IMAGE = "no image of a kind that is read here"

Image.init()  # with named formats Pillow does not look for its plug-ins by itself
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # image generators write texts of more than 1 MB


class ImageError(BacksightError):
    """One image that cannot be read. `path` is the file, `reason` why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path, self.reason = path, reason


def read_rgb(path: str | Path) -> np.ndarray:
    """One image file as upright uint8 (H, W, 3) sRGB.

    Grey is repeated, transparency is laid over white, 16-bit samples are scaled, colours go to sRGB through the
    file's own ICC profile where it has a valid one, the EXIF orientation is applied, and of an animation the first
    frame is read. Raises ImageError for anything that is no complete image, and for samples without an agreed white
    (32-bit or signed integers, floats outside [0, 1]).
    """
    return np.array(decode(str(path)))


def decode(
    path: str, read: Callable[[], bytes] | None = None, upright: bool = True, enough: int | None = None
) -> Image.Image:
    """The RGB image of a file, or of what `read` gives of one inside another file. Raises ImageError.

    upright: the EXIF orientation is applied. enough: pixels a side that are as good as all: a large JPEG is decoded at
    the smallest of 1/2, 1/4, 1/8 of its size that leaves as many.
    """
    with opened(path, read) as image:
        if enough is not None and image.width * image.height >= LARGE:
            image.draft(None, (enough, enough))  # of JPEGs only
        tags = getattr(image, "tag_v2", {})
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # planar configuration, bits per sample
            raise ValueError("its 16-bit planes are separate: save it interleaved, or as PNG")
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return _srgb(image)


@contextmanager
def opened(path: str, read: Callable[[], bytes] | None = None) -> Iterator[ImageFile.ImageFile]:
    """An image file whose header is read; whatever is wrong, inside the block too, comes out as an ImageError."""
    try:
        if read is None and not os.path.isfile(path):  # a named pipe would be waited for
            raise ValueError("it is no regular file" if os.path.exists(path) else "there is no such file")
        with open(path, "rb") if read is None else io.BytesIO(read()) as file:
            try:
                image = Image.open(file, formats=FORMATS)
            except Image.UnidentifiedImageError:
                file.seek(0)
                head = file.read(32)
                kind = next((kind for signature, kind in OTHERS.items() if re.match(signature, head)), NO_IMAGE)
                raise ValueError(f"it is {kind}") from None
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever a malformed file makes them stumble over
        raise ImageError(path, str(error) or type(error).__name__) from error


def refusal(path: str) -> str | None:
    """Why a file is no image, by its first bytes, whatever its name is."""
    try:
        with opened(path):
            return None
    except ImageError as error:
        return error.reason


def _srgb(image: Image.Image) -> Image.Image:
    """RGB of any mode, over white where the image is transparent."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity, image = image.getchannel("A"), image.convert("RGB")
    elif image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if profile and (transform := _to_srgb(profile, image.mode)):
        image = ImageCms.applyTransform(image, transform) or image
    image = image.convert("RGB")
    if opacity is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), opacity)
    return image


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile is broken, of another mode, or sRGB: it moves no colour by more than its rounding."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)).convert(mode)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        moved = np.asarray(ImageCms.applyTransform(probe, transform)) - np.asarray(probe.convert("RGB"), int)
    except (ImageCms.PyCMSError, OSError):
        return None
    return transform if np.abs(moved).max() > 2 else None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits as L."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    white = 1.0 if image.mode == "F" else 65535.0
    # TIFF: bits per sample; whether zero is white
    odd = (image.mode == "I" and image.format != "PPM") or tags.get(258, (16,))[0] not in (16, 32) or tags.get(262) == 0
    if odd or not ((values >= 0) & (values <= white)).all():
        raise ValueError("its samples have no agreed white (1 of floats, 65535 of integers): save it with 8 or 16 bits")
    return Image.fromarray((values.astype(np.float32) * (255 / white) + 0.5).astype(np.uint8))
