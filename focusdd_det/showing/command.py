"""`focusdd explain picture.jpg`: overlays of what the selector sees, a PNG for each picture."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from focusdd_det import detset, disk
from focusdd_det.build import MACHINE_KEYS
from focusdd_det.commandline import parse_tokens, wants_help
from focusdd_det.config import BuildConfig, describe, load, parse_yaml, suggest
from focusdd_det.devices import device_of
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError
from focusdd_det.plugins import load_plugins
from focusdd_det.progress import progress_bar
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.selector import ATTENTIONS, Selector, load_selector
from focusdd_det.showing.draw import MARK, draw
from focusdd_det.showing.explain import Explained, explain, outputs_of, readable
from focusdd_det.sources import EXTENSIONS, MAX_BYTES, Located, Root, stream
from focusdd_det.types import Crop

# The keys of the build that decide what is seen; `attention` and the rest of the command's own are below.
KEYS = (
    "selector", "selector_weights", "plugins", "view", "geometry", "side_ratio", "alpha", "confidence", "crop",
    "image_size", "grid", "class_map", "levels", "max_pixels", "decode", "precision", "batch", "device", "threads",
    "download",
)  # fmt: skip
OWN = {"attention": str, "class": str, "out": str, "count": int, "config": str, "id": str, "sources": tuple[Any, ...]}

USAGE = """Attention overlays: where the selector looks in a picture, and the window that method=focusdd would cut.

  focusdd explain cat.jpg selector=deit_small_patch16_224.fb_in1k selector_weights=deit_small.safetensors
  focusdd explain cat.jpg dog.png photos/ attention=all class=cat selector=... selector_weights=... out=overlays
  focusdd explain imagenet/train/n02123045 count=12 config=my_build.yaml     with the settings of a build of yours
  focusdd explain datasets/focusdd id=003_car_00001 selector=... selector_weights=...     the sources of a composite

A PNG for each picture: the picture with its likeliest classes; for each attention the heat map with the best window of
tokens (dashed) and the square that method=focusdd cuts for it (blue), p, share and score S; and that square as its
cell.

  PICTURE ...   picture files, and folders of them; or one distilled set, with id=
  class         whose probability p is: a folder of the selector (n02123045), or a class of the class map (cat: the sum
                of its folders). Default: the folder that a picture lies in if the selector knows it, else the likeliest
  attention     gca | last | mean | all of them side by side (default gca)
  out           folder of the PNGs (default explain); only former overlays are ever overwritten
  count         at most so many pictures of the folders, spread evenly (default 0: all)
  config        a file of yours with some of the keys below
  id, sources   a composite of the set that is given in place of pictures, with the settings of the set; its sources are
                looked for where it was built from, or in `sources`; what the set cut out of each is outlined in orange
                (with other methods than focusdd that is another square than the blue one)

