"""COCO annotations for pictures that have YOLO labels alone, so that the official COCO mAP can be had of them.

<out>/images/<split>/*   <out>/labels/<split>/*.txt   <out>/annotations/instances_<split>.json   <out>/data.yaml
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from ultralytics.data.utils import img2label_paths

from focusdd_det import coco_eval
from focusdd_det.config import read_yaml, suggest
from focusdd_det.disk import file_sha256, refuse_overlap
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.interop.coco import boxes_of, categories, json_pieces, record
from focusdd_det.interop.folders import new_folder, require_space
from focusdd_det.labels import parse_rows
from focusdd_det.training.clean_data import refuse_cut_jpegs
from focusdd_det.training.traindata import SPLITS, load_yolo_data, resolve_data

log = logging.getLogger("focusdd")
_SHOWN = 10  # of a list of problems


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        file, label: where it and its labels lie; `label` is None for an official background.
        width, height: px, upright.
        rows: [n, 5] float64, class, cx, cy, w, h in [0, 1].
        official: whether `base` has it; then `rows` are not what is written.
    """

    file: Path
    label: Path | None
    width: int
    height: int
    rows: NDArray[np.float64]
    official: bool


@dataclass(frozen=True)
class Truth:
    """All that is written: what `read_truth` found and checked.

    Attributes:
        names: classes in the order of their numbers.
        split: the name that the one split of the new folder gets: the first of those put together.
        pictures: in the order of the splits, of one name each.
        kinds: COCO's `categories`.
        numbers: class number -> category id.
        base: its content; empty without one. `base_sha256` is its file's.
    """

    names: tuple[str, ...]
    split: str
    pictures: tuple[Picture, ...]
    kinds: Sequence[dict[str, Any]]
    numbers: Sequence[int]
    base: Mapping[str, Any] = field(default_factory=dict)
    base_sha256: str = ""

    @property
    def count(self) -> dict[str, int]:
        """Numbers of images and annotations, and of those the official ones."""
        images, rows = len(self.base.get("images", ())), len(self.base.get("annotations", ()))
        added = [picture for picture in self.pictures if not picture.official]
        return {
            "images": images + len(added),
            "annotations": rows + sum(len(picture.rows) for picture in added),
            "official_images": images,
            "official_annotations": rows,
        }


# --- what is there


def read_truth(data: str | Path, splits: Sequence[str], base: Path | None = None, subset: bool = False) -> Truth:
    """Pictures, labels and official records, all of them checked. Writes nothing.

    Args:
        data: a YOLO data.yaml, or the folder of one.
        splits: those that are put together.
        base: COCO annotations whose records win over labels.
        subset: leave out what `base` has about pictures that are not in the splits, instead of refusing.

    Raises:
        ConfigError: no such splits.
        DataError: a picture or a label file that is missing or damaged, two pictures of one name, classes without a
            category, a `base` that does not fit.
    """
    wrong = [f"`{split}`{suggest(split, list(SPLITS))}" for split in splits if split not in SPLITS]
    if wrong or not splits or len(set(splits)) < len(splits):
        got = ", ".join(wrong) or ",".join(splits) or "none"
        raise ConfigError(f"splits: expected some of {', '.join(SPLITS)}, each once, got {got}")
    file = resolve_data(data).yaml
    try:
        lacking = [split for split in splits if not read_yaml(file).get(split)]
    except ConfigError as error:
        raise DataError(f"{error}; expected a YOLO data.yaml") from error
    if lacking:
        raise DataError(f"{file} has no `{lacking[0]}:`; name other splits, or add it")
    files: list[Path] = []
    for split in splits:
        described = load_yolo_data(file, split)
        files += coco_eval.list_images(described[split])
    names = tuple(str(described["names"][i]) for i in range(len(described["names"])))
    if len(set(names)) < len(names):
        raise DataError(f"{file} gives one name to two classes; COCO matches classes by name: {', '.join(names)}")
    _refuse_one_name(files)
    official = {} if base is None else coco_eval.read_annotations(base)
    known = _official(official, files, base, subset)
    kinds = categories(names) if base is None else official["categories"]
    numbers = _numbers(names, kinds, base, all(file.name in known for file in files))
    drawn = {row["image_id"] for row in official.get("annotations", ()) if not row.get("iscrowd", 0)}
    pictures = tuple(_pictures(files, known, drawn, len(names)))
    sha256 = "" if base is None else file_sha256(base)
    return Truth(names, splits[0], pictures, kinds, numbers, official, sha256)


