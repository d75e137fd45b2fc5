"""The card of a set with measured numbers: read from the runs' own JSON files, never typed in.

accuracy.json     of a classifier's run (tools/train_cls.py)
coco_eval.json    of a detector's run (tools/train_det.py), or of tools/val_coco.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focusdd_det.config import parse_yaml, suggest
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.interop.finished import FinishedSet
from focusdd_det.report import NUMBERS_HEADING, front_matter, licence_cell, plain

_HEAD = re.compile(r"---\n(.*?)---\n", re.DOTALL)
_LARGEST = 64 << 20  # bytes of a result file


def card_with_results(
    source: FinishedSet,
    results: Sequence[Path],
    licences: Mapping[str, str] | None = None,
    head: Mapping[str, str] | None = None,
) -> str:
    """The set's card with the numbers of runs that were trained on it.

    Args:
        results: accuracy.json or coco_eval.json files.
        licences: source -> the licence of its pictures.
        head: values for the YAML head: `license`, `pretty_name`.

    Raises:
        ConfigError: a licence for a source that the set does not have.
        DataError: a file that is no result, or the result of a run on another set.
    """
    text = (source.folder / "README.md").read_text(encoding="utf-8")
    for root, licence in (licences or {}).items():
        if licence_cell(root) not in text:
            roots = re.findall(r"\| that of the pictures in `([^`]*)` \|", text)
            told = f"the set has no source {root}{suggest(root, roots)}"
            raise ConfigError(f"licence.{root}: {told}; it has {', '.join(roots) or 'none'}")
        text = text.replace(licence_cell(root), f"| {plain(licence)} |")
    if head:
        text = _with_head(text, head, source.folder / "README.md")
    if results:
        text = _with_section(text, NUMBERS_HEADING, _numbers(source, results))
    return text


def _with_head(text: str, values: Mapping[str, str], path: Path) -> str:
    found = _HEAD.match(text)
    try:
        content = parse_yaml(found[1]) if found else None
    except ValueError:
        content = None
    if not found or not isinstance(content, dict):
        raise DataError(f"{path} has no YAML head; build the set again with this version, or write the card by hand")
    if values.get("license", "other") != "other":
        content = {key: value for key, value in content.items() if key not in ("license_name", "license_link")}
    return front_matter({**content, **values}) + text[found.end() :]


def _with_section(text: str, heading: str, body: str) -> str:
    """A card with this section in the place of the one of that heading, or at the end."""
    section = f"{heading}\n\n{body}\n"
    start = text.find(f"\n{heading}\n")
    if start < 0:
        return f"{text.rstrip()}\n\n{section}"
    end = text.find("\n## ", start + len(heading))
    return text[: start + 1] + section + (text[end:] if end >= 0 else "")


def _numbers(source: FinishedSet, results: Sequence[Path]) -> str:
    rows = []
    for path in results:
        content = _read(path)
        if source.task == "classify":
            rows.append(_accuracy_row(source, path, content))
        else:
            rows += _coco_rows(source, path, content)
    titles = (
        ("run", "top-1", "top-5", "pictures", "epoch", "labels", "imgsz", "on this set?")
        if source.task == "classify"
        else ("run", "weights", "mAP", "mAP, classes covered", "AP50", "pictures", "imgsz", "on this set?")
    )
    table = [titles, ["---"] * len(titles), *rows]
    what = (
        "Top-1 and top-5 of the last epoch, in percent, on real pictures that the run was given."
        if source.task == "classify"
        else "COCO mAP (0.50:0.95) by pycocotools, in percent."
    )
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join(
        [
            f"{what} Read from the runs' own files; one run is one seed, and says nothing about the next.",
            "",
            *lines,
            "",
            f"The set is the one whose manifest.jsonl has the sha256 `{source.manifest_sha256}`.",
        ]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large for a result")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"results: {path} is no result of a run: {error}; give accuracy.json or coco_eval.json"
        ) from error
    return content


def _accuracy_row(source: FinishedSet, path: Path, content: Mapping[str, Any]) -> list[str]:
    try:
        last, trained_on = content["last"], content["sha256"]["set"]
        if last is None:
            raise DataError(f"results: {path} holds no accuracy: the run had no eval_data")
        if last["meaning"] != "headline":
            raise DataError(f"results: {path} was measured {last['meaning']}: that is no accuracy of anything")
        _same_set(source, path, trained_on)
        return [
            plain(path.absolute().parent.name),
            _percent(last["top1"] / 100),
            _percent(last["top5"] / 100),
            plain(str(last["n"])),
            plain(str(last["epoch"])),
            plain(str(content["labels"])),
            plain(str(content["imgsz"])),
            "yes",
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"results: {path} is not an accuracy.json of tools/train_cls.py ({type(error).__name__}: {error})"
        ) from error


def _coco_rows(source: FinishedSet, path: Path, content: Mapping[str, Any]) -> list[list[str]]:
    """A row for each checkpoint: a run's file has `last` and `best`, that of tools/val_coco.py is one result."""
    known = _run_set(path)
    if known is not None:
        _same_set(source, path, known)
    found = [content] if "all" in content else [content[key] for key in ("last", "best") if key in content]
    rows = []
    try:
        if not found:
            raise KeyError("all")
        for result in found:
            covered = result["covered"]
            subset = "" if result["images"] == result["images_annotated"] else f" of {result['images_annotated']}"
            meaning = f" ({result['meaning']})" if "meaning" in result else ""
            rows.append(
                [
                    plain(_run_folder(path).name),
                    plain(Path(str(result["weights"])).name + meaning),
                    _percent(result["all"]["AP"]),
                    f"{_percent(covered['AP'])} ({len(result['covered_classes'])})" if covered else "-",
                    _percent(result["all"]["AP50"]),
                    plain(f"{result['images']}{subset}"),
                    plain(str(result["settings"]["imgsz"])),
                    "not recorded beside the file" if known is None else "yes",
                ]
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"results: {path} is not a coco_eval.json of tools/train_det.py or tools/val_coco.py "
            f"({type(error).__name__}: {error})"
        ) from error
    return rows


def _run_folder(path: Path) -> Path:
    """The folder of the run: val_coco.py writes beside the checkpoint, in its weights/."""
    parent = path.absolute().parent
    return parent.parent if parent.name == "weights" else parent


def _run_set(path: Path) -> str | None:
    """The manifest's sha256 that the run's focusdd.yaml names, empty if it was trained on no set; None without one."""
    try:
        content = parse_yaml((_run_folder(path) / "focusdd.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or "set_manifest_sha256" not in content:
        return None
    return str(content["set_manifest_sha256"] or "")


def _same_set(source: FinishedSet, path: Path, digest: Any) -> None:
    if digest != source.manifest_sha256:
        raise DataError(
            f"results: the run of {path} was trained on another set (manifest sha256 {str(digest)[:12] or 'none'}) "
            f"than {source.folder} ({source.manifest_sha256[:12]}); its numbers do not belong on this card"
        )


def _percent(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no share")
    return f"{100 * value:.2f}"
