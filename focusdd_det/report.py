"""The dataset card and the contact sheet of a set: what people look at before they train on it."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import PIL.Image
import yaml
from PIL.PngImagePlugin import PngInfo

from focusdd_det.compose import resize
from focusdd_det.detset import Cell, Item, part_path
from focusdd_det.labels import parse_rows
from focusdd_det.scoring.decode import decode
from focusdd_det.types import Image

if TYPE_CHECKING:
    from focusdd_det.plan import Plan

SHEET_MARK = "focusdd sheet"  # stands in every contact sheet, so that no other picture is ever overwritten
_TILE = 320  # px of a composite on the contact sheet
NUMBERS_HEADING = "## Measured numbers"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_NO_NUMBERS = """This file is sealed with the set, before anything was trained on it: it has none of its own. The
results of a training belong beside it: `focusdd card SET results=RUN/{file} out=card.md` writes a copy of this card
with the numbers of runs that were trained on this very set."""
_LOAD_DETECT = """from ultralytics import YOLO
YOLO("yolo11n.yaml").train(data="SET/data.yaml")

import supervision as sv
sv.DetectionDataset.from_yolo("SET/images/train", "SET/labels/train", "SET/data.yaml")

import fiftyone as fo
fo.Dataset.from_dir("SET", dataset_type=fo.types.YOLOv5Dataset, yaml_path="data.yaml", split="train")

from datasets import load_dataset  # the pictures alone
load_dataset("SET", split="train")
"""
_LOAD_CLASSIFY = """from torchvision.datasets import ImageFolder
ImageFolder("SET/train")

import supervision as sv
sv.ClassificationDataset.from_folder_structure("SET/train")

import fiftyone as fo
fo.Dataset.from_dir("SET/train", dataset_type=fo.types.ImageClassificationDirectoryTree)

from datasets import load_dataset  # classes are numbered by the sorted names of their folders
load_dataset("SET", split="train")
"""
_HOW = {  # method -> what it does
    "focusdd": "A vision transformer looks at every photograph; the windows of highest attention in the photographs of "
    "highest score are cut out of the originals, others are shown whole.",
    "ranked_crops": "A vision transformer looks at every photograph; any windows of the photographs of highest score "
    "are cut out of the originals, where the published FocusDD cuts those of highest attention.",
}
_ELSE = "docs/methods.md of focusdd_det says what it does; it is not the published FocusDD."
_CITATION = """## Citation

It builds on FocusDD; focusdd_det, which made this set, is an independent implementation of that.

```bibtex
@misc{focusdd,
  title  = {{FocusDD}: Real-World Scene Infusion for Robust Dataset Distillation},
  author = {Hu and others},
  year   = {2025},
  eprint = {2501.06405},
  archivePrefix = {arXiv},
  note   = {Published as {FocusDC}, CPAL 2026, PMLR 328}
}
```

Cite the sources of the pictures as their own pages ask for."""


def card(
    items: Sequence[Item],
    plan: Plan,
    identity: dict[str, Any],
    counts: dict[str, tuple[int, int]],
    blind: Sequence[str] = (),
    blank: Mapping[str, int] | None = None,
) -> str:
    """README.md of a set, in the form of a Hugging Face dataset card. The same text for the same bytes.

    Args:
        items: the composites, in plan order.
        plan: what was planned.
        identity: the content of build.yaml.
        counts: class -> (usable sources, unusable ones).
        blind: classes that the ViT does not know.
        blank: class -> usable sources that were passed over because of `least_entropy`; None: it is off.
    """
    boxed = identity.get("task", "detect") == "detect"
    sections = [
        _front_matter(len(items), len(plan.class_map.names), identity, boxed),
        _what(items, identity, boxed),
        _method(items, identity, boxed),
        _sources(items, counts, identity, blank),
        _contents(items, plan, identity, blind, boxed),
        _limits(identity, boxed),
        NUMBERS_HEADING + "\n\n" + _NO_NUMBERS.format(file="coco_eval.json" if boxed else "accuracy.json"),
        _loading(boxed),
        _CITATION,
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def front_matter(content: dict[str, Any]) -> str:
    """The YAML head of a card."""
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def licence_cell(root: str) -> str:
    """What stands for the licence of a root's pictures until somebody names it: see interop/card.py."""
    return f"| that of the pictures in `{plain(root)}` |"


