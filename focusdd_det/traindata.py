"""What `data=` and `eval_data=` mean: a distilled set of ours, or any YOLO data.yaml; nothing is ever
downloaded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import ROOT, USER_CONFIG_DIR

from focusdd_det import detset
from focusdd_det.config import read_yaml
from focusdd_det.errors import DataError, VerifyError
from focusdd_det.replay import CleanDataset
from focusdd_det.teacher import file_sha256

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TrainData:
    """Where a run's training pictures come from.

    Attributes:
        yaml: the data.yaml.
        folder: the set's folder if it is a distilled set of ours, else None.
        count: number of composites the manifest lists; 0 if it is not a set.
        manifest_sha256: hex digest of manifest.jsonl; empty if it is not a set.
        covered: classes that composites were made for, in manifest order; empty if it is not a set.
    """

    yaml: Path
    folder: Path | None
    count: int
    manifest_sha256: str
    covered: tuple[str, ...]

    def __str__(self) -> str:
        if self.folder is None:
            return f"{self.yaml} (a YOLO data set)"
        return f"{self.folder} (a distilled set of {self.count} composites, {len(self.covered)} classes)"


def resolve_data(data: str | os.PathLike[str] | None) -> TrainData:
    """A set's folder, its data.yaml, or any YOLO data.yaml, by path or by Ultralytics' own name (coco8.yaml).

    Raises:
        DataError: missing; or a set's data.yaml that wants a download, has a `path:` key, or leaves its
            folder.
        VerifyError: a set that is unfinished or not what its manifest says.
    """
    if data is None:
        raise DataError("data= is missing; expected the folder of a distilled set, or a YOLO data.yaml")
    path = Path(data)
    if path.is_dir():
        if path.name.endswith(detset.INCOMPLETE):
            raise VerifyError(f"{path} is a set whose build has not finished; run the build again, it goes on")
        file = path / "data.yaml"
        if not file.is_file():
            raise DataError(f"{path} has no data.yaml; expected the folder of a distilled set, or a YOLO data.yaml")
    else:
        file = path if path.is_file() else _bundled(path)
    if not (file.parent / "build.yaml").is_file():
        return TrainData(file, None, 0, "", ())
    return _resolve_set(file)


def _bundled(path: Path) -> Path:
    known: Path = ROOT / "cfg" / "datasets" / path.name
    if path.parent == Path() and known.is_file():
        return known
    raise DataError(
        f"data not found: {path} (looked in {Path.cwd()}); expected the folder of a distilled set, or a YOLO data.yaml"
    )


def _resolve_set(file: Path) -> TrainData:
    folder = file.parent
    content = read_yaml(file)
    if "download" in content:
        raise DataError(f"{file} has a `download:` key; a distilled set holds its own pictures. Remove the key")
    if "path" in content:
        raise DataError(f"{file} has a `path:` key; in a distilled set paths are relative to its folder. Remove it")
    for split in SPLITS:
        value = content.get(split)
        for entry in value if isinstance(value, list) else [value] if value else []:
            text = str(entry)
            parts = PurePosixPath(text.replace("\\", "/"))
            if parts.is_absolute() or PureWindowsPath(text).is_absolute() or ".." in parts.parts:
                raise DataError(f"{file}: `{split}: {text}` leaves the set's folder; expected a path inside it")
            if not (folder / text).resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{file}: `{split}: {text}` is a link that leaves the set's folder")
    if not (folder / "COMPLETE").is_file():
        raise VerifyError(f"{folder} has no COMPLETE file: its build has not finished; run the build again")
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise VerifyError(f"{folder} has no manifest.jsonl, so it cannot be checked; build the set again")
    items = list(detset.read_manifest(folder))
    covered = tuple(dict.fromkeys(item.class_name for item in items))
    return TrainData(file, folder, len(items), file_sha256(manifest), covered)


def load_yolo_data(file: Path, split: str) -> dict[str, Any]:
    """Ultralytics' own reading of a data.yaml: names, nc, channels and resolved paths. Never downloads.

    Raises:
        DataError: pictures missing, keys missing, names and nc that disagree.
    """
    provide_font()
    try:
        data: dict[str, Any] = check_det_dataset(str(file), autodownload=False, split=split)
    except Exception as error:  # Ultralytics raises FileNotFoundError, SyntaxError, TypeError, AssertionError
        raise DataError(f"{file} cannot be used: {str(error).strip()}") from error
    return data


@cache
def provide_font() -> None:
    """Give Ultralytics' plots a font without a download: matplotlib's own, under the names that are looked
    for.

    Only in this process: nothing is put into the user's configuration.
    """
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    missing = [
        name
        for name in ("Arial.ttf", "Arial.Unicode.ttf")
        if not (USER_CONFIG_DIR / name).exists() and not any(name in entry.fname for entry in fonts.ttflist)
    ]
    if not missing:
        return
    folder = Path(tempfile.mkdtemp(prefix="focusdd-font-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    source = font_manager.findfont("DejaVu Sans")
    for name in missing:
        shutil.copyfile(source, folder / name)
        fonts.addfont(str(folder / name))


def rename_classes(dataset: CleanDataset, names: dict[int, str], wanted: dict[int, str]) -> None:
    """Class numbers of the evaluation data into the training data's, by name; other classes are dropped."""
    index = {name: i for i, name in wanted.items()}
    table = {i: index.get(name, -1) for i, name in names.items()}
    for label in dataset.labels:
        classes = label["cls"][:, 0].astype(int)
        new = classes.copy()
        for k, old in enumerate(classes):
            new[k] = table[int(old)]
        keep = new >= 0
        label["cls"] = new[keep, None].astype(label["cls"].dtype)
        label["bboxes"] = label["bboxes"][keep]
        if label["segments"]:
            label["segments"] = [s for s, k in zip(label["segments"], keep, strict=True) if k]


def check_count(dataset: CleanDataset, source: TrainData) -> None:
    """Every composite of the manifest, and no other picture, is trained on.

    Raises:
        VerifyError: Ultralytics dropped some, or a label file is missing.
    """
    if len(dataset) == source.count and not dataset.missing_labels:
        return
    told = "\n  ".join(dataset.dropped[:5]) or "images without a label file"
    raise VerifyError(
        f"{source.folder}: the manifest lists {source.count} composites, but Ultralytics keeps {len(dataset)} "
        f"images ({dataset.missing_labels} without labels).\n  {told}\nThe set is damaged or was edited; build it again"
    )
