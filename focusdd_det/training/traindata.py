"""What `data=` and `eval_data=` mean: a distilled set of ours, or any YOLO data.yaml; nothing is ever
downloaded."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DATASETS_DIR, LOGGER, RANK, ROOT, USER_CONFIG_DIR

from focusdd_det import detset, disk
from focusdd_det.config import read_yaml
from focusdd_det.errors import ConfigError, DataError, VerifyError
from focusdd_det.training.clean_data import CleanDataset

SPLITS = ("train", "val", "test")
MANY = 1000  # composites from which checking them is announced, because it takes seconds


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
        DataError: missing.
        VerifyError: a set that is unfinished or not, to the byte, what its manifest says.
    """
    if data is None:
        raise DataError("data= is missing; expected the folder of a distilled set, or a YOLO data.yaml")
    path = Path(data)
    if path.is_dir():
        if path.name.endswith(disk.INCOMPLETE):
            raise VerifyError(f"{path} is a set whose build has not finished; run the build again, it goes on")
        file = path / "data.yaml"
        if not file.is_file():
            raise DataError(f"{path} has no data.yaml; expected the folder of a distilled set, or a YOLO data.yaml")
    else:
        file = path if path.is_file() else _bundled(path)
    if detset.task_of(file.parent) == "classify":
        raise DataError(f"{file.parent} is a set for classifiers; train one with `focusdd classify train`")
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
    if not (folder / "COMPLETE").is_file():
        raise VerifyError(f"{folder} has no COMPLETE file: its build has not finished; run the build again")
    items = list(detset.read_manifest(folder))
    if RANK in {-1, 0}:
        _verify(folder, len(items))
    covered = tuple(dict.fromkeys(item.class_name for item in items))
    return TrainData(file, folder, len(items), disk.file_sha256(folder / "manifest.jsonl"), covered)


def _verify(folder: Path, count: int) -> None:
    if count >= MANY:
        LOGGER.info(f"{folder}: checking {count} composites against the manifest...")
    began = time.perf_counter()
    problems = detset.verify(folder)
    if count >= MANY:
        LOGGER.info(f"{folder}: checked in {time.perf_counter() - began:.1f} s")
    if problems:
        shown = "\n  ".join([*problems[:10], *([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])])
        raise VerifyError(
            f"{folder} is not the set that was built:\n  {shown}\nRun its build again with --resume, which repairs "
            "what is damaged, or copy the set again"
        )


def load_yolo_data(file: Path, split: str) -> dict[str, Any]:
    """Ultralytics' own reading of a data.yaml: names, nc, channels and resolved paths. Never downloads.

    A relative `path:` is tried from the working directory, as in Ultralytics, then from the file's own folder, then
    from Ultralytics' datasets folder.

    Raises:
        DataError: pictures missing, keys missing, names and nc that disagree.
    """
    provide_font()
    try:
        content = {key: value for key, value in read_yaml(file).items() if key != "download"}
        with _as_file({**content, "path": str(_data_root(file, content, split))}) as resolved:
            data: dict[str, Any] = check_det_dataset(str(resolved), autodownload=False, split=split)
    except DataError:
        raise
    except ConfigError as error:
        raise DataError(f"{error}; expected a YOLO data.yaml") from error
    except Exception as error:  # Ultralytics raises FileNotFoundError, SyntaxError, TypeError, AssertionError
        raise DataError(f"{file} cannot be used: {str(error).strip()}") from error
    return {**data, "yaml_file": str(file)}


def _data_root(file: Path, content: Mapping[str, Any], split: str) -> Path:
    """The folder that a data.yaml's paths start from: where the pictures of the split are."""
    relative = Path(str(content.get("path") or file.resolve().parent))
    roots = list(dict.fromkeys(base.resolve() / relative for base in (Path(), file.parent, Path(DATASETS_DIR))))
    value = content.get(split)
    entries = [str(entry) for entry in (value if isinstance(value, list) else [value]) if entry]
    for root in roots:
        # Ultralytics forgives one `../` too many
        if all((root / entry).exists() or (root / entry.removeprefix("../")).exists() for entry in entries):
            return root
    tried = "\n  ".join(str(root) for root in roots)
    raise DataError(
        f"{file}: images not found: `{split}: {value}` is in none of these folders:\n  {tried}\n"
        "Put the pictures there, or write where they are as `path:`; nothing is downloaded"
    )


@contextlib.contextmanager
def _as_file(content: Mapping[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="focusdd-data-") as folder:
        path = Path(folder) / "data.yaml"
        path.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
        yield path


def resolved_yaml(data: Mapping[str, Any]) -> contextlib.AbstractContextManager[Path]:
    """Inside, a data.yaml with absolute paths for code of Ultralytics that insists on reading one."""
    content = {key: data[key] for key in ("names", "channels", *SPLITS) if data.get(key)}
    return _as_file({**content, "path": str(data["path"])})


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