def _refuse_one_name(files: Sequence[Path]) -> None:
    """In one folder they would be one file, or share one label file."""
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(file.stem, file)
        if other is not file:
            raise DataError(
                f"two pictures of one name: {other} and {file}; COCO finds pictures by file name. Rename one of them "
                "with its labels, or name fewer splits"
            )


def _official(
    content: dict[str, Any], files: Sequence[Path], base: Path | None, subset: bool
) -> dict[str, dict[str, Any]]:
    """File name -> image record of `base`; with `subset` the others are taken out of its content."""
    known: dict[str, dict[str, Any]] = {}
    for image in content.get("images", ()):
        name = Path(str(image["file_name"])).name
        if name in known:
            raise DataError(f"{base} has two images that are called {name}, in different folders; rename one")
        known[name] = image
    absent = set(known) - {file.name for file in files}
    if not absent:
        return known
    if not subset:
        raise DataError(
            f"{len(absent)} of the {len(known)} images of {base} are in none of the splits, first {min(absent)}; name "
            "the splits that hold them, or take the records of the others alone with subset=true"
        )
    known = {name: image for name, image in known.items() if name not in absent}
    kept = {image["id"] for image in known.values()}
    content["images"] = list(known.values())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    return known


def _numbers(names: Sequence[str], kinds: Sequence[dict[str, Any]], base: Path | None, all_official: bool) -> list[int]:
    """Category id of each class, by name."""
    ids = {str(kind["name"]): int(kind["id"]) for kind in kinds}
    lacking = [name for name in names if name not in ids]
    if lacking:
        raise DataError(
            f"{base} has no category {', '.join(lacking[:_SHOWN])}, which data.yaml has; classes are matched by name. "
            f"Its categories: {', '.join(ids)}. Rename the classes in a copy of data.yaml, or leave base= out"
        )
    more = [name for name in ids if name not in names]
    if more and not all_official:
        raise DataError(
            f"{base} has {len(more)} categories that data.yaml has not ({', '.join(more[:_SHOWN])}): on pictures that "
            "are added from labels every detection of them would count as wrong. Use labels of all its categories"
        )
    return [ids[name] for name in names]


def _pictures(
    files: Sequence[Path], known: Mapping[str, dict[str, Any]], drawn: set[int], classes: int
) -> Iterator[Picture]:
    """Each picture with its rows.

    Args:
        drawn: official images with objects that labels can hold (a crowd is none).
    """
    problems, repeated = [], 0
    for file, label in zip(files, map(Path, img2label_paths(list(files))), strict=True):
        height, width = coco_eval.height_width(str(file))
        refuse_cut_jpegs([str(file)])  # stock Ultralytics would write over it, and so over the original of a hard link
        image = known.get(file.name)
        if image is not None and (image.get("width", width), image.get("height", height)) != (width, height):
            told = f"{image['width']} x {image['height']} px"
            raise DataError(f"{file} is {width} x {height} px, official records say {told}; it is another picture")
        background = image is not None and image["id"] not in drawn
        try:
            found = _rows(label.read_text(encoding="utf-8-sig"), classes)
            rows = _once(found)
            repeated += len(found) - len(rows)
            yield Picture(file, label, width, height, rows, image is not None)
        except FileNotFoundError:
            if background:  # Ultralytics' labels of COCO have no files for such
                yield Picture(file, None, width, height, np.zeros((0, 5)), True)
            else:
                problems.append(f"{label} is missing; a picture without objects has an empty one")
        except OSError as error:
            problems.append(f"{label}: {error.strerror}")
        except ValueError as error:
            problems.append(f"{label}: {error}")
    if problems:
        listed = "\n  ".join([*problems[:_SHOWN], *["..."][: len(problems) - _SHOWN]])
        raise DataError(f"{len(problems)} of {len(files)} label files cannot be used:\n  {listed}\nMend them")
    if repeated:
        log.warning("%d label rows stand twice in their file; each counts once, as in Ultralytics", repeated)


def _rows(text: str, classes: int) -> NDArray[np.float64]:
    """As `parse_rows`; a polygon (class x1 y1 x2 y2 x3 y3 ..., as in Ultralytics' labels of COCO) counts as its box."""
    return np.asarray(parse_rows("".join(f"{_as_box(line)}\n" for line in text.splitlines()), classes))


