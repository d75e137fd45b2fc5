"""`focusdd map audit`: in how many pictures of each class folder does the teacher find the class that the map gives it?

Pictures are drawn by seed, looked at once, and what was found is appended to looks.jsonl: the same command goes on, and
a later one with other thresholds looks at nothing again. The map itself is never changed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from focusdd_det import detset, disk
from focusdd_det.ahead import ahead
from focusdd_det.classmap import LEVELS, ClassMap, find_map, imagenet_synsets, read_class_map, read_folder_map
from focusdd_det.commandline import command_config, wants_help
from focusdd_det.config import describe, read_yaml
from focusdd_det.devices import device_of
from focusdd_det.disk import append_lines
from focusdd_det.errors import ConfigError, DataError, DiskError
from focusdd_det.maps.suggestions import (
    Change,
    Tally,
    changes,
    once,
    report,
    suggested_folders,
    suggested_levels,
    titles,
)
from focusdd_det.progress import progress_bar
from focusdd_det.seeds import seed_of
from focusdd_det.sources import Located, Root, folder_names, stream
from focusdd_det.types import Detections, Image

log = logging.getLogger("focusdd")

LOOKS = "looks.jsonl"
_FLOOR = 0.05  # scores that are kept: `conf` can be chosen later without looking again
_SUGGESTIONS, _SEAL = "suggestions*.yaml", b"# sha256 of what follows: "
_IOU, _MOST = 0.7, 300  # of the boxes, as in the build
_VERSION = 1  # of what a line of looks.jsonl means

USAGE = """Audit of the class map: does the teacher find each folder's class? Suggests changes, applies none.

  focusdd map audit source=imagenet/train teacher=yolo11x.pt
  focusdd map audit source=imagenet/train source=my_pictures::my_map.yaml teacher=yolo11x.pt per_synset=20 out=audit
  focusdd map audit source=imagenet/train teacher=yolo11x.pt levels=exact,strong unmapped=false
  focusdd map audit source=imagenet/train --dry-run                what would be looked at; opens no model

Writes audit.md (the folders, worst first), audit.json, and suggestions.yaml: a class map for class_map= of the build,
with the folders lowered, dropped, moved and added that the numbers speak for. Folders with names of your own get
suggestions_<source>.yaml, for source=PATH::suggestions_<source>.yaml. The same command goes on where it was stopped.