def plain(text: str) -> str:
    """A name as it can stand in a Markdown table: on one line, without marks that end a cell or a code span."""
    return "".join(c if c.isprintable() and c not in "|`<>" else "?" for c in text)


def _front_matter(composites: int, classes: int, identity: dict[str, Any], boxed: bool) -> str:
    config = identity["config"]
    most = next((text for limit, text in _SIZES if composites < limit), "n>1M")
    return front_matter(
        {
            "pretty_name": f"Distilled {'detection' if boxed else 'classification'} set ({config['method']}, "
            f"{composites} composites, {classes} classes)",
            "license": "other",
            "license_name": "that-of-the-source-pictures",
            "license_link": "README.md",
            "task_categories": ["object-detection" if boxed else "image-classification"],
            "annotations_creators": ["machine-generated"],
            "size_categories": [most],
            "tags": ["dataset-distillation", "focusdd", f"method-{config['method']}"],
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": "images/train/*.jpg" if boxed else "train/*/*.jpg"}],
                    "drop_labels": boxed,
                }
            ],
        }
    )


def _what(items: Sequence[Item], identity: dict[str, Any], boxed: bool) -> str:
    config = identity["config"]
    kind = "detection" if boxed else "classification"
    labels = (
        f"Boxes and soft targets come from the teacher `{plain(identity['teacher']['name'])}`; nobody drew a box."
        if boxed
        else "A composite's class is that of its sources: the folder it lies in. Soft labels are made from it by "
        "tools/relabel_cls.py and lie elsewhere."
    )
    unit = f" (`ipc_unit: {config['ipc_unit']}`)" if boxed else ""
    cells = " or ".join(f"{n} x {n}" for n in _grids(items))
    return f"""# A distilled {kind} set

{len(items)} composites of {cells} cells, {config["image_size"]} px, method \
`{config["method"]}`, {config["ipc"]} a class asked for{unit}, seed {config["seed"]}. {labels}

It is training data only: a small stand-in for the photographs it was made from. It has no pictures to test on\
{"; `val:` in data.yaml repeats the training pictures because Ultralytics wants such a key" if boxed else ""}."""


def _grids(items: Sequence[Item]) -> list[int]:
    return sorted({item.grid for item in items})


def _method(items: Sequence[Item], identity: dict[str, Any], boxed: bool) -> str:
    config = identity["config"]
    kinds = Counter(cell.kind for item in items for cell in item.cells)
    lines = [
        f"- Selection: method `{config['method']}`, {kinds['key']} key patches and {kinds['background']} sources shown "
        "whole in all. " + _HOW.get(config["method"], _ELSE)
    ]
    if identity["selector"]:
        own = identity["selector"]
        lines.append(f"- Selector: `{plain(own['name'])}`, view {own['view']} px, sha256 `{own['sha256']}`.")
    if boxed:
        own = identity["teacher"]
        lines.append(
            f"- Teacher: `{plain(own['name'])}`, sha256 `{own['sha256']}`, on the {config['label_on']}, confidence "
            f"from {config['conf']}, IoU {config['iou']}, boxes under {config['min_side']:g} px dropped."
        )
    shown = ("seed", "attention", "alpha", "side_ratio", "geometry", "crop", "selection", "stratify", "jpeg_quality")
    lines.append("- Settings: " + ", ".join(f"`{key}={config[key]}`" for key in shown) + "; all of them: build.yaml.")
    lines.append("- Made by focusdd_det " + str(identity["versions"]["focusdd_det"]) + "; manifest.jsonl names, for ")
    lines[-1] += "every cell, the source picture, its sha256 and the crop."
    return "## How it was made\n\n" + "\n".join(lines)