The other keys are the build's own, with its defaults. Pictures go through the ViT in batches of `batch`, as in a build:
batch=1 is quicker for a single picture, and may differ from a build in the last digit.
"""


@dataclass(frozen=True)
class _Job:
    """A picture to be explained.

    Attributes:
        place: where its bytes are; data: the bytes, where they are no file of their own.
        target: the PNG.
        group: the class that p is of; None: that of its folder.
        cut: the crop that a set's manifest says.
    """

    place: Path
    target: Path
    data: bytes | None = None
    group: tuple[int, ...] | None = None
    cut: Crop | None = None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        if self.place.stat().st_size > MAX_BYTES:
            raise OSError(f"more than the {MAX_BYTES} bytes that are read of one picture")
        return self.place.read_bytes()


def explain_command(argv: Sequence[str]) -> int:
    """`focusdd explain PICTURE ...`."""
    if not argv or wants_help(argv):
        lines = describe("build_det.yaml").splitlines()
        print(USAGE + "\n" + "\n".join(line for line in lines if line.split(":")[0] in KEYS))
        return 0 if argv else 2
    hints = get_type_hints(BuildConfig)
    known = {**{key: hints[key] for key in KEYS}, **OWN}
    given, tokens = _split(argv, known)
    options = parse_tokens(tokens, known, {"source": "sources"})
    unknown = [f"unknown key `{key}`{suggest(key, list(known))}" for key in options if key not in known]
    if unknown:
        raise ConfigError("explain: " + "; ".join(unknown))
    own = {key: options.pop(key) for key in OWN if key in options}
    count = own.get("count", 0)
    if type(count) is not int or count < 0:
        raise ConfigError(f"count={count!r}: expected a whole number, 0 for all pictures")
    wanted = own.get("attention")
    if wanted not in (None, "all", *ATTENTIONS):
        near = suggest(str(wanted), ATTENTIONS)
        raise ConfigError(f"attention={wanted!r}: expected {', '.join(ATTENTIONS)} or all{near}")
    if not given:
        raise ConfigError("explain: no picture was named; --help shows examples")
    item = _item(Path(given[0]), str(own["id"])) if "id" in own else None
    if item is not None and len(given) > 1:
        raise ConfigError(f"explain: id= takes one distilled set, got {len(given)} paths")
    file = Path(str(own["config"])) if own.get("config") else None
    if wanted not in (None, "all"):
        options["attention"] = wanted
    settings = _settings(Path(given[0])) if item else {}
    config = load(BuildConfig, "build_det.yaml", {**settings, **options}, file, "explain")
    shown = ATTENTIONS if wanted == "all" else (config.attention,)
    out = Path(str(own.get("out") or "explain"))
    _check_out(out, [Path(path) for path in given])
    if config.threads:
        torch.set_num_threads(config.threads)
    load_plugins(config.plugins)
    files = [] if item else _pictures([Path(path) for path in given], count)
    selector = load_selector(
        config.selector, config.selector_weights, config.view, config.attention, config.precision,
        device_of(config.device), config.download,
    )  # fmt: skip
    group = outputs_of(str(own["class"]), selector, config) if "class" in own else None
    if item is None:
        jobs = [_Job(path, target, group=group) for path, target in zip(files, _targets(files, out), strict=True)]
    else:
        jobs = _cells(Path(given[0]), item, own.get("sources"), out, selector, config, group)
    _check_targets(jobs)
    _work(jobs, selector, shown, config)
    return 0


def _work(jobs: Sequence[_Job], selector: Selector, shown: Sequence[str], config: BuildConfig) -> None:
    """All PNGs, a batch at a time; pictures that cannot be used are named at the end.

    Raises:
        DataError: naming them.
    """
    names = readable(selector.classes)
    note = (
        f"{Path(config.selector).name}, view {selector.view} px, {selector.grid} x {selector.grid} tokens, "
        f"geometry {config.geometry}, side_ratio {config.side_ratio:g}, alpha {config.alpha:g}, crop {config.crop}"
    )
    bad, lines = [], []
    with progress_bar(len(jobs), "pictures") as bar:
        for start in range(0, len(jobs), config.batch):
            batch = jobs[start : start + config.batch]
            read = [_read(job) for job in batch]
            data = [content if isinstance(content, bytes) else b"" for content in read]
            columns = [_own(job, selector) for job in batch]
            for job, content, found in zip(batch, read, explain(data, columns, selector, shown, config), strict=True):
                reason = content if isinstance(content, str) else found
                if isinstance(reason, Explained) and isinstance(content, bytes):
                    reason = _write(job, content, reason, names, note, config)
                if isinstance(reason, str):
                    bad.append(f"{job.place}: {reason}")
                elif isinstance(reason, Explained):
                    lines.append(_line(job, reason, names))
                bar.update(1)
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... {len(lines)} overlays in {jobs[0].target.parent}")
    if bad:
        more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError(
            f"{len(bad)} of {len(jobs)} pictures cannot be used:\n  " + "\n  ".join(bad[:20]) + more
            + ("\nThe others are done" if lines else "")
        )  # fmt: skip


def _write(
    job: _Job, content: bytes, found: Explained, names: Sequence[str], note: str, config: BuildConfig
) -> Explained | str:
    """Draw and write one PNG; a string is the reason why its picture cannot be used after all."""
    try:
        picture, width, height = decode(content, None, config.max_pixels)
    except BadImage as error:  # it was fine at reduced size
        return str(error)
    if (width, height) != (found.view.width, found.view.height):
        return "its size differs between two readings"
    cell = config.image_size // config.grid
    png = draw(found, picture, names, job.place.name, note, config.alpha, cell, job.cut)
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {job.target.parent}: {error.strerror}; choose another `out`") from error
    disk.write_atomic(job.target, png)
    return found


def _line(job: _Job, found: Explained, names: Sequence[str]) -> str:
    index = next((c for c, _ in found.top if c in found.own), found.top[0][0])
    what = names[index] + (f" and {len(found.own) - 1} more" if len(found.own) > 1 else "")
    windows = [
        f"{f.attention} share {f.share:.4f} S {f.score:.4f} crop {f.crop.side} px at ({f.crop.x}, {f.crop.y})"
        for f in found.findings
    ]
    line = f"{job.target}: p {found.p:.4f} ({what}); {'; '.join(windows)}"
    if job.cut is not None:
        same = any(f.crop == job.cut for f in found.findings)
        line += "; as in the set" if same else f"; the set has {job.cut.side} px at ({job.cut.x}, {job.cut.y})"
    return line


def _read(job: _Job) -> bytes | str:
    try:
        return job.read()
    except OSError as error:
        return f"unreadable: {error.strerror or error}"


def _own(job: _Job, selector: Selector) -> tuple[int, ...]:
    """The outputs that p is of."""
    if job.group is not None:
        return job.group
    folder = job.place.absolute().parent.name
    return (selector.classes.index(folder),) if folder in selector.classes else ()


# --- what is asked for


def _split(argv: Sequence[str], known: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The pictures, and the tokens that are options. A token with `=` is a picture only if such a file exists."""
    pictures: list[str] = []
    options: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--"):
            options.append(token)
            flag = known.get(token[2:].replace("-", "_")) is bool
            takes = "=" not in token and tokens and not tokens[0].startswith("--")
            if takes and (not flag or tokens[0].lower() in ("true", "false")):
                options[-1] = f"{token}={tokens.pop(0)}"
        elif "=" in token and not Path(token).exists():
            options.append(token)
        else:
            pictures.append(token)
    return pictures, options


