"""gallery.html of a set: one page that shows every composite, needs no network, and runs no text of the set.

Format. gallery.html, .css and .js of this package become one file: the page, `head` (JSON), the script, then a block
for every 64 composites: JSON of what tiles, filters and order need; JSON of the cells and boxes; a base64 JPEG a line;
and a call that hands them to the script. So the first tiles show while the rest is still being read, and the
writer holds one block at a time. Every `<` of the JSON is written \\u003c: a text of the set cannot end its block,
the script shows it with textContent, and the page's Content-Security-Policy allows nothing but the two scripts by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focusdd_det.classmap import lemmas
from focusdd_det.commandline import read_options, wants_help
from focusdd_det.compose import encode_jpeg, resize
from focusdd_det.config import parse_yaml
from focusdd_det.detset import Cell, Item, part_path, read_data_yaml, read_manifest, read_soft, task_of
from focusdd_det.devices import processors
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, VerifyError
from focusdd_det.labels import parse_rows
from focusdd_det.plugins import load_plugins
from focusdd_det.progress import progress_bar
from focusdd_det.scoring.decode import BadImage, decode

if TYPE_CHECKING:
    from focusdd_det.showing.source_maps import SourceMap, SourceMaps

log = logging.getLogger("focusdd")
NAME = "gallery.html"
USAGE = """focusdd gallery SET: one page that shows every composite of a set, for any browser, without a network.

  focusdd gallery datasets/focusdd                          writes datasets/focusdd/gallery.html (a build does it too)
  focusdd gallery datasets/focusdd out=focusdd.html         a page to send to somebody: it needs no other file
  focusdd gallery datasets/focusdd sources=train=imagenet/train selector_weights=weights/deit_small.safetensors

Filter by class and by class of the boxes, search, sort; boxes on and off; the cells of a composite with their sources
and scores when the pointer or the keyboard is on it; a click shows the picture in full, if the page lies in its set.

  out=SET/gallery.html   inside the set only this one: it is outside the set's hashes
  thumb=160              side of the embedded pictures, px, 32 to 640; about 9 kB a composite at 160
  sources=NAME=PATH      where a source folder (or archive) of the set lies now, repeatable. With the selector's weights
                         the attention maps of the cells' sources are computed, which looks at each of them once more.
                         A set does not hold them. NAME is that of the manifest; PATH alone if the set has only one
  selector_weights=PATH  the checkpoint that the set was built with; another one is refused
  selector=PATH.json     if the set's selector is a file of yours
  plugins=PATH.py        files of yours with the set's method or selector, repeatable; they are run