Every key of the list below as `key=value` or `--key value`. --dry-run, --help.
"""


@dataclass(frozen=True)
class AuditConfig:
    """What an audit is asked for; cfg/map_audit.yaml says what each key means."""

    sources: tuple[str, ...]
    class_map: str
    levels: tuple[str, ...]
    unmapped: bool
    teacher: str
    per_synset: int
    conf: float
    found_share: float
    add_share: float
    least: int
    out: str
    imgsz: int
    seed: int
    device: str
    batch: int
    workers: int
    max_pixels: int
    download: bool

    def __post_init__(self) -> None:
        checks = [
            (bool(self.sources), "sources", "at least one: source=imagenet/train"),
            (bool(self.levels) and set(self.levels) <= set(LEVELS), "levels", f"some of {', '.join(LEVELS)}"),
            (self.per_synset >= 1, "per_synset", "at least 1 picture"),
            (_FLOOR <= self.conf < 1, "conf", f"a score from {_FLOOR} to 1"),
            (0 < self.found_share <= 1, "found_share", "a share in (0, 1]"),
            (0 < self.add_share <= 1, "add_share", "a share in (0, 1]"),
            (self.least >= 1, "least", "at least 1 picture"),
            (self.imgsz >= 32 and self.imgsz % 32 == 0, "imgsz", "a multiple of 32"),
            (self.batch >= 1, "batch", "at least 1"),
            (self.workers >= 1, "workers", "at least 1"),
            (self.max_pixels >= 1, "max_pixels", "at least 1"),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the audit cannot start:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class Job:
    """One folder that is looked at, with the pictures that were drawn from it, in the order of the draw."""

    tally: Tally
    pictures: tuple[Located, ...]


@dataclass(frozen=True)
class _Place:
    """A source: what it holds, what its own map says (None: the class map counts)."""

    root: Root
    own: dict[str, str] | None


@dataclass(frozen=True)
class _Read:
    """A drawn picture after reading: what is known of it already, or its pixels in a letterbox, or why it is no use."""

    job: Job
    sha256: str
    known: dict[str, tuple[float, float]] | None = None
    pixels: Image | None = None
    inner: float = 1.0  # px^2 of the letterbox that are picture
    bad: str | None = None


def map_command(argv: Sequence[str]) -> int:
    """`focusdd map audit`.

    Raises:
        ConfigError, DataError, WeightsError, DiskError: see errors.py for the exit codes.
    """
    if argv and argv[0] == "audit":
        return audit_command(argv[1:])
    if wants_help(argv[:1]):
        print("focusdd map audit ...\n`focusdd map audit --help` has examples")
        return 0
    raise ConfigError(f"focusdd map: expected audit, got {argv[0] if argv else 'nothing'}; `focusdd map audit --help`")


def audit_command(argv: Sequence[str]) -> int:
    """`focusdd map audit`: options, work, files."""
    if not argv or wants_help(argv):
        print(USAGE + "\n" + describe("map_audit.yaml"))
        return 0 if argv else 2
    config, flags = command_config(AuditConfig, "map_audit.yaml", argv, {"source": "sources"})
    places, jobs = plan(config)
    print(plan_text(config, jobs))
    if flags["dry_run"]:
        return 0
    audit(config, places, jobs)
    return 0


# --- what is looked at


def plan(config: AuditConfig) -> tuple[list[_Place], list[Job]]:
    """The folders and the pictures that are drawn from them. Lists every source once, in memory for the draw alone.

    Raises:
        ConfigError: `out` and a source lie in each other.
        DataError: no such source, or nothing in it to look at.
    """
    class_map = read_class_map(find_map(config.class_map), LEVELS)
    content = _levels(config)
    named = titles(content)
    synsets = frozenset(imagenet_synsets()) if content else None
    places: list[_Place] = []
    for entry in config.sources:
        places.append(_place(entry, class_map, {place.root.name for place in places}))
    out = Path(config.out)
    disk.refuse_overlap(out, [place.root.path for place in places])
    detset.refuse_inside(out)
    _refuse_loss(config, out)
    jobs = []
    for place in places:
        tallies = {}
        for folder in place.root.folders:
            tally = _tally(place, folder, class_map, named, synsets)
            if tally.level in config.levels or (tally.level is None and config.unmapped):
                tallies[folder] = tally
        drawn = _draw(place.root, set(tallies), config.per_synset, config.seed)
        jobs += [Job(tallies[folder], drawn[folder]) for folder in sorted(drawn) if drawn[folder]]
    if not jobs:
        raise DataError(
            f"there is nothing to look at in {', '.join(config.sources)}: no class folder with pictures at the levels "
            f"{', '.join(config.levels)}" + ("" if config.unmapped else ", and unmapped=false")
        )
    return places, jobs


def _refuse_loss(config: AuditConfig, out: Path) -> None:
    """What an earlier audit suggested may be a map in use by now, or have been worked on."""
    own = [entry.partition("::")[2] for entry in config.sources if "::" in entry]
    for name in (config.class_map, *own):
        file = find_map(name).resolve()
        if file.parent == out.resolve() and file.match(_SUGGESTIONS):
            raise ConfigError(
                f"the map {name} lies in out={out}, where this audit would write over it; choose another `out`"
            )
    for file in sorted(out.glob(_SUGGESTIONS)):
        if not _is_untouched(file.read_bytes()):
            raise ConfigError(
                f"{file} is not what an audit wrote: somebody has worked on it. Move it away, or choose another `out`"
            )


def _sealed(text: bytes) -> bytes:
    """A text under a comment with its hash, so that an edit is noticed."""
    return _SEAL + hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _is_untouched(data: bytes) -> bool:
    first, _, rest = data.partition(b"\n")
    return first == _SEAL + hashlib.sha256(rest).hexdigest().encode()


def _levels(config: AuditConfig) -> dict[str, Any]:
    """The content of a map with levels; {} of a plain one."""
    content = read_yaml(find_map(config.class_map))
    return {} if "names" in content else content


def _place(entry: str, class_map: ClassMap, taken: set[str]) -> _Place:
    path, _, own = entry.partition("::")
    location = Path(path).expanduser()
    if not location.exists():
        raise DataError(f"no source folder {location}; expected class folders such as n01440764/*.JPEG, or a tar")
    name = os.fsencode(location.resolve().name.removesuffix(".tar")).decode("utf-8", "backslashreplace") or "source"
    if name in taken:
        name = next(f"{name}{i}" for i in range(2, 1000) if f"{name}{i}" not in taken)
    there = sorted(folder_names(Root(name, location, {})))
    table = read_folder_map(find_map(own), class_map.names) if own else dict(class_map.folders)
    if own and not set(table) & set(there):
        raise DataError(f"{own}: none of its folders is in {location}; found {', '.join(there[:5]) or 'no folders'}")
    if not there:
        raise DataError(f"{location} holds no class folders; expected names such as n01440764")
    return _Place(Root(name, location, {folder: table.get(folder, "") for folder in there}), table if own else None)


def _tally(
    place: _Place, folder: str, class_map: ClassMap, named: Mapping[str, str], synsets: frozenset[str] | None
) -> Tally:
    """`synsets`: what a shared map with levels can name; None if it can name any folder."""
    name = place.root.folders[folder] or None
    level = None if name is None else "exact" if place.own is not None else class_map.levels[folder]
    own = place.own is not None
    apart = own or (synsets is not None and folder not in synsets)
    return Tally(place.root.name, folder, named.get(folder, ""), name, level, apart, not own and synsets is not None)


def _draw(root: Root, folders: set[str], count: int, seed: int) -> dict[str, tuple[Located, ...]]:
    """`count` pictures of each folder: those with the smallest hash of seed and path, in that order."""
    heaps: dict[str, list[tuple[int, str, int, Located]]] = {folder: [] for folder in folders}
    for number, located in enumerate(stream(root, folders)):
        source = located.source
        heap = heaps[source.folder]
        entry = (-seed_of("audit", seed, source.path), source.path, -number, located)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
    return {folder: tuple(entry[3] for entry in sorted(heap, reverse=True)) for folder, heap in heaps.items()}


def plan_text(config: AuditConfig, jobs: Sequence[Job]) -> str:
    """What will be looked at."""
    pictures = sum(len(job.pictures) for job in jobs)
    lines = [f"{len(jobs)} folders, {pictures} pictures (up to {config.per_synset} each), teacher {config.teacher}"]
    for level in (*LEVELS, None):
        own = [job for job in jobs if job.tally.level == level]
        if own:
            name = f"level {level}" if level else "not in the map"
            few = sum(len(job.pictures) < config.least for job in own)
            note = f"; {few} with fewer than least={config.least}, for which nothing is suggested" if few else ""
            lines.append(f"  {name}: {len(own)} folders, {sum(len(job.pictures) for job in own)} pictures{note}")
    return "\n".join(lines)


# --- looking


def audit(config: AuditConfig, places: Sequence[_Place], jobs: Sequence[Job]) -> list[Change]:
    """Look, count, suggest, write.

    Raises:
        WeightsError: the teacher cannot be loaded or lacks classes of the map.
        DiskError: `out` cannot be written, or another audit is writing there.
    """
    from focusdd_det.teacher import load_detector

    class_map = read_class_map(find_map(config.class_map), LEVELS)
    detector = load_detector(config.teacher, device_of(config.device), class_map.names, config.download)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}; choose another `out`") from error
    with disk.locked(out):
        _look_at_all(config, jobs, detector, class_map.names, out / LOOKS)
        tallies = [job.tally for job in jobs]
        wanted = changes(tallies, config.found_share, config.add_share, config.least)
        head = [
            f"Teacher {detector.path.name} (sha256 {detector.sha256[:12]}), map {config.class_map}, "
            f"{sum(t.pictures for t in tallies)} pictures of {len(tallies)} folders, at most {config.per_synset} a "
            f"folder, seed {config.seed}. Found: a box with a score above {config.conf:g} at {config.imgsz} px."
        ]
        text = report(tallies, wanted, head, config.found_share)
        disk.write_atomic(out / "audit.md", text.encode())
        disk.write_atomic(out / "audit.json", _json(config, detector.sha256, tallies, wanted))
        maps = suggestion_files(config, places, wanted, class_map)
        for name, data in maps.items():
            disk.write_atomic(out / name, data)
    print(text)
    print(f"{out}: audit.md, audit.json, {', '.join(maps)}")
    return wanted


def _look_at_all(config: AuditConfig, jobs: Sequence[Job], detector: Any, names: Sequence[str], file: Path) -> None:
    content = json.dumps([_VERSION, detector.sha256, list(names), config.imgsz, _IOU, _FLOOR, config.max_pixels])
    signature = hashlib.sha256(content.encode()).hexdigest()[:16]
    known = read_looks(file, signature)
    if known:
        log.info("%s: %d pictures were looked at before", file, len(known))
    drawn = ((job, located) for job in jobs for located in job.pictures)
    waiting: list[_Read] = []
    with progress_bar(sum(len(job.pictures) for job in jobs), "audit") as bar:
        for one in ahead(drawn, lambda pair: _read(*pair, known, config), config.workers, 2 * config.batch):
            if one.pixels is not None:
                waiting.append(one)
                if len(waiting) == config.batch:
                    bar.update(_look(config, waiting, detector, names, file, signature))
                    waiting = []
                continue
            if one.bad is not None:
                one.job.tally.bad += 1
            else:
                one.job.tally.add(one.known or {}, config.conf)
            bar.update(1)
        bar.update(_look(config, waiting, detector, names, file, signature))


def _read(job: Job, located: Located, known: Mapping[str, Any], config: AuditConfig) -> _Read:
    from focusdd_det.compose import letterbox
    from focusdd_det.scoring.decode import BadImage, decode

    if located.problem:
        return _Read(job, "", bad=located.problem)
    try:
        data = located.read()
        digest = disk.sha256(data)
        if digest in known:
            return _Read(job, digest, known=known[digest])
        picture = decode(data, config.imgsz, config.max_pixels)[0]
    except (BadImage, OSError, MemoryError) as error:
        return _Read(job, "", bad=str(error) or type(error).__name__)
    pixels, scale, _, _ = letterbox(picture, config.imgsz)
    return _Read(job, digest, pixels=pixels, inner=picture.shape[0] * picture.shape[1] * scale**2)


def _look(
    config: AuditConfig, waiting: Sequence[_Read], detector: Any, names: Sequence[str], file: Path, signature: str
) -> int:
    """Ask the teacher about some pictures, keep what it says, count it."""
    if not waiting:
        return 0
    pictures = [one.pixels for one in waiting if one.pixels is not None]
    answers = detector.detect(pictures, _FLOOR, _IOU, _MOST, config.batch, config.imgsz)
    found = [best_boxes(answer, names, one.inner) for one, answer in zip(waiting, answers, strict=True)]
    lines = [
        json.dumps({"signature": signature, "picture": one.sha256, "found": boxes}, sort_keys=True) + "\n"
        for one, boxes in zip(waiting, found, strict=True)
    ]
    append_lines(file, "".join(lines).encode())
    for one, boxes in zip(waiting, found, strict=True):
        one.job.tally.add(boxes, config.conf)
    return len(waiting)


def best_boxes(answer: Detections, names: Sequence[str], area: float) -> dict[str, tuple[float, float]]:
    """For each class that was found the score of its best box, and that box's share of the picture's area."""
    boxes: dict[str, tuple[float, float]] = {}
    for (x0, y0, x1, y1), index, score in zip(answer.boxes, answer.classes, answer.conf, strict=True):
        share = min(1.0, float((x1 - x0) * (y1 - y0)) / area)
        boxes.setdefault(names[int(index)], (round(float(score), 4), round(share, 4)))  # they come best first
    return boxes


def read_looks(file: Path, signature: str) -> dict[str, dict[str, tuple[float, float]]]:
    """What was found before: sha256 of a picture -> class -> (score, share of the area). Lines that are cut short, of
    another teacher or of other settings are passed over."""
    known: dict[str, dict[str, tuple[float, float]]] = {}
    for line in _lines(file):
        try:
            raw = json.loads(line)
            if raw["signature"] != signature:
                continue
            known[str(raw["picture"])] = {str(k): (float(v[0]), float(v[1])) for k, v in raw["found"].items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            continue
    return known


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream_:
            yield from stream_
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"cannot read {file}: {error.strerror}; make it readable or choose another `out`") from error


# --- what is written


def suggestion_files(
    config: AuditConfig, places: Sequence[_Place], wanted: Sequence[Change], class_map: ClassMap
) -> dict[str, bytes]:
    """File name -> content: suggestions.yaml for the class map, and one for each source with folder names of its own.

    A map with levels can name ImageNet-1K's synsets only; other folders that are to be added go into a map of their
    source.
    """
    content = _levels(config)

    def text(head: str, made: Sequence[Change], value: object) -> bytes:
        notes = [f"# {head}", f"# From {config.class_map} by `focusdd map audit`; read it before you use it. Changes:"]
        notes += [f"#   {change.folder}: {change.line()}" for change in made] or ["#   none"]
        plain = "\n".join("".join(c if c.isprintable() else "?" for c in note) for note in notes)  # stays a comment
        body = yaml.safe_dump(value, sort_keys=False, allow_unicode=False, width=10_000)
        return _sealed((plain + "\n" + body).encode())

    shared = [change for change in once(wanted) if not change.own_map]
    value: object = (
        suggested_levels(content, shared)
        if content
        else {"names": list(class_map.names), "folders": suggested_folders(class_map.folders, shared)}
    )
    files = {"suggestions.yaml": text("A suggested class map, for class_map= of the build.", shared, value)}
    for place in places:
        own = [change for change in wanted if change.root == place.root.name and change.own_map]
        table = suggested_folders(place.own or {}, own)
        if table and (own or place.own is not None):
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in place.root.name)
            head = f"A suggested map for the source {place.root.name!a}: source=PATH::this file."
            files[f"suggestions_{name}.yaml"] = text(head, own, table)
    return files


def _json(config: AuditConfig, teacher: str, tallies: Sequence[Tally], wanted: Sequence[Change]) -> bytes:
    told = {(change.root, change.folder): change for change in wanted}
    rows = []
    for tally in tallies:
        change = told.get((tally.root, tally.folder))
        row: dict[str, Any] = {
            "source": tally.root,
            "folder": tally.folder,
            "title": tally.title,
            "class": tally.class_name,
            "level": tally.level,
            "pictures": tally.pictures,
            "unusable": tally.bad,
            "share": round(tally.share(tally.class_name), 4) if tally.class_name and tally.pictures else None,
            "found": dict(sorted(tally.found.items(), key=lambda pair: (-pair[1], pair[0]))),
            "largest": dict(sorted(tally.main.items(), key=lambda pair: (-pair[1], pair[0]))),
        }
        if change is not None:
            row["suggestion"] = {"kind": change.kind, "class": change.new, "level": change.new_level, "why": change.why}
        rows.append(row)
    settings = {
        key: getattr(config, key) for key in ("conf", "found_share", "add_share", "least", "per_synset", "seed")
    }
    content = {"teacher_sha256": teacher, "class_map": config.class_map, "settings": settings, "folders": rows}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