def _sources(
    items: Sequence[Item],
    counts: dict[str, tuple[int, int]],
    identity: dict[str, Any],
    blank: Mapping[str, int] | None,
) -> str:
    usable = sum(good for good, _ in counts.values())
    bad = sum(count for _, count in counts.values())
    cells: Counter[str] = Counter()
    pictures: dict[str, set[str]] = defaultdict(set)
    folders: dict[str, set[str]] = defaultdict(set)
    for cell in (cell for item in items for cell in item.cells):
        cells[cell.root] += 1
        pictures[cell.root].add(cell.sha256)
        folders[cell.root].add(cell.folder)
    rows = [
        f"| {plain(root)} | {cells[root]} | {len(pictures[root])} | {len(folders[root])} {licence_cell(root)}"
        for root in sorted(cells)
    ]
    return "\n".join(
        [
            "## Sources and licences",
            "",
            "The pictures are cut out of photographs with licences of their own: this set may be used as they may. "
            "A source is the folder that was given to the build, by its name:",
            "",
            "| source | cells | different pictures | class folders | licence |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"- sources: {usable} usable, {bad} quarantined (reasons: quarantine.jsonl)",
            *(() if blank is None else (_passed_over(blank, usable, identity["config"]["least_entropy"]),)),
        ]
    )


def _passed_over(blank: Mapping[str, int], usable: int, least: float) -> str:
    by_class = _names([f"{name} {count}" for name, count in blank.items()])
    return (
        f"- passed over, grey levels of less than {least:g} bits of entropy (clip art, cut-outs on a blank ground): "
        f"{sum(blank.values())} of the {usable} usable" + (f": {by_class}" if by_class else "")
    )


