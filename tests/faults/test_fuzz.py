"""A bounded fuzz run over everything that is read from strangers: only errors of ours may come out.

FOCUSDD_FUZZ_SECONDS and FOCUSDD_FUZZ_SEED make it longer and other; the seed and the number of inputs are printed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from focusdd_det.build import load_config
from focusdd_det.classmap import read_class_map, read_folder_map
from focusdd_det.config import read_yaml
from focusdd_det.detset import is_ours, read_data_yaml, read_manifest, read_soft, verify
from focusdd_det.errors import FocusDDError
from focusdd_det.labels import parse_rows
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.sources import Root, folder_names, stream

SECONDS = float(os.environ.get("FOCUSDD_FUZZ_SECONDS", "0.5"))  # for each reader
SEED = int(os.environ.get("FOCUSDD_FUZZ_SEED", "20261123"))
TOKENS = [
    b"..", b"/", b"\0", b"null", b"NaN", b"1e999", b"-1", b"{", b"}", b"[", b"]", b'"', b":", b"\n", b"\\ud800", b"&a ",
    b"*a", b"!!int ", b"!!float ", b"!!timestamp ", b"!!binary ", b"!!python/name:os.system ", b"<<: ", b"- ", b"? ",
    b"\xff\xfe", b"\xed\xa0\x80", b"0x" + b"f" * 30, b"9" * 5000, b"[" * 3000, b"{a: " * 500, b"2001-99-99", b"%YAML 9",
]  # fmt: skip


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert: up to eight changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[place % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[place : place + rng.randint(1, 40)]
        elif kind == 2:
            out[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            other = rng.randrange(len(out) + 1)
            out[place:place] = out[other : other + rng.randint(1, 60)]
        elif kind == 4:
            del out[place:]
        elif out:
            out[place % len(out)] = rng.randrange(256)
    return bytes(out)


def read_labels(path: Path) -> None:
    parse_rows(path.read_text(encoding="utf-8"), 80)


def read_archive(path: Path) -> None:
    root = Root("r", path, {"ball": "ball"})
    folder_names(root)
    for located in stream(root):
        if not located.problem:
            located.read()


def archive(folder: Path) -> bytes:
    import tarfile

    with tarfile.open(folder / "x.tar", "w") as file:
        for i in range(3):
            (folder / f"{i}.JPEG").write_bytes(bytes(300))
            file.add(folder / f"{i}.JPEG", f"ball/{i}.JPEG")
    return (folder / "x.tar").read_bytes()


def examples(unbroken: Path, top: Path, name: str, scratch: Path) -> bytes:
    made = {
        "manifest": lambda: (unbroken / "manifest.jsonl").read_bytes()[:6000],
        "label": lambda: next((unbroken / "labels" / "train").iterdir()).read_bytes(),
        "soft": lambda: next((unbroken / "soft" / "train").iterdir()).read_bytes(),
        "data.yaml": lambda: (unbroken / "data.yaml").read_bytes(),
        "build.yaml": lambda: (unbroken / "build.yaml").read_bytes(),
        "config": lambda: (
            b"ipc: 3\nconf: 0.5\nclasses: [a, b]\nempty: keep\nsources: [{path: x, map: y}]\nview: auto\n"
        ),
        "class map": lambda: b"names: [ball, star]\nfolders: {a: ball, b: star}\n",
        "COCO map": lambda: b"dog: {coco_id: 0, exact: [n02085620: x]}\ncat: {coco_id: 1, near: []}\n",
        "folder map": lambda: b"folders:\n  a: ball\n  b: star\n",
        "archive": lambda: archive(scratch),
        "picture": lambda: next((unbroken / "images" / "train").iterdir()).read_bytes(),
    }
    return made[name]()


READERS: dict[str, Callable[[Path], object]] = {
    "manifest": lambda p: (list(read_manifest(p.parent, tolerant=True)), list(read_manifest(p.parent))),
    "label": read_labels,
    "soft": read_soft,
    "data.yaml": lambda p: read_data_yaml(p.parent),
    "build.yaml": lambda p: is_ours(p.parent),
    "config": lambda p: load_config(p),
    "class map": lambda p: read_class_map(p, ("exact", "strong", "near")),
    "COCO map": lambda p: read_class_map(p, ("exact", "strong", "near")),
    "folder map": lambda p: (read_yaml(p), read_folder_map(p, ["ball", "star"])),
    "archive": read_archive,
    "picture": lambda p: decode(p.read_bytes(), 16, 1_000_000),
}
FILE = {"manifest": "manifest.jsonl", "data.yaml": "data.yaml", "build.yaml": "build.yaml"}


def inputs(example: bytes, rng: random.Random, seconds: float) -> Iterator[bytes]:
    end = time.monotonic() + seconds
    yield b""
    while time.monotonic() < end:
        yield mutate(rng, example)


@pytest.mark.parametrize("name", READERS)
def test_only_our_errors_come_out(
    name: str, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = examples(unbroken, tmp_path, name, tmp_path)
    path = tmp_path / FILE.get(name, "input")
    rng = random.Random(f"{SEED} {name}")
    tried = refused = 0
    for data in inputs(example, rng, SECONDS):
        path.write_bytes(data)
        tried += 1
        try:
            READERS[name](path)
        except (FocusDDError, BadImage):
            refused += 1
        except (OSError, ValueError) as error:
            # Pictures in an archive may be unreadable; label rows raise ValueError, which their readers turn into ours.
            assert (name, type(error).__name__) in {
                ("archive", "OSError"), ("label", "ValueError"), ("label", "UnicodeDecodeError")
            }, (SEED, data)  # fmt: skip
            refused += 1
        except BaseException:
            kept = tmp_path / "failing"
            kept.write_bytes(data)
            print(f"{name}: seed {SEED}, input {tried} in {kept}: {data[:300]!r}")
            raise
    with capsys.disabled():
        print(f"\n  fuzz {name}: {tried} inputs, {refused} refused, seed {SEED}", end="")
    assert tried > 5


def test_verify_of_a_set_with_any_damaged_file(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is done to one file of a set, verify answers with a list that is not empty, and names that file."""
    import shutil

    folder = shutil.copytree(unbroken, tmp_path / "set")
    rng = random.Random(SEED)
    names = ["manifest.jsonl", "data.yaml", "build.yaml", "README.md", "COMPLETE"]
    names += [
        str(next((folder / part / "train").iterdir()).relative_to(folder)) for part in ("images", "labels", "soft")
    ]
    tried = 0
    end = time.monotonic() + 2 * SECONDS
    while time.monotonic() < end:
        name = rng.choice(names)
        good = (folder / name).read_bytes()
        bad = mutate(rng, good)
        if bad != good:
            (folder / name).write_bytes(bad)
            problems = verify(folder)
            assert any(str(folder / name) in problem for problem in problems), (name, bad)
            (folder / name).write_bytes(good)
            tried += 1
    assert verify(folder) == []
    with capsys.disabled():
        print(f"\n  fuzz verify: {tried} damaged files, all named, seed {SEED}", end="")