"""
_BLOCK = 64  # composites that are handed to the page at once
_QUALITY = 70  # of the thumbnails: 6 kB each at 160 px, before base64
_TAKE = "take()"
_OURS = b'<meta name="generator" content="focusdd_det">'


def gallery_command(argv: Sequence[str]) -> int:
    """`focusdd gallery <set>`."""
    if not argv or wants_help(argv):
        print(USAGE)
        return 0 if argv else 2
    hints: dict[str, Any] = {
        "out": str, "thumb": int, "sources": tuple[Any, ...], "selector": str, "selector_weights": str,
        "plugins": tuple[Any, ...],
    }  # fmt: skip
    options = read_options("gallery", argv[1:], hints, aliases={"source": "sources"})
    thumb = options.get("thumb", 160)
    if not 32 <= thumb <= 640:
        raise ConfigError(f"gallery: thumb={thumb}: expected 32 to 640 px")
    folder = Path(argv[0])
    if task_of(folder) is None:
        raise VerifyError(f"{folder} is not a distilled set of this program: its build.yaml is missing or another's")
    out = _out(folder, options.get("out"))
    load_plugins([str(file) for file in options.get("plugins", ())])
    maps = None
    asked = {key: options[key] for key in ("sources", "selector", "selector_weights") if options.get(key)}
    if asked:
        from focusdd_det.showing.source_maps import open_maps

        if "sources" not in asked:
            raise ConfigError("gallery: sources= is missing: attention maps need NAME=PATH of the folders of the set")
        sources = [str(source) for source in asked["sources"]]
        maps = open_maps(folder, _identity(folder), sources, asked.get("selector"), asked.get("selector_weights"))
    count = write_gallery(folder, out, thumb, maps)
    if maps is not None:
        _report(maps)
    print(f"{out}: {count} composites, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def write_gallery(folder: Path, out: Path, thumb: int = 160, maps: SourceMaps | None = None) -> int:
    """Write the page of a set; the same bytes for the same set. Memory does not grow with the number of composites.

    Args:
        folder: the set.
        out: the page's file. Beside the set's own files it links to the full pictures.
        thumb: side of the embedded pictures, px.
        maps: gives attention maps of the sources.

    Returns:
        The number of composites.

    Raises:
        VerifyError: a file of the set is missing or damaged.
        DiskError: see `disk.write_atomic`.
    """
    identity, names = _identity(folder), read_data_yaml(folder)
    total = _lines(folder / "manifest.jsonl")
    inside = out.parent.resolve() == folder.resolve()
    head = _head(identity, names, total, maps)
    # Inside its set the page has the name of the folder it lies in, so that a set which is moved or built again under
    # another name keeps its bytes.
    head |= {"inside": inside, "name": None if inside else folder.resolve().name}
    with progress_bar(total, "gallery") as bar, ThreadPoolExecutor(processors()) as pool:

        def page() -> Iterator[bytes]:
            start, end = _frame(head)
            yield start
            items = read_manifest(folder)
            while block := list(islice(items, _BLOCK)):
                yield _block(folder, names, block, thumb, maps, pool)
                bar.update(len(block))
            yield end

        write_atomic(out, page())
    return total


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError as error:
        raise VerifyError(f"{path}: {error.strerror}; the set is not whole, build it or get it again") from error


# --- the page


def _frame(head: dict[str, Any]) -> tuple[bytes, bytes]:
    """What comes before the blocks and after them."""
    here = Path(__file__)
    style, script, page = (here.with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js", ".html"))
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in (script, _TAKE))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'sha256-{_digest(style)}'; img-src 'self' file: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "HEAD": _json(head), "SCRIPT": script}
    start, _, end = page.partition("{BLOCKS}")
    # One pass: what a text of the set holds is not looked at again.
    return re.sub(r"\{([A-Z]+)\}", lambda mark: parts[mark[1]], start).encode(), end.encode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _head(identity: dict[str, Any], names: Sequence[str], total: int, maps: SourceMaps | None) -> dict[str, Any]:
    """What the page says of the whole set."""
    config = identity.get("config")
    config = config if isinstance(config, dict) else {}
    told = [("method", config.get("method"))]
    told += [
        (part, (identity.get(part) or {}).get("name")) for part in ("selector", "teacher") if _named(identity, part)
    ]
    told += [("seed", config.get("seed"))]
    return {
        "task": identity.get("task", "detect"),
        "classes": list(names),
        "lemmas": {i: lemmas()[name].split(",")[0] for i, name in enumerate(names) if name in lemmas()},
        "total": total,
        "block": _BLOCK,
        "told": [[key, str(value)[:80]] for key, value in told if value is not None],
        "attention": "here" if maps else "asked for" if _named(identity, "selector") else "none",
    }


def _named(identity: dict[str, Any], part: str) -> bool:
    return isinstance(identity.get(part), dict) and "name" in identity[part]


def _identity(folder: Path) -> dict[str, Any]:
    try:
        content = parse_yaml((folder / "build.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{folder / 'build.yaml'} cannot be read ({error}); get the set again") from error
    return content if isinstance(content, dict) else {}


# --- a block of composites


def _block(
    folder: Path,
    names: Sequence[str],
    items: Sequence[Item],
    thumb: int,
    maps: SourceMaps | None,
    pool: ThreadPoolExecutor,
) -> bytes:
    """Four elements: see the head of this file."""
    parts = list(pool.map(lambda item: _read(folder, item, names, thumb), items))
    cells = [cell for item in items for cell in item.cells]
    drawn = iter(maps.of(cells, pool) if maps else [None] * len(cells))
    tiles, details = [], []
    for item, (boxes, _) in zip(items, parts, strict=True):
        keys = [cell for cell in item.cells if cell.kind == "key"]
        values = [box[5] / 100 for box in boxes] if "labels" in item.sha256 else [cell.p for cell in keys or item.cells]
        mean = round(sum(values) / len(values), 4) if values else 0
        missed = sum(not cell.confirmed for cell in keys)
        tiles.append([item.id, item.class_index, len(boxes), mean, sorted({box[0] for box in boxes}), missed])
        group = "" if item.group == item.class_name else item.group
        details.append([[_cell(cell, next(drawn)) for cell in item.cells], boxes, group, item.index])
    known = lemmas()
    folders = {cell.folder: known[cell.folder] for cell in cells if cell.folder in known}
    lines = [
        f'<script type="application/json">{_json(tiles)}</script>',
        f'<script type="application/json">{_json({"items": details, "folders": folders})}</script>',
        '<script type="text/plain">' + "\n".join(base64.b64encode(jpeg).decode() for _, jpeg in parts) + "</script>",
        f"<script>{_TAKE}</script>\n",
    ]
    return "\n".join(lines).encode()


def _read(folder: Path, item: Item, names: Sequence[str], thumb: int) -> tuple[list[list[int]], bytes]:
    """Boxes of a composite (class, corners in thousandths of the side, confidence in hundredths), and its thumbnail.

    Raises:
        VerifyError: a file of it is missing or damaged.
    """
    path = part_path(folder, "images", item)
    try:
        pixels = decode(path.read_bytes(), thumb)[0]
        side = min(thumb, pixels.shape[0])
        jpeg = encode_jpeg(resize(pixels, side, side), _QUALITY)
        boxes = []
        if "labels" in item.sha256:
            path = part_path(folder, "labels", item)
            table = parse_rows(path.read_text(encoding="utf-8"), len(names))
            path = part_path(folder, "soft", item)
            conf = read_soft(path)["conf"]
            if len(conf) != len(table):
                raise ValueError(f"{len(conf)} confidences for {len(table)} boxes")
            for (index, cx, cy, w, h), c in zip(table, conf, strict=True):
                corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                boxes.append([int(index), *(round(float(v) * 1000) for v in corners), round(float(c) * 100)])
    except (OSError, ValueError, BadImage) as error:
        raise VerifyError(f"{path}: {error}; `focusdd verify {folder}` says what is damaged") from error
    return boxes, jpeg


def _cell(cell: Cell, seen: SourceMap | None) -> list[Any]:
    """A cell as the page reads it; the map as base64 of its [g, g] levels and its place in the source."""
    own = [
        int(cell.kind == "key"), cell.root, cell.path, cell.folder, cell.width, cell.height, cell.crop, cell.p,
        cell.share, int(cell.confirmed),
    ]  # fmt: skip
    if seen is None:
        return own
    return [*own, base64.b64encode(seen.levels.tobytes()).decode(), [round(v, 1) for v in seen.place]]


# --- the command's edges


def _out(folder: Path, given: object) -> Path:
    """Where the page goes: gallery.html of the set, or anywhere outside it."""
    out = folder / NAME if given is None else Path(str(given)).expanduser()
    real, top = out.parent.resolve() / out.name, folder.resolve()
    if top in real.parents and real != top / NAME:
        raise ConfigError(f"out={out} lies in the set, which is sealed: only {folder / NAME} may be written there")
    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"out={out}: expected the name of an .html file")
    if out.is_dir() or out.is_symlink():
        raise ConfigError(f"out={out} is a folder or a link; it is not replaced. Choose another out")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it first")
    if out.is_file() and real != top / NAME and _OURS not in out.read_bytes()[:4096]:
        raise ConfigError(f"out={out} is there and no page of this program; it is not replaced. Choose another out")
    return out


def _report(maps: SourceMaps) -> None:
    for reason, count in maps.missed.most_common():
        log.warning("%d cells have no attention map: %s", count, reason)
    if maps.other_share:
        log.warning(
            "%d maps have another share than the manifest says: the versions of libraries or of the scoring differ",
            maps.other_share,
        )