def _contents(items: Sequence[Item], plan: Plan, identity: dict[str, Any], blind: Sequence[str], boxed: bool) -> str:
    config = identity["config"]
    keys = [c for item in items for c in item.cells if c.kind == "key"]
    # px of a source a px of its cell; 1 is the source's own size
    scales = [
        (c.crop[2] if c.crop else max(c.width, c.height)) / (config["image_size"] // item.grid)
        for item in items
        for c in item.cells
    ]
    enlarged = sum(scale < 1 for scale in scales) / len(scales)
    beyond = sum(scale * 2 < 1 for scale in scales) / len(scales)
    px = " or ".join(str(config["image_size"] // n) for n in _grids(items))
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_group[item.group].append(item)
    lines = [
        "## Classes and contents",
        "",
        *(_box_lines(items, keys) if boxed else ()),
        f"- cells enlarged to {px} px: {enlarged:.1%}; beyond 2x: {beyond:.1%}",
        f"- classes covered: {len({i.class_name for i in items})} of {len(plan.class_map.names)}",
    ]
    if blind:
        lines.append(f"- the selector knows no class for {_names(blind)}: its largest probability stood in")
    if plan.uncovered:
        lines.append(f"- not covered: {_names(plan.uncovered)}")
    planned = {group.name: group.ipc for group in plan.groups}
    fewer = [f"{name} {len(by_group[name])}" for name in planned if len(by_group[name]) < config["ipc"]]
    if fewer:
        lines.append(f"- fewer than {config['ipc']} composites: {_names(fewer)}")
    if plan.short and config["short_class"] == "skip":
        lines.append(f"- left out, too few sources: {_names(sorted(plan.short))}")
    if not boxed:
        lines += ["", "| class | composites | mean p of its key patches | mean share |", "|---|---|---|---|"]
        lines += [_class_row(name, members) for name, members in by_group.items()]
        return "\n".join(lines)
    lines += ["", "| class | composites | replaced | boxes | key cells confirmed |", "|---|---|---|---|---|"]
    for name, members in by_group.items():
        own = [c for item in members for c in item.cells if c.kind == "key"]
        replaced = max(item.proposal for item in members) + 1 - len(members)
        confirmed = f"{sum(c.confirmed for c in own)} of {len(own)}" if own else "-"
        boxes = sum(i.boxes for i in members)
        lines.append(f"| {plain(name)} | {len(members)} | {replaced} | {boxes} | {confirmed} |")
    return "\n".join(lines)


def _limits(identity: dict[str, Any], boxed: bool) -> str:
    lines = ["- The formulas of the method are reconstructed from its published text."]
    if boxed:
        lines += [
            "- The boxes are a detector's: objects that it misses have none, its mistakes are in the labels, and a set "
            "cannot be used to measure that detector. A composite holds objects of other classes than the one it was "
            "made for.",
            "- Objects are cut at the edges of cells, where no camera would cut them.",
        ]
    else:
        lines.append("- A composite is given one class, that of its folder, whatever else its cells show.")
    if identity["selector"]:
        lines.append(
            "- The selector prefers what it is sure of: typical, large, well-lit views. Rare views, and the people and "
            "places that its own training pictures lack, are rarer here than in the sources."
        )
    lines.append("- Whatever is skewed in the sources (who took them, where, of what) is skewed here.")
    return "## Limits\n\n" + "\n".join(lines)


def _loading(boxed: bool) -> str:
    return "## How to load it\n\n```python\n" + (_LOAD_DETECT if boxed else _LOAD_CLASSIFY) + "```"


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(plain, names))


def _box_lines(items: Sequence[Item], keys: Sequence[Cell]) -> list[str]:
    return [
        f"- boxes: {sum(i.boxes for i in items)}, {sum(i.boxes for i in items) / len(items):.2f} a composite; "
        f"{sum(i.boxes == 0 for i in items)} composites without a box",
        f"- key cells in which the teacher confirms the class of the source: "
        f"{sum(c.confirmed for c in keys)} of {len(keys)}"
        + (f" ({sum(c.confirmed for c in keys) / len(keys):.1%})" if keys else ""),
    ]


def _class_row(name: str, members: Sequence[Item]) -> str:
    keys = [cell for item in members for cell in item.cells if cell.kind == "key"]
    if not keys:
        return f"| {plain(name)} | {len(members)} | - | - |"
    p, share = (sum(values) / len(keys) for values in ([c.p for c in keys], [c.share for c in keys]))
    return f"| {plain(name)} | {len(members)} | {p:.3f} | {share:.3f} |"


def contact_sheet(
    folder: Path, items: Sequence[Item], names: Sequence[str], columns: int = 6, count: int = 36, png: bool = False
) -> bytes:
    """A JPEG (or PNG) of up to `count` composites with their boxes, spread evenly over the set."""
    shown = sorted({round(i) for i in np.linspace(0, len(items) - 1, min(len(items), count))})
    tiles = [draw_item(folder, items[i], names, _TILE) for i in shown]
    columns = min(columns, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    sheet = np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])
    buffer = io.BytesIO()
    if png:
        told = PngInfo()
        told.add_text("Software", SHEET_MARK)
        PIL.Image.fromarray(sheet).save(buffer, "PNG", pnginfo=told)
    else:
        PIL.Image.fromarray(sheet).save(buffer, "JPEG", quality=85, comment=SHEET_MARK)
    return buffer.getvalue()


def is_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet of this program."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return SHEET_MARK.encode() in file.read(1024)
    return False


def draw_item(folder: Path, item: Item, names: Sequence[str], side: int) -> Image:
    """A composite of a set with its boxes and their classes, [side, side, 3]."""
    pixels = decode(part_path(folder, "images", item).read_bytes())[0]
    picture = np.ascontiguousarray(resize(pixels, side, side))
    if "labels" not in item.sha256:
        _tag(picture, item.class_name, 0, side - 12, _colour(item.class_index))
        return picture
    table = parse_rows(part_path(folder, "labels", item).read_text(encoding="utf-8"), len(names))
    for index, cx, cy, w, h in table:
        colour = _colour(int(index))
        x1, y1, x2, y2 = (round(float(v) * side) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), colour, 2)
        _tag(picture, names[int(index)], x1, y1, colour)
    _tag(picture, item.id, 0, side - 12, (40, 40, 40))
    return picture


def _tag(picture: Image, text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.35, 1)
    cv2.rectangle(picture, (x, y), (x + width + 2, y + height + 4), colour, -1)
    cv2.putText(picture, text, (x + 1, y + height + 1), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (255, 255, 255), 1, cv2.LINE_AA)


def _colour(index: int) -> tuple[int, int, int]:
    hue = np.array([[[index * 47 % 180, 200, 190]]], np.uint8)
    r, g, b = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0]
    return int(r), int(g), int(b)
