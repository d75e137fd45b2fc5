"""A classification set in the folders that two benchmarks of distilled sets read: DD-Ranking and RethinkDC.

Both open a folder with torchvision's ImageFolder, which numbers classes by the sorted names of their folders and knows
nothing else. So the whole format is the order of those names, and whatever else lies in the folder breaks it:

DD-Ranking   <out>/train/00000/00000.jpg    `compute_metrics(image_path="<out>/train")`; the class number is the name
RethinkDC    <out>/train/n01440764/00000.jpg   `rethinkdc <out>/train --hard`; it sorts the names as its val folder's

Read in ddranking 0.2.0 (metrics/*.py, utils/data.py) and rethinkdc 0.3.2 (imagenet_ipc.py, train_KD.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from focusdd_det import disk
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.config import suggest
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.interop.finished import FinishedSet
from focusdd_det.interop.folders import new_folder

# DD-Ranking numbers the classes of ImageNet's subsets by these lists of ImageNet class numbers, not by sorted name.
SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}
ORDERS = ("auto", "sorted", "set", *SUBSETS)
_HUB_MARK = "he-y"  # rethinkdc takes a path that contains it for a data set on a hub


def class_order(names: Sequence[str], order: str, synsets: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """The classes of a set in the order in which DD-Ranking numbers them.

    Args:
        order: `sorted` by name, as ImageFolder numbers the real data (ImageNet-1K, Tiny-ImageNet); `set`, as data.yaml
            does; one of SUBSETS; `auto`: the subset that has just these classes, else `sorted`.
        synsets: ImageNet-1K's synsets by class number.

    Raises:
        ConfigError: an unknown order.
        DataError: classes that are not the subset's.
    """
    if order not in ORDERS:
        raise ConfigError(f"order={order}: expected {', '.join(ORDERS)}{suggest(order, list(ORDERS))}")
    if order == "set":
        return tuple(names)
    if order in SUBSETS or (order == "auto" and len(names) == 10):
        table = synsets()
        for subset in SUBSETS if order == "auto" else (order,):
            own = tuple(table[number] for number in SUBSETS[subset])
            if set(own) == set(names):
                return own
            if order != "auto":
                missing = sorted({*own} - {*names}) or sorted({*names} - {*own})
                raise DataError(
                    f"order={order}: the set does not have just the classes of {order}: {', '.join(missing[:10])} "
                    f"differ. It has {', '.join(names[:20])}; use order=sorted or order=set"
                )
    return tuple(sorted(names))


def export_ddranking(
    source: FinishedSet, out: Path, order: str = "auto", progress: Callable[[int], object] = lambda _: None
) -> dict[str, Any]:
    """Write a classification set for DD-Ranking: class folders 00000, 00001, ... in its order of classes.

    Returns:
        The content of export.json: `classes` (folder -> class), `images`, `per_class`, `order`.

    Raises:
        ConfigError, DataError, VerifyError, DiskError: as `class_order` and `_write`.
    """
    return _write(source, out, ddranking_folders(source, order), {"format": "ddranking", "order": order}, progress)


def ddranking_folders(source: FinishedSet, order: str) -> dict[str, str]:
    """Class -> folder.

    Raises:
        ConfigError, DataError: as `class_order` and `_counts`.
    """
    _counts(source, "ddranking")
    return {name: f"{number:05d}" for number, name in enumerate(class_order(source.names, order, imagenet_synsets))}


def export_rethinkdc(
    source: FinishedSet, out: Path, val: Path | None = None, progress: Callable[[int], object] = lambda _: None
) -> dict[str, Any]:
    """Write a classification set for RethinkDC: class folders with the names that its validation folder has.

    Args:
        val: the folder that will be given as `--val-dir`; its class folders must be the set's classes.

    Returns:
        The content of export.json.

    Raises:
        ConfigError: a path that rethinkdc takes for something else.
        DataError: `val` has other classes, so that the numbers of the classes would differ.
        VerifyError, DiskError: as `_write`.
    """
    return _write(
        source, out, rethinkdc_folders(source, out, val), {"format": "rethinkdc", "order": "sorted"}, progress
    )


def rethinkdc_folders(source: FinishedSet, out: Path, val: Path | None) -> dict[str, str]:
    """Class -> folder, after all checks.

    Raises:
        ConfigError, DataError: as `export_rethinkdc`.
    """
    _counts(source, "rethinkdc")
    place = str(out / "train")
    if _HUB_MARK in place or _HUB_MARK in str(out.absolute()):
        raise ConfigError(f"out={out}: rethinkdc takes any path with `{_HUB_MARK}` in it for a hub's; choose another")
    if val is not None:
        try:
            there = sorted(path.name for path in val.iterdir() if path.is_dir())
        except OSError as error:
            raise DataError(f"val={val} cannot be read: {error.strerror}; expected class folders") from error
        if there != sorted(source.names):
            only = sorted({*there} ^ {*source.names})
            raise DataError(
                f"val={val} has {len(there)} class folders, the set {len(source.names)} classes, and they differ in "
                f"{', '.join(only[:10])}. RethinkDC numbers both by sorted folder name, so every label would be wrong; "
                "give a val folder with just these classes"
            )
    return {name: name for name in source.names}


def _write(
    source: FinishedSet,
    out: Path,
    folders: Mapping[str, str],
    about: Mapping[str, Any],
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """<out>/train/<folder>/<number>.jpg, byte for byte the set's pictures, and export.json beside train/.

    Raises:
        DataError: as `_counts`.
        VerifyError: the set is damaged.
        DiskError: `out` exists or cannot be written.
    """
    counts = _counts(source, about["format"])
    disk.refuse_overlap(out, [source.folder])
    per_class = sorted(set(counts.values()))
    content = {
        **about,
        "manifest_sha256": source.manifest_sha256,
        "images": sum(counts.values()),
        "per_class": per_class,
        "classes": {folders[name]: name for name in sorted(folders, key=lambda name: folders[name])},
    }
    done: Counter[str] = Counter()
    with new_folder(out) as work:
        for folder in folders.values():
            (work / "train" / folder).mkdir(parents=True)
        for item in source.items():
            number = done[item.class_name]
            write_atomic(work / "train" / folders[item.class_name] / f"{number:05d}.jpg", source.read("images", item))
            done[item.class_name] += 1
            progress(1)
        write_atomic(work / "export.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


def _counts(source: FinishedSet, kind: str) -> Counter[str]:
    """Pictures by class.

    Raises:
        DataError: a detection set, or a class without a picture, which would shift the numbers of all that follow.
    """
    if source.task != "classify":
        raise DataError(
            f"{source.folder} is a detection set: its composites hold objects of many classes. format={kind} wants a "
            "classification set (tools/build_cls_set.py); format=coco takes this one"
        )
    counts = Counter(item.class_name for item in source.items())
    empty = [name for name in source.names if not counts[name]]
    if empty:
        raise DataError(
            f"{source.folder} has no picture of {', '.join(empty[:10])}: classes are numbered by their folders, so "
            "those after it would get wrong numbers. Build the set with classes= of those that have pictures"
        )
    return counts