def _pictures(given: Sequence[Path], count: int) -> list[Path]:
    """The files that are named, and those in the folders that are named, by name.

    Raises:
        DataError: something named is not there, or holds no picture.
    """
    files: list[Path] = []
    inside: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(_walk(path))
            if not found:
                raise DataError(f"{path} holds no picture; expected files that end with {', '.join(EXTENSIONS)}")
            inside += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"no picture at {path}; expected a picture file, or a folder of them")
    if count and len(inside) > count:
        inside = [inside[i * len(inside) // count] for i in range(count)]
    return files + inside


def _walk(folder: Path) -> Iterator[Path]:
    for top, _, names in os.walk(folder):
        yield from (Path(top) / name for name in names if name.lower().endswith(EXTENSIONS))


# --- where it goes


def _targets(files: Sequence[Path], out: Path) -> list[Path]:
    """A PNG for each picture, named like it; of equal names each says its folder, and of those each its number."""
    stems = [_safe(file.stem) for file in files]
    for more in (lambda f, s: f"{_safe(f.absolute().parent.name)}_{s}", None):
        often = {stem for stem, n in Counter(stems).items() if n > 1}
        if more is not None:
            stems = [more(f, s) if s in often else s for f, s in zip(files, stems, strict=True)]
    taken: Counter[str] = Counter()
    targets = []
    for stem in stems:
        taken[stem] += 1
        targets.append(out / (f"{stem}.png" if taken[stem] == 1 else f"{stem}-{taken[stem]}.png"))
    return targets


def _safe(name: str) -> str:
    """A file name that any file system takes, with room for an ending."""
    return name.encode("utf-8", "backslashreplace")[:150].decode("utf-8", "ignore").replace("\\", "_") or "picture"


def _check_out(out: Path, given: Sequence[Path]) -> None:
    """No output in a folder of sources or in a distilled set.

    Raises:
        ConfigError: see above.
        DiskError: `out` is no folder.
    """
    disk.refuse_overlap(out, [path for path in given if path.is_dir()])
    detset.refuse_inside(out)
    if out.exists() and not out.is_dir():
        raise DiskError(f"out={out} is not a folder; choose another `out`")


def _check_targets(jobs: Sequence[_Job]) -> None:
    """Only a former overlay may be overwritten, and never one of the pictures.

    Raises:
        DiskError: naming the file.
    """
    pictures = {job.place.resolve() for job in jobs if job.data is None}
    for target in (job.target for job in jobs if job.target.exists() or job.target.is_symlink()):
        if target.resolve() in pictures:
            raise DiskError(f"{target} is one of the pictures and is not overwritten; choose another `out`")
        try:
            with target.open("rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise DiskError(f"cannot read {target}: {error.strerror}; choose another `out`") from error
        if not head.startswith(b"\x89PNG") or f"Software\0{MARK}".encode() not in head:
            raise DiskError(f"{target} exists and is no overlay of this program; it stays. Choose another `out`")


# --- a composite of a set


def _item(folder: Path, name: str) -> detset.Item:
    """The composite of a set that has this id.

    Raises:
        ConfigError: there is no such set, or no such composite in it.
    """
    if not detset.is_ours(folder):
        raise ConfigError(f"id={name}: {folder} is not a distilled set; expected its folder in place of pictures")
    names = []
    for item in detset.read_manifest(folder):
        if item.id == name:
            return item
        names.append(item.id)
    raise ConfigError(f"id={name}: {folder} holds no such composite{suggest(name, names)}; it has {len(names)}")


def _settings(folder: Path) -> dict[str, Any]:
    """What a set was built with, of the keys that matter here; never a file to be opened, run or fetched."""
    try:
        settings = parse_yaml((folder / "build.yaml").read_text(encoding="utf-8"))["config"]
        return {key: settings[key] for key in (*KEYS, "attention") if key in settings and key not in MACHINE_KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{folder / 'build.yaml'} cannot be read ({error}); `focusdd verify {folder}`") from error


def _cells(
    folder: Path, item: detset.Item, sources: Any, out: Path, selector: Selector, config: BuildConfig,
    group: tuple[int, ...] | None,
) -> list[_Job]:  # fmt: skip
    """The sources of a composite, in the order of its cells.

    Raises:
        DataError: one is not where it should be, or is another picture now.
    """
    if group is None:
        position = {name: i for i, name in enumerate(selector.classes)}
        own = {position[cell.folder] for cell in item.cells if cell.folder in position}
        with contextlib.suppress(ConfigError):  # a set of classes that no map knows
            own |= set(outputs_of(item.class_name, selector, config))
        group = tuple(sorted(own))
    jobs = []
    for number, cell in enumerate(item.cells):
        for path in _roots(folder, cell.root, sources):
            located = _find(Root(cell.root, path, {cell.folder: item.group}), cell)
            if located is not None:
                break
        else:
            raise DataError(
                f"{item.id}: its source {cell.path} is not in {', '.join(map(str, _roots(folder, cell.root, sources)))}"
                "; give the folder that the set was built from with sources="
            )
        try:
            data = located.read()
        except OSError as error:
            raise DataError(f"{item.id}: cannot read {located.file}: {error.strerror or error}") from error
        if disk.sha256(data) != cell.sha256:
            raise DataError(f"{item.id}: {located.file} is another picture than the one the set was built from")
        place = Path(cell.folder) / Path(cell.path).name
        target = out / f"{item.id}_{number}_{cell.kind}_{_safe(place.stem)}.png"
        cut = Crop(*cell.crop) if cell.crop and cell.kind == "key" else None
        jobs.append(_Job(place, target, data, group, cut))
    return jobs


def _roots(folder: Path, name: str, sources: Any) -> list[Path]:
    """The folders to look in: those given, else the one that the set's log names."""
    if sources:
        several = sources if isinstance(sources, list) else [sources]
        return [Path(str(source).partition("::")[0]).expanduser() for source in several]
    try:
        return [Path(json.loads((folder / "build.log.json").read_text(encoding="utf-8"))["sources"][name])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} does not say where its sources lie ({error}); give them with sources=") from error


def _find(root: Root, cell: detset.Cell) -> Located | None:
    if not root.path.exists():
        return None
    return next((s for s in stream(root) if s.source.path == cell.path and not s.problem), None)
