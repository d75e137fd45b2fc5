"""Data sets that do not come as class folders -> class folders, which is all that the other commands read.

CIFAR-100, Flowers-102 and Food-101 through torchvision's own loaders; Tiny-ImageNet's validation pictures, whose
classes are in a text file. Nothing is fetched unless download=true.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from focusdd_det.commandline import read_options, wants_help
from focusdd_det.config import suggest
from focusdd_det.disk import INCOMPLETE, is_folder_name, write_atomic
from focusdd_det.errors import ConfigError, DataError, DiskError
from focusdd_det.progress import progress_bar

USAGE = """Write a data set as class folders: <out>/<class>/<number>.<ending>

  python tools/export_cls.py dataset=cifar100 root=downloads split=train out=cifar100/train
  python tools/export_cls.py dataset=flowers102 root=downloads split=test out=flowers102/val download=true
  python tools/export_cls.py dataset=food101 root=downloads split=test out=food101/val
  python tools/export_cls.py dataset=tiny_imagenet_val root=tiny-imagenet-200 out=tiny-imagenet/val

  dataset   cifar100 | flowers102 | food101 (torchvision's loaders) | tiny_imagenet_val
  root      the folder that torchvision's `root` means; for tiny_imagenet_val the unpacked tiny-imagenet-200
  split     train | test; flowers102 also has val (default train)
  out       folder of the class folders; must not exist yet
  download  true lets torchvision fetch the data set into root (default false)
"""

_Picture = tuple[str, Path | bytes, str]  # class, file or bytes, ending


def export(dataset: str, root: Path, out: Path, split: str = "train", download: bool = False) -> int:
    """Write a data set's pictures into class folders; files are copied as they are, arrays become PNG.

    Returns:
        The number of pictures.

    Raises:
        ConfigError: an unknown data set.
        DataError: it is not at `root`, or damaged.
        DiskError: `out` exists, or cannot be written; an unfinished `<out>.incomplete` is begun anew.
    """
    if dataset not in READERS:
        raise ConfigError(f"dataset={dataset}: expected {', '.join(READERS)}{suggest(dataset, list(READERS))}")
    if out.exists():
        raise DiskError(f"{out} exists; nothing is written into it. Give another out=")
    try:
        count, pictures = READERS[dataset](root, split, download)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{dataset} cannot be read at {root}: {str(error).splitlines()[0]}; expected what torchvision's own loader "
            "leaves there, or give download=true"
        ) from error
    work = out.with_name(out.name + INCOMPLETE)
    marker = work / ".export"
    if work.exists() and not marker.is_file():
        raise DiskError(f"{work} exists and is not an export of this program; move it away, or give another out=")
    try:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        marker.touch()
        with progress_bar(count, "pictures") as bar:
            for number, (name, picture, ending) in enumerate(pictures):
                if not is_folder_name(name):
                    raise DataError(f"{dataset}: `{name}` cannot be the name of a class folder")
                folder = work / name
                folder.mkdir(exist_ok=True)
                target = folder / f"{number:06d}{ending}"
                if isinstance(picture, bytes):
                    write_atomic(target, picture)
                else:
                    shutil.copyfile(picture, target)
                bar.update(1)
        marker.unlink()
        work.rename(out)
    except FileNotFoundError as error:
        raise DataError(f"{dataset}: {error.filename} is missing; get the data set again") from error
    except OSError as error:
        raise DiskError(f"cannot write {work}: {error.strerror}; free some space and run the command again") from error
    return count


def export_command(argv: Sequence[str]) -> int:
    """`focusdd classify export`, tools/export_cls.py."""
    hints = {"dataset": str, "root": str, "split": str, "out": str, "download": bool}
    if wants_help(argv):
        print(USAGE)
        return 0
    given = read_options("export", argv, hints, needed=("dataset", "root", "out"))
    options = {"split": "train", "download": False, **given}
    out = Path(options["out"])
    count = export(options["dataset"], Path(options["root"]), out, options["split"], options["download"])
    print(f"{out}: {count} pictures in {sum(1 for _ in out.iterdir())} class folders")
    return 0


def _torchvision(name: str) -> Callable[[Path, str, bool], tuple[int, Iterator[_Picture]]]:
    def read(root: Path, split: str, download: bool) -> tuple[int, Iterator[_Picture]]:
        from torchvision import datasets

        loader: Any = getattr(datasets, name)
        which: dict[str, Any] = {"train": split == "train"} if name == "CIFAR100" else {"split": split}
        if name == "CIFAR100" and split not in ("train", "test"):
            raise ValueError(f"split={split}: expected train or test")
        data = loader(str(root), download=download, **which)
        return len(data), _pictures(data)

    return read


def _pictures(data: Any) -> Iterator[_Picture]:
    """Files of a torchvision data set where it keeps such; else its arrays."""
    files, labels = getattr(data, "_image_files", None), getattr(data, "_labels", None)
    names = [str(name).replace("/", "-") for name in data.classes]
    if files is not None and labels is not None:
        for file, label in zip(files, labels, strict=True):
            yield names[int(label)], Path(file), Path(file).suffix.lower()
        return
    for picture, label in data:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        yield names[int(label)], buffer.getvalue(), ".png"


def _tiny_imagenet_val(root: Path, split: str, download: bool) -> tuple[int, Iterator[_Picture]]:
    if download:
        raise ValueError("this program does not fetch Tiny-ImageNet")
    table = root / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or any(len(row) < 2 or Path(row[0]).name != row[0] for row in rows):
        raise ValueError(f"{table}: expected lines of file name, tab, synset")
    folder = root / "val" / "images"
    return len(rows), ((row[1], folder / row[0], Path(row[0]).suffix) for row in rows)


READERS: dict[str, Callable[[Path, str, bool], tuple[int, Iterator[_Picture]]]] = {
    "cifar100": _torchvision("CIFAR100"),
    "flowers102": _torchvision("Flowers102"),
    "food101": _torchvision("Food101"),
    "tiny_imagenet_val": _tiny_imagenet_val,
}
