"""One image file, of any usual kind, as upright sRGB."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from backsight.data.tar import Member
from backsight.errors import BacksightError

READABLE = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".pbm", ".avif"),
)
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF")  # no others: EPS would run ghostscript
LARGE = 2**20  # pixels from which on a JPEG is decoded at a fraction of its size, where that leaves enough
# What else a file may be: byte, first bytes from there, and in words.
_OTHERS = (
    (4, b"ftyphei", "HEIC: convert it to JPEG"),
    (4, b"ftypmif1", "HEIF: convert it to JPEG"),
    (0, b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (0, b"%!PS", "PostScript: convert it to PNG"),
    (0, b"<", "HTML or SVG: convert it, or download it again"),
    (0, b"II*\0", "a TIFF of unusual samples: save it with 8 or 16 bits"),
    (0, b"MM\0*", "a TIFF of unusual samples: save it with 8 or 16 bits"),
)

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


def decode(path: str, upright: bool = True, member: Member | None = None, enough: int | None = None) -> Image.Image:
    """The RGB image of a file, or of the member of a tar shard. Raises ImageError.

    upright: the EXIF orientation is applied. enough: pixels a side that are as good as all: a large JPEG is decoded at
    the smallest of 1/2, 1/4, 1/8 of its size that leaves as many.
    """
    with opened(path, member) as image:
        if enough is not None and image.width * image.height >= LARGE and image.format in ("JPEG", "MPO"):
            _shrink(image, enough)
        tags = getattr(image, "tag_v2", {})
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # planar configuration, bits per sample
            raise ValueError("16-bit TIFF with separate planes: save it interleaved, or as PNG")
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return _srgb(image)


def _shrink(image: ImageFile.ImageFile, enough: int) -> None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8, but not where a cut last pixel would shift the others."""
    for scale in (8, 4, 2):
        if min(image.size) // scale >= enough and all(-side % scale < side / 1000 for side in image.size):
            image.draft(None, (image.width // scale, image.height // scale))
            break


@contextmanager
def opened(path: str, member: Member | None = None) -> Iterator[ImageFile.ImageFile]:
    """An image file whose header is read; whatever is wrong, inside the block too, comes out as an ImageError."""
    try:
        if member is None and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")  # a named pipe would be waited for
        with Image.open(path if member is None else io.BytesIO(member.read()), formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise ImageError(path, "there is no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever a malformed file makes them stumble over
        reason = str(error).replace(repr(path), "the file").replace(path, "the file") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError) and member is None:
            with open(path, "rb") as file:
                head = file.read(32)
            reason = next((f"it is {what}" for at, sign, what in _OTHERS if head[at:].startswith(sign)), reason)
        raise ImageError(path, reason) from error


def is_image(path: str) -> bool:
    """Whether its first bytes are those of an image of a kind that is read here, whatever its name is."""
    try:
        with opened(path):
            return True
    except ImageError:
        return False


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
    image = image if image.mode == "RGB" else image.convert("RGB")
    if opacity is None:
        return image
    image.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile is sRGB already, broken, or of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits as L, or as LA where one level is declared transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("its float samples leave [0, 1], so that white is not known: save it with 8 or 16 bits")
        white = 1.0
    elif image.mode == "I" and image.format != "PPM":
        raise ValueError("32-bit or signed samples have no agreed white: save it with 8 or 16 unsigned bits")
    else:
        white = 2.0 ** (tags.get(258, (16,))[0]) - 1  # TIFF: bits per sample
    grey = (values.astype(np.float32) * (255 / white) + 0.5).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF: zero is white, which Pillow undoes for eight bits only
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