def _once(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the rows that repeat an earlier one, in float32 as Ultralytics compares them."""
    if not len(rows):
        return rows
    first = np.unique(rows.astype(np.float32), axis=0, return_index=True)[1]
    return rows[np.sort(first)]


def _as_box(line: str) -> str:
    fields = line.split()
    if len(fields) < 7 or len(fields) % 2 == 0:
        return line
    with contextlib.suppress(ValueError):
        points = np.array(fields[1:], np.float64).reshape(-1, 2)
        if ((points >= 0) & (points <= 1)).all():
            low, high = points.min(axis=0), points.max(axis=0)
            return " ".join([fields[0], *(repr(float(v)) for v in (*((low + high) / 2), *(high - low)))])
    return line


# --- what is written


def write_truth(truth: Truth, out: Path, progress: Callable[[int], object] = lambda _: None) -> dict[str, int]:
    """The new folder. Pictures are hard links where the file system has them, else copies; labels are copies.

    Returns:
        `truth.count`.

    Raises:
        ConfigError: `out` lies among the pictures.
        DiskError: `out` exists or cannot be written.
    """
    refuse_overlap(out, dict.fromkeys(picture.file.parent for picture in truth.pictures))
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    sizes = [(picture.file.stat(), len(picture.rows)) for picture in truth.pictures]
    device = place.stat().st_dev
    require_space(out, sum(400 * (1 + rows) + (s.st_size if s.st_dev != device else 0) for s, rows in sizes))
    with new_folder(out) as work:
        images, labels = work / "images" / truth.split, work / "labels" / truth.split
        for folder in (images, labels, work / "annotations"):
            folder.mkdir(parents=True)
        for picture in truth.pictures:
            _link(picture.file, images / picture.file.name)
            if picture.label is not None:
                shutil.copyfile(picture.label, labels / f"{picture.file.stem}.txt")
            progress(1)
        with (work / file_of(truth.split)).open("w", encoding="ascii") as file:
            file.writelines(json_pieces(_content(truth)))
        where = f"images/{truth.split}"
        described = {"train": where, "val": where, "names": dict(enumerate(truth.names))}
        note = "# made by `focusdd annotations`: for evaluation; train: is there because Ultralytics wants one\n"
        (work / "data.yaml").write_text(note + yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    return truth.count


def file_of(split: str) -> str:
    """Where the annotations lie in the new folder: where tools/val_coco.py looks for them."""
    return f"annotations/instances_{split}.json"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, a file of somebody else's, a file system without links
        shutil.copyfile(source, target)


def _content(truth: Truth) -> dict[str, Any]:
    """COCO's JSON; its lists are iterators, the official rows first and unchanged."""
    images, rows = truth.base.get("images", ()), truth.base.get("annotations", ())
    added = [picture for picture in truth.pictures if not picture.official]
    ids = _image_ids([picture.file for picture in added], {int(image["id"]) for image in images})
    first = 1 + max((row["id"] for row in rows if isinstance(row.get("id"), int)), default=0)

    def pictures() -> Iterator[dict[str, Any]]:
        yield from images
        for number, p in zip(ids, added, strict=True):
            yield {"id": number, "file_name": p.file.name, "width": p.width, "height": p.height}

    def annotations() -> Iterator[dict[str, Any]]:
        yield from rows
        number = first
        for image, p in zip(ids, added, strict=True):
            for row, box in zip(p.rows, boxes_of(p.rows, p.width, p.height), strict=True):
                yield {"id": number, "image_id": image, **record(truth.numbers[int(row[0])], box)}
                number += 1

    told = "boxes from YOLO labels" + (", but for the images and annotations of base" if truth.base else "")
    info = {"description": told, "version": "1", **truth.count}
    return {
        "info": {**info, "base_sha256": truth.base_sha256} if truth.base else info,
        "licenses": truth.base.get("licenses", []),
        "images": pictures(),
        "annotations": annotations(),
        "categories": truth.kinds,
    }


def _image_ids(files: Sequence[Path], taken: set[int]) -> list[int]:
    """The numbers that the files are called by, as COCO's are and as Ultralytics writes detections; where a name is no
    number of its own, all are counted on from the last official one."""
    stems = [file.stem for file in files]
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 12 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len({*numbers, *taken}) == len(numbers) + len(taken):
            return numbers
    return list(range(max(taken, default=0) + 1, max(taken, default=0) + 1 + len(files)))
