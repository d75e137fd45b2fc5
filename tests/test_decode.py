"""Pictures as people see them, and reasons for those that cannot be seen."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageOps

from focusdd_det.scoring.decode import BadImage, decode, upright_jpeg
from focusdd_det.scoring.glance import view_pixels


def scene(width: int = 160, height: int = 120) -> np.ndarray:
    """Red left, green right, a blue band at the bottom: orientation and channel order show."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = (220, 30, 30)
    picture[:, width // 2 :] = (30, 200, 30)
    picture[-height // 4 :] = (20, 20, 230)
    return picture


def encoded(picture: np.ndarray, form: str = "JPEG", mode: str | None = None, **options: object) -> bytes:
    image = PILImage.fromarray(picture)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", None, {"quality": 95}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("JPEG", None, {"quality": 95, "progressive": True}),
        ("PNG", None, {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", None, {"lossless": True}),
        ("BMP", None, {}),
        ("TIFF", None, {}),
        ("GIF", None, {}),
    ],
)
def test_every_format_shows_the_same_picture(form: str, mode: str | None, options: dict[str, object]) -> None:
    pixels, width, height = decode(encoded(scene(), form, mode, **options))
    assert (width, height, pixels.shape, pixels.dtype) == (160, 120, (120, 160, 3), np.uint8)
    limit = 40 if mode == "P" or form == "GIF" else 12
    middle = np.abs(pixels[5:80, 5:70].astype(int) - scene()[5:80, 5:70]).mean()
    assert middle < limit


def test_grey_becomes_three_equal_channels() -> None:
    grey = scene()[:, :, 0]
    pixels, _, _ = decode(encoded(grey, "JPEG", quality=98))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert np.abs(pixels[10:80, 10:70, 0].astype(int) - 220).max() < 5


def test_sixteen_bits_are_scaled() -> None:
    deep = (scene()[:, :, 0].astype(np.uint16)) * 257
    pixels, _, _ = decode(encoded(deep, "PNG"))
    assert np.abs(pixels[..., 0].astype(int) - scene()[:, :, 0]).max() <= 1


def test_transparency_is_over_white() -> None:
    picture = np.dstack([scene(), np.zeros(scene().shape[:2], np.uint8)])
    assert (decode(encoded(picture, "PNG"))[0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("least_side", [None, 30])
def test_exif_rotation_is_undone(orientation: int, least_side: int | None) -> None:
    """The picture is stored so that a viewer that heeds the tag shows the scene upright."""
    stored = np.rot90(scene(), {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation])
    if orientation in (2, 4, 5, 7):
        stored = stored[:, ::-1]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), "JPEG", quality=95, exif=exif)
    reference = np.asarray(ImageOps.exif_transpose(PILImage.open(io.BytesIO(data))))
    pixels, width, height = decode(data, least_side)
    assert (height, width) == reference.shape[:2]
    small = cv2.resize(reference, (pixels.shape[1], pixels.shape[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels.astype(int) - small).mean() < 6


def test_a_view_is_decoded_small_but_never_too_small() -> None:
    data = encoded(scene(803, 601), quality=95)
    for least, shape in ((112, (151, 201)), (150, (151, 201)), (151, (301, 402)), (224, (301, 402)), (400, (601, 803))):
        pixels, width, height = decode(data, least)
        assert (width, height) == (803, 601)
        assert min(pixels.shape[:2]) >= min(least, 601)
        assert abs(pixels.shape[0] - shape[0]) <= 1
        assert abs(pixels.shape[1] - shape[1]) <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "not a picture"),
        (b"\xff\xd8\xff\xe0" + b"\x00" * 200, ""),
        (encoded(scene())[:900], ""),
        (encoded(scene(), "PNG")[:150], ""),
        (b"GIF89a", ""),
    ],
)
def test_what_cannot_be_seen_has_a_reason(data: bytes, reason: str) -> None:
    for least_side in (None, 32):
        with pytest.raises(BadImage) as caught:
            decode(data, least_side)
        assert reason in str(caught.value)
        assert str(caught.value)
        assert "0x" not in str(caught.value)  # an address would differ from run to run


def test_a_bomb_is_refused_by_its_header() -> None:
    data = encoded(np.zeros((400, 400, 3), np.uint8), "PNG")
    with pytest.raises(BadImage, match="400 x 400"):
        decode(data, None, max_pixels=1000)


def test_the_first_frame_of_an_animation() -> None:
    frames = [PILImage.fromarray(scene()), PILImage.fromarray(np.zeros_like(scene()))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode(buffer.getvalue())[0][10, 10, 0] > 150


def test_one_pixel() -> None:
    pixels, width, height = decode(encoded(np.full((1, 1, 3), 77, np.uint8), "PNG"), 224)
    assert (pixels.shape, width, height) == ((1, 1, 3), 1, 1)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded(scene()), (160, 120)),
        (encoded(scene(), progressive=True), (160, 120)),
        (encoded(scene()[..., 0]), (160, 120)),
        (encoded(scene(), comment=b"\xff\xd8\xff\xc0 not a marker"), (160, 120)),
        (encoded(scene(), "JPEG", "CMYK"), None),
        (encoded(scene(), "PNG"), None),
        (encoded(scene(), exif=PILImage.Exif()), None),
        (encoded(scene())[:100], None),
        (encoded(scene()).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), None),
        (encoded(scene()).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc3\x00\x11\x08"), None),
        (b"", None),
        (b"\xff\xd8", None),
        (b"\xff\xd8" + b"\xff" * 500, None),
        (b"\xff\xd8" + b"\xff\xdb\x00\x00" * 500, None),
    ],
)
def test_an_ordinary_jpeg_is_told_by_its_markers(data: bytes, size: tuple[int, int] | None) -> None:
    assert upright_jpeg(data) == size


def test_what_could_turn_a_picture_is_left_to_pillow() -> None:
    exif = PILImage.Exif()
    exif[0x010F] = "a maker"
    assert upright_jpeg(encoded(scene(), exif=exif)) is None
    data = encoded(scene())
    several = data[:2] + b"\xff\xe2\x00\x06MPF\0"[:10] + data[2:]
    assert upright_jpeg(several) is None


@pytest.mark.parametrize("least_side", [None, 30])
def test_pillows_way_and_the_short_one_give_the_same(least_side: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encoded(scene(), quality=q, subsampling=s) for q in (30, 95) for s in (0, 1, 2)]
    pictures += [encoded(scene()[..., 0]), encoded(scene(), progressive=True)]
    short = [decode(data, least_side) for data in pictures]
    monkeypatch.setattr("focusdd_det.scoring.decode.upright_jpeg", lambda _: None)
    for data, (pixels, width, height) in zip(pictures, short, strict=True):
        expected = decode(data, least_side)
        assert (width, height) == expected[1:]
        assert np.array_equal(pixels, expected[0])


def test_a_side_of_a_view_that_shrinks_is_averaged_though_the_other_grows() -> None:
    """Columns in turn black and white, two to each of the view's: grey, however few the rows."""
    stripes = np.zeros((40, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(view_pixels(stripes, 64, "squash").astype(int) - 128).max() <= 1
