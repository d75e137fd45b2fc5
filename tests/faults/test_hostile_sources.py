"""Source files of every unpleasant kind: decoded as people see them, or quarantined with a reason and replaced."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

import focusdd_det.composites
import focusdd_det.scoring.glance
import focusdd_det.scoring.scores
from faults.support import FOLDERS, Workshop, tree, write_picture, write_sources
from focusdd_det.build import load_config
from focusdd_det.detset import read_manifest, verify
from focusdd_det.errors import DataError, FocusDDError
from focusdd_det.methods import METHODS
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.sources import Root, stream

RNG = np.random.default_rng(0)
RAMP = np.stack(np.meshgrid(np.arange(0, 240, 4), np.arange(0, 240, 5), indexing="xy") * 2, axis=-1)[..., :3].astype(
    np.uint8
)


def encoded(pixels: np.ndarray, mode: str, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return encoded(RAMP, "RGB", "JPEG", quality=95, exif=exif)


def rotated_by_xmp() -> bytes:
    """Pillow reads this orientation, OpenCV does not."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="r"><r:D tiff:Orientation="6"/></r:RDF></x:xmpmeta>'
    data = encoded(RAMP, "RGB", "JPEG", quality=95)
    segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(RAMP[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [PILImage.fromarray(RAMP), PILImage.fromarray(255 - RAMP)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A PNG that says it is side x side."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"\0" * 100_000)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG = encoded(RAMP, "RGB", "JPEG", quality=95)
GREY = np.repeat(RAMP[..., :1], 3, axis=2)

GOOD: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "CMYK": (lambda: encoded(RAMP, "CMYK", "JPEG", quality=95), RAMP),
    "grey JPEG": (lambda: encoded(RAMP[..., 0], "L", "JPEG", quality=95), GREY),
    "RGBA, half of it transparent": (
        lambda: encoded(np.dstack([RAMP, np.where(RAMP[..., 0] < 120, 255, 0).astype(np.uint8)]), "RGBA", "PNG"),
        np.where(RAMP[..., :1] < 120, RAMP, 255).astype(np.uint8),
    ),
    "16 bit": (sixteen_bit, GREY),
    "palette": (lambda: encoded(RAMP[..., 0], "P", "PNG"), GREY),
    "EXIF-rotated": (rotated, np.rot90(RAMP, -1)),
    "XMP-rotated": (rotated_by_xmp, np.rot90(RAMP, -1)),
    "1 x 1": (lambda: encoded(RAMP[:1, :1], "RGB", "PNG"), RAMP[:1, :1]),
    "animated": (animated, RAMP),
    "bytes after the end": (lambda: JPEG + b"trailing", RAMP),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("least_side", [None, 8])
def test_decoded_as_people_see_it(name: str, least_side: int | None) -> None:
    make, expected = GOOD[name]
    pixels, width, height = decode(make(), least_side)
    assert (height, width) == expected.shape[:2]
    if least_side is None or pixels.shape == expected.shape:
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < 4


BAD: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty file"),
    "cut short": (JPEG[: len(JPEG) // 2], "[Tt]runcated"),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 9, "not a picture"),
    "bomb": (bomb(), "pixels"),
    "noise": (RNG.bytes(3000), "not a picture"),
    "JPEG header and noise": (JPEG[:200] + RNG.bytes(3000), ""),
    "PNG cut in its header": (bomb()[:30], ""),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "a pickle": (b"\x80\x04\x95\x10\x00cos\nsystem\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("least_side", [None, 8])
def test_refused_with_a_reason(name: str, least_side: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImage) as caught:
        decode(data, least_side)
    assert str(caught.value)
    assert re.search(reason, str(caught.value))
    assert "pi-heif" not in str(caught.value) + "".join(capfd.readouterr())  # no attempt to install a decoder


def spoil(folder: Path) -> dict[str, str]:
    """Put one of each kind into a class folder; relative path -> reason of its quarantine."""
    expected = {}
    for name, (data, reason) in BAD.items():
        (folder / f"bad {name}.JPEG").write_bytes(data)
        expected[f"bad {name}.JPEG"] = reason
    for name, (make, _) in GOOD.items():
        (folder / f"ok {name}.JPEG").write_bytes(make())
    (folder / "folder.JPEG").mkdir()
    (folder / "loop.JPEG").symlink_to("loop.JPEG")
    (folder / "dangling.JPEG").symlink_to("nowhere")
    (folder / "to a folder.JPEG").symlink_to("..")
    os.mkfifo(folder / "pipe.JPEG")  # opening it would wait for ever
    with (folder / "sparse.JPEG").open("wb") as file:
        file.truncate(1 << 40)  # more than any memory
    (folder / "ünïcödé 名前 'quoted' \\ and\ttab.JPEG").write_bytes(JPEG)
    Path(os.fsdecode(os.fsencode(folder) + b"/latin\xe9.JPEG")).write_bytes(encoded(255 - RAMP, "RGB", "JPEG"))
    expected |= {
        "folder.JPEG": "a folder", "loop.JPEG": "symbolic links", "dangling.JPEG": "No such file",
        "to a folder.JPEG": "not a regular file", "pipe.JPEG": "not a regular file", "sparse.JPEG": "more than",
        "latin\\xe9.JPEG": "not valid UTF-8",
    }  # fmt: skip
    return expected


def quarantine(folder: Path) -> dict[str, str]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {json.loads(line)["path"]: json.loads(line)["reason"] for line in lines}


@pytest.mark.parametrize("loader", ["threads", "processes"])
def test_one_of_each_in_a_build(workshop: Workshop, tmp_path: Path, loader: str) -> None:
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    for path in sorted((sources / "ball").iterdir())[8:]:
        path.unlink()
    expected = spoil(sources / "ball")
    before = sorted(os.fsencode(p) for p in sources.rglob("*"))
    folder = workshop.build(tmp_path / "set", sources=[str(sources)], max_bad=0.5, loader=loader)
    assert verify(folder) == []
    found = quarantine(folder)
    assert set(found) == {f"ball/{name}" for name in expected}
    for name, reason in expected.items():
        assert re.search(reason, found[f"ball/{name}"])
    assert sum(item.class_index == 0 for item in read_manifest(folder)) == 3  # 8 + 10 + 1 usable ones
    assert f"{len(expected)} quarantined" in (folder / "README.md").read_text()
    assert sorted(os.fsencode(p) for p in sources.rglob("*")) == before


def test_a_picture_that_is_fine_small_and_bad_whole_is_replaced(
    workshop: Workshop, unbroken: Path, tmp_path: Path
) -> None:
    """Its place goes to the next candidate; killed and resumed, the order is the same."""
    from faults.child import Fault
    from faults.support import start

    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    bad = [cell.path for item in read_manifest(unbroken) for cell in item.cells[:1] if item.index == 1]
    store = tmp_path / "scores.sqlite"
    options = {"sources": [str(sources)], "max_bad": 0.5}
    workshop.build(tmp_path / "before", scores=str(store), **options)
    for path in bad:  # same size and time, other content: seen only when it is cut
        status = (sources / path).stat()
        (sources / path).write_bytes(bytes(status.st_size))
        os.utime(sources / path, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy = shutil.copy(store, tmp_path / "copy.sqlite")
    whole = workshop.build(tmp_path / "whole", scores=str(store), **options)
    assert quarantine(whole) == dict.fromkeys(sorted(bad), "its content changed while the set was built")
    for at in (10, 30, 50):
        argv = workshop.argv(tmp_path / "set", scores=str(copy), **options)
        run = start(argv, tmp_path / "logs", Fault("kill", str(tmp_path / "set.inc"), at))
        assert run.wait() in (-9, 0)
    workshop.build(tmp_path / "set", scores=str(copy), **options)
    assert tree(tmp_path / "set") == tree(whole)


@pytest.mark.parametrize(("good", "bad"), [(60, 30), (5, 2), (0, 9)])
def test_too_many_bad_ones_stop_the_build_with_a_summary(
    workshop: Workshop, tmp_path: Path, good: int, bad: int
) -> None:
    (tmp_path / "sources" / "ball").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(good):
        write_picture(tmp_path / "sources" / "ball" / f"{i}.JPEG", rng)
    for i in range(bad):
        (tmp_path / "sources" / "ball" / f"bad{i}.JPEG").write_bytes(b"" if i % 2 else JPEG[:100])
    options = {"sources": [str(tmp_path / "sources")], "ipc": 1}
    for _ in range(2):  # the same command again does not slip through on what is known already
        with pytest.raises(DataError, match=r"max_bad=0\.1 allows:\n.* x .*\n") as caught:
            workshop.build(tmp_path / "set", **options)
        assert "empty file" in str(caught.value)
        assert str(caught.value).count("ball/bad") == min(bad, 10)
    if good:
        assert verify(workshop.build(tmp_path / "set", max_bad=0.9, **options)) == []


def test_an_unreadable_source_is_tried_again_by_the_next_run(workshop: Workshop, tmp_path: Path) -> None:
    """Root reads everything, so the refusal is a link into a folder that is not there yet."""
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    first = sources / "ball" / "00.JPEG"
    shutil.move(first, tmp_path / "kept.JPEG")
    first.symlink_to(tmp_path / "late" / "00.JPEG")
    store = str(tmp_path / "scores.sqlite")
    folder = workshop.build(tmp_path / "a", sources=[str(sources)], scores=store)
    assert "No such file" in quarantine(folder)["ball/00.JPEG"]
    (tmp_path / "late").mkdir()
    shutil.move(tmp_path / "kept.JPEG", tmp_path / "late" / "00.JPEG")
    assert quarantine(workshop.build(tmp_path / "b", sources=[str(sources)], scores=store)) == {}


def test_permission_denied(tmp_path: Path) -> None:
    """Root reads everything, so as root this is asked in the name of another user."""
    (tmp_path / "ball").mkdir()
    (tmp_path / "ball" / "x.JPEG").write_bytes(JPEG)
    (tmp_path / "ball" / "x.JPEG").chmod(0)
    located = next(stream(Root("r", tmp_path, {"ball": "ball"})))
    config = load_config(out="unused")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        reason = focusdd_det.scoring.glance.glance(located, 32, METHODS["focusdd"], config)
    finally:
        os.seteuid(user)
    assert reason == "unreadable: Permission denied"


def test_the_source_folder_disappears_in_the_middle(
    workshop: Workshop, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted disk is no reason to quarantine everything on it; brought back, the build goes on."""
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    real = focusdd_det.scoring.scores.ScoreStore.blocks

    def unmount(*args: object) -> object:
        if (sources / "star").is_dir() and args[1] == "étoile bleue":
            (sources / "star").rename(tmp_path / "unmounted")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(focusdd_det.scoring.scores.ScoreStore, "blocks", unmount)
        with pytest.raises(DataError, match="is the disk still there"):
            workshop.build(tmp_path / "set", sources=[str(sources)])
    (tmp_path / "unmounted").rename(sources / "star")
    assert tree(workshop.build(tmp_path / "set", sources=[str(sources)])) == tree(unbroken)


@pytest.mark.parametrize("where", ["decode", "cut"])
def test_a_thread_that_dies_ends_the_build_by_name(
    workshop: Workshop, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An error that nobody foresaw: the run ends, saying where; the same command then finishes."""

    def die(*_: object, **__: object) -> None:
        raise SystemError("the thread died")

    with monkeypatch.context() as patch:
        module, name = (
            (focusdd_det.scoring.glance, "view_pixels") if where == "decode" else (focusdd_det.composites, "assemble")
        )
        patch.setattr(module, name, die)
        message = "ball/|star/|kite/" if where == "decode" else "composite 0 of ball could not be cut"
        with pytest.raises(FocusDDError, match=message):
            workshop.build(tmp_path / "set")
    assert tree(workshop.build(tmp_path / "set")) == tree(unbroken)


def test_archives_with_members_that_lead_outside_or_lie(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for folder in FOLDERS:
        with tarfile.open(tmp_path / "tars" / f"{folder}.tar", "w") as archive:
            for path in sorted((workshop.sources / folder).iterdir()):
                archive.add(path, path.name)
            for i, name in enumerate(("../../evil.JPEG", "/etc/evil.JPEG")):
                info = tarfile.TarInfo(name)
                info.size = len(JPEG) + i
                archive.addfile(info, io.BytesIO(JPEG + bytes(i)))
            link = tarfile.TarInfo("link.JPEG")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    folder = workshop.build(tmp_path / "set", sources=[str(tmp_path / "tars")], max_bad=0.5)
    assert verify(folder) == []
    reasons = quarantine(folder)
    assert len(reasons) == 9
    assert {"its path in the archive leads outside", "not a regular file in the archive"} == set(reasons.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "tars"]


def test_an_archive_cut_short(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for folder in FOLDERS:
        with tarfile.open(tmp_path / "tars" / f"{folder}.tar", "w") as archive:
            archive.add(workshop.sources / folder, ".")
    path = tmp_path / "tars" / "star.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"star\.tar is damaged or cut short"):
        workshop.build(tmp_path / "set", sources=[str(tmp_path / "tars")])


def test_an_archive_whose_header_lies(workshop: Workshop, tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("huge.JPEG").tobuf())
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")  # says it holds 2^60 bytes
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "star.tar").write_bytes(bytes(header) + JPEG)
    with pytest.raises(DataError, match=r"star\.tar is damaged or cut short"):
        workshop.build(tmp_path / "set", sources=[str(tmp_path)])


@pytest.mark.slow
def test_a_hundred_thousand_files_in_one_folder(workshop: Workshop, tmp_path: Path) -> None:
    """Hard links to few pictures: listed, counted and planned; memory for them would show in the tracer."""
    import tracemalloc

    folder = tmp_path / "sources" / "ball"
    folder.mkdir(parents=True)
    picture = workshop.sources / "ball" / "00.JPEG"
    (folder / "0.JPEG").write_bytes(picture.read_bytes())
    for i in range(1, 100_000):
        os.link(folder / f"{i // 60_000 * 60_000}.JPEG", folder / f"{i}.JPEG") if i % 60_000 else (
            folder / f"{i}.JPEG"
        ).write_bytes(picture.read_bytes())
    tracemalloc.start()
    count = sum(1 for _ in stream(Root("r", tmp_path / "sources", {"ball": "ball"})))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000
    assert peak < 15_000_000  # all of them at once would take five times that
    shutil.rmtree(tmp_path / "sources")


@pytest.mark.slow
def test_a_build_from_a_hundred_thousand_files(workshop: Workshop, tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources", per_class=14)
    for i in range(100_000):
        os.link(sources / "ball" / f"{i % 14:02d}.JPEG", sources / "ball" / f"again{i}.JPEG")
    folder = workshop.build(tmp_path / "set", sources=[str(sources)], method="random", near_duplicate=0)
    assert sum(item.class_index == 0 for item in read_manifest(folder)) == 3
    shutil.rmtree(sources)
