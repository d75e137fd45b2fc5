"""Bytes of a picture file -> pixels, or a stated reason why not.

JPEG, the one format that matters for speed, is decoded by OpenCV, for a view at reduced size; an ordinary one is told
by its own markers. Everything that OpenCV reads differently from what people see (CMYK, palettes, alpha, 16 bits, a
turned picture, half a file), and everything odd, goes through Pillow.

Imported by processes that only decode: nothing here may import torch.
"""

from __future__ import annotations

import io
import sys
import warnings

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from focusdd_det.types import Image

_REDUCED = {
    1: cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
    2: cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION,
    4: cv2.IMREAD_REDUCED_COLOR_4 | cv2.IMREAD_IGNORE_ORIENTATION,
    8: cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION,
}
# Segments that say nothing about how a JPEG looks: tables, restart interval, APP0 and APP2 to APP15, comments.
_PASSED_OVER = frozenset({0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE})
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # MPO comes with JPEG
PILImage.init()  # registers every format; without it Pillow loads them one by one on the first failure


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason."""


def decode(data: bytes, least_side: int | None = None, max_pixels: int = 178_956_970) -> tuple[Image, int, int]:
    """Decode a picture as a person would see it: colours converted, rotated as its EXIF says.

    Args:
        data: the file's bytes.
        least_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as its shorter side stays at least this (px).
            None decodes every pixel.
        max_pixels: larger pictures are refused before any pixel is decoded.

    Returns:
        pixels [h, w, 3] uint8 RGB, and width and height of the whole picture (after rotation).

    Raises:
        BadImage: empty, not a picture, cut short, too large, or damaged.
    """
    if not data:
        raise BadImage("empty file")
    try:
        size = upright_jpeg(data)
        if size is not None and size[0] * size[1] <= max_pixels and _is_whole(data):
            pixels = _opencv(data, _factor(min(size), least_side))
            if pixels is not None:
                return pixels, *size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are judged here
            header = _open(data)
            width, height = header.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels, more than max_pixels={max_pixels}")
            orientation = header.getexif().get(0x0112, 1)
            plain = header.format == "JPEG" and header.mode in ("RGB", "L") and orientation == 1
            if plain and _is_whole(data):
                pixels = _opencv(data, _factor(min(width, height), least_side))
                if pixels is None:
                    raise BadImage("damaged JPEG")
                return pixels, width, height
            return _slow(header)
    except BadImage:
        raise
    except PILImage.DecompressionBombError as error:
        raise BadImage(f"{error} Whatever max_pixels is, only upright JPEGs may be larger.") from error
    except UnidentifiedImageError as error:
        raise BadImage("not a picture that Pillow or OpenCV can read") from error
    except MemoryError as error:
        raise BadImage("too large for the memory") from error
    except Exception as error:  # decoders raise whatever they like on hostile bytes; the reason goes into the report
        raise BadImage(str(error).replace("\n", " ")[:200] or type(error).__name__) from error


def upright_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that looks as it is stored: baseline or progressive, 8 bits, grey or three channels,
    nothing that could turn it. None for whatever else there is: not a JPEG, an odd one, one with EXIF or XMP, one that
    holds several pictures. (ITU-T T.81, Annex B.)"""
    if data[:2] != b"\xff\xd8":
        return None
    size = None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:  # the pixels begin
            return size
        if marker in (0xC0, 0xC2) and size is None:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            channels = data[at + 9]
            if data[at + 4] != 8 or channels not in (1, 3) or length != 8 + 3 * channels or not width * height:
                return None
            size = (width, height)
        elif marker not in _PASSED_OVER or length < 2 or data.startswith(b"MPF\0", at + 4):
            return None
        at += 2 + length
    return None


def _opencv(data: bytes, factor: int) -> Image | None:
    """RGB pixels of a JPEG, at 1/factor; None if it is damaged."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor])
    return None if pixels is None else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels), np.uint8)


def _open(data: bytes) -> PILImage.Image:
    """Pillow's own open. Ultralytics puts another in its place, which tries to install a package for unknown files."""
    replaced = sys.modules.get("ultralytics.utils.patches")
    plain = getattr(replaced, "_image_open", PILImage.open)
    picture: PILImage.Image = plain(io.BytesIO(data), formats=_FORMATS)
    return picture


def _slow(header: PILImage.Image) -> tuple[Image, int, int]:
    """Every other format through Pillow: first frame, EXIF rotation, 16 bits scaled, transparency over white."""
    header.load()
    picture = ImageOps.exif_transpose(header) or header
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(1.0, float(np.nanmax(values)))
        grey = np.clip(np.rint(np.nan_to_num(values) * (255.0 / top)), 0, 255).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = PILImage.alpha_composite(ground, picture)
        pixels = np.asarray(picture.convert("RGB"), np.uint8).copy()
    return pixels, pixels.shape[1], pixels.shape[0]


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG has its end marker at the end; a file that was cut short has not, and OpenCV would grey it out."""
    return data.rstrip(b"\x00\r\n ").endswith(b"\xff\xd9")


def _factor(side: int, least_side: int | None) -> int:
    if least_side is None:
        return 1
    return next((f for f in (8, 4, 2) if side // f >= least_side), 1)
