"""The dataset card and the contact sheet of a set: what people look at before they train on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from focusdd_det.compose import encode_jpeg, encode_png, resize
from focusdd_det.decode import decode
from focusdd_det.detset import Cell, Item, part_path
from focusdd_det.labels import parse_rows
from focusdd_det.types import Image

if TYPE_CHECKING:
    from focusdd_det.plan import Plan

_TILE = 320  # px of a composite on the contact sheet


def card(
    items: Sequence[Item],
    plan: Plan,
    identity: dict[str, Any],
    counts: dict[str, tuple[int, int]],
    blind: Sequence[str] = (),
) -> str:
    """README.md of a set: what it holds, how it was made, what it lacks. The same text for the same bytes.

    Args:
        items: the composites, in plan order.
        plan: what was planned.
        identity: the content of build.yaml.
        counts: class -> (usable sources, unusable ones).
        blind: classes that the ViT does not know.
    """
    config = identity["config"]
    boxed = identity.get("task", "detect") == "detect"
    cell = config["image_size"] // config["grid"]
    keys = [c for item in items for c in item.cells if c.kind == "key"]
    sides = [c.crop[2] if c.crop else max(c.width, c.height) for item in items for c in item.cells]
    enlarged = sum(side < cell for side in sides) / len(sides)
    beyond = sum(side * 2 < cell for side in sides) / len(sides)
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_group[item.group].append(item)
    bad = sum(count for _, count in counts.values())
    lines = [
        "---",
        "license: other",
        f"task_categories: [{'object-detection' if boxed else 'image-classification'}]",
        f"tags: [dataset-distillation, focusdd, method-{config['method']}]",
        "---",
        "",
        f"# A distilled {'detection' if boxed else 'classification'} set",
        "",
        f"{len(items)} composites of {config['grid']} x {config['grid']} cells, {config['image_size']} px, "
        f"method `{config['method']}`, {config['ipc']} a class asked for"
        + (f" (`ipc_unit: {config['ipc_unit']}`)" if boxed else "")
        + f", seed {config['seed']}. "
        + (
            f"Boxes and soft targets come from the teacher `{identity['teacher']['name']}`; nobody drew a box."
            if boxed
            else "A composite's class is that of its sources: the folder it lies in. Soft labels are made from it by "
            "tools/relabel_cls.py and lie elsewhere."
        ),
        "",
        "The pictures are cut out of photographs with licences of their own: this set may be used as they may. The "
        "formulas of "
        "the method are reconstructed from its published text.",
        "",
        *(_box_lines(items, keys) if boxed else ()),
        f"- cells enlarged to {cell} px: {enlarged:.1%}; beyond 2x: {beyond:.1%}",
        f"- sources: {sum(good for good, _ in counts.values())} usable, {bad} quarantined (reasons: quarantine.jsonl)",
        f"- classes covered: {len({i.class_name for i in items})} of {len(plan.class_map.names)}",
    ]
    if blind:
        lines.append(f"- the selector knows no class for {', '.join(blind)}: its largest probability stood in")
    if plan.uncovered:
        lines.append(f"- not covered: {', '.join(plan.uncovered)}")
    planned = {group.name: group.ipc for group in plan.groups}
    fewer = [
        f"{name} {len(by_group[name])}"
        for name, ipc in planned.items()
        if len(by_group[name]) < identity["config"]["ipc"]
    ]
    if fewer:
        lines.append(f"- fewer than {config['ipc']} composites: {', '.join(fewer)}")
    if plan.short and config["short_class"] == "skip":
        lines.append(f"- left out, too few sources: {', '.join(sorted(plan.short))}")
    if not boxed:
        lines += ["", "| class | composites | mean p of its key patches | mean share |", "|---|---|---|---|"]
        lines += [_class_row(name, members) for name, members in by_group.items()]
        return "\n".join(lines) + "\n"
    lines += ["", "| class | composites | replaced | boxes | key cells confirmed |", "|---|---|---|---|---|"]
    for name, members in by_group.items():
        own = [c for item in members for c in item.cells if c.kind == "key"]
        replaced = max(item.proposal for item in members) + 1 - len(members)
        confirmed = f"{sum(c.confirmed for c in own)} of {len(own)}" if own else "-"
        lines.append(f"| {name} | {len(members)} | {replaced} | {sum(i.boxes for i in members)} | {confirmed} |")
    return "\n".join(lines) + "\n"


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
        return f"| {name} | {len(members)} | - | - |"
    p, share = (sum(values) / len(keys) for values in ([c.p for c in keys], [c.share for c in keys]))
    return f"| {name} | {len(members)} | {p:.3f} | {share:.3f} |"


def contact_sheet(
    folder: Path, items: Sequence[Item], names: Sequence[str], columns: int = 6, count: int = 36, png: bool = False
) -> bytes:
    """A JPEG (or PNG) of up to `count` composites with their boxes, spread evenly over the set."""
    shown = sorted({round(i) for i in np.linspace(0, len(items) - 1, min(len(items), count))})
    tiles = [draw_item(folder, items[i], names, _TILE) for i in shown]
    columns = min(columns, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    sheet = np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])
    return encode_png(sheet) if png else encode_jpeg(sheet, 85)


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
