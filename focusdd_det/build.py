"""The whole build: plan, look at every source, choose, compose, label, write; resumable at any point.

result = build(load_config(sources=["imagenet/train"], ipc=50, out="datasets/focusdd"))
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from focusdd_det import detset, disk
from focusdd_det.composites import Workbench, compose_all
from focusdd_det.config import BuildConfig, ClassBuildConfig, SetConfig, as_plain, load, parse_yaml
from focusdd_det.devices import device_of, processors
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError
from focusdd_det.labelling import ClassLabels, Labeller, TeacherBoxes
from focusdd_det.methods import Method
from focusdd_det.plan import Plan, make_plan, method_of
from focusdd_det.plugins import load_plugins
from focusdd_det.progress import progress_bar
from focusdd_det.report import card, contact_sheet
from focusdd_det.scoring.looking import score_all
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.scoring.screening import Screen, screen_precision
from focusdd_det.scoring.window_judge import WindowJudge
from focusdd_det.selector import Selector, in_precision, load_selector, precision_of, token_grid
from focusdd_det.showing.gallery import NAME as GALLERY
from focusdd_det.showing.gallery import write_gallery
from focusdd_det.sources import Root
from focusdd_det.teacher import load_detector

log = logging.getLogger("focusdd")

# Keys that say where or how fast, not what; every other key is part of what determines the bytes.
MACHINE_KEYS = (
    "sources", "out", "device", "workers", "loader", "threads", "scores", "grow_from", "overwrite", "download",
    "selector", "selector_weights", "teacher", "class_map", "max_bad", "plugins", "screen",
)  # fmt: skip
# Keys that sets of earlier versions lack, with the value that means what those did.
_SINCE: dict[str, Any] = {"grids": [], "least_entropy": 0.0, "decode": "reduced"}
_SINCE_DETECT: dict[str, Any] = {"own_conf": None, "contradiction": "keep"}  # the same, of detection sets alone
PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "opencv-python", "pillow", "numpy")
_BYTES_PER_PIXEL = 0.6  # of a composite at JPEG quality 95, generously
_BYTES_OF_FEATURES = 2048  # of a source: 1,024 channels in float16


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        folder: the set.
        composites: how many it holds.
        covered: classes of the set with at least one composite, in order.
        seconds: time by phase.
    """

    folder: Path
    composites: int
    covered: tuple[str, ...]
    seconds: dict[str, float]


def load_config(file: Path | None = None, **overrides: Any) -> BuildConfig:
    """A BuildConfig from cfg/build_det.yaml, a file of your own and overrides, the later one winning."""
    return load(BuildConfig, "build_det.yaml", overrides, file, "the build's configuration")


def load_class_config(file: Path | None = None, **overrides: Any) -> ClassBuildConfig:
    """The same for a classification set, from cfg/build_cls.yaml."""
    return load(ClassBuildConfig, "build_cls.yaml", overrides, file, "the build's configuration")


def build(config: SetConfig, resume: bool = False) -> BuildResult:
    """Build a distilled set at `config.out`: for detection or for classification, as the config's type says.

    A build that was stopped goes on where it was when the same config is given again. What it writes before it is
    complete lies in `<out>.incomplete/`. Nothing else is written, and no source is changed.

    Args:
        resume: fail unless there is something to go on with.

    Raises:
        ConfigError, DataError, WeightsError, DiskError, VerifyError: see errors.py for the exit codes.
    """
    started = time.monotonic()
    config = _at_home(config)
    plan = make_plan(config)
    log.info("%s", plan.table())
    out = _out(config)
    work = out.with_name(out.name + disk.INCOMPLETE)
    for target in (out, work, Path(config.scores or out)):
        disk.refuse_overlap(target, [place for root in plan.roots for place in _places_of(root)])
    if resume and not work.is_dir() and not out.is_dir():
        raise ConfigError(f"--resume: there is no {work} to go on with; leave --resume out to start one")
    method = method_of(config)
    config = replace(method.adapt(config), precision=precision_of(config.precision, device_of(config.device)))
    labeller, teacher = _labeller(config, plan)
    selector = _selector(config, method)
    if config.threads:
        torch.set_num_threads(config.threads)
    grid = selector.grid if selector else token_grid(config.selector, config.selector_weights, config.view)
    judge = _judge(config, method, plan, labeller, grid)
    identity = _identity(config, plan, selector, grid, teacher)
    if _already_there(out, work, identity, config, plan, resume):
        return _result(out, plan, {"all": time.monotonic() - started})
    _start(work, identity, config)
    seconds = {"plan": time.monotonic() - started}
    with disk.locked(work):
        if config.grow_from:
            _grow(Path(config.grow_from), work)
        _require_space(work, plan, config, method)
        file = Path(config.scores or work / "scores.sqlite")
        store = ScoreStore(file, contents=bool(config.scores), entropy=config.least_entropy > 0)
        try:
            with _phase(seconds, "score"):
                screen = _score(config, method, plan, store, selector, judge)
            with _phase(seconds, "compose"):
                items = compose_all(
                    Workbench(config, plan, method, store, grid, labeller, work, _workers(config), screen)
                )
            with _phase(seconds, "finish"):
                quarantined, counts = list(store.quarantined()), store.counts()
                screened = screen.summary() if screen else None
                blank = store.passed_over(config.least_entropy) if config.least_entropy else None
                _report_repeats(store.repeats())
                _report_passed_over(blank, counts, config)
                _report_short(plan, items)
        finally:
            store.close()
        if config.grow_from:
            _check_grown(Path(config.grow_from), items)
        blind = _blind(config, plan, selector)
        _finish(work, out, config, plan, identity, items, quarantined, counts, blind, blank, seconds, screened)
        _publish(work, out, config)
    log.info("%s: %d composites", out, len(items))
    return _result(out, plan, seconds)


# --- before the work


def _places_of(root: Root) -> list[Path]:
    """Where a root's pictures lie: also those that a linked class folder leads to."""
    linked = [root.path / folder for folder in root.folders if (root.path / folder).is_symlink()]
    return [root.path, *linked]


def _at_home(config: SetConfig) -> SetConfig:
    """With `~` of the paths as the user's home, as a shell has it."""
    paths = ("out", "scores", "grow_from", "teacher", "selector", "selector_weights", "class_map")
    given = {key: getattr(config, key, None) for key in paths}
    home = {key: str(Path(value).expanduser()) for key, value in given.items() if value and value.startswith("~")}
    return replace(config, **home)  # type: ignore[arg-type]


def _out(config: SetConfig) -> Path:
    """The folder of the set; what a link stands for, so that the set is built beside its place."""
    out = Path(config.out)
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if not config.out.strip() or not out.name:
        raise ConfigError(f"out={config.out!r}: expected the path of a new folder, such as datasets/focusdd")
    return out


def _identity(
    config: SetConfig, plan: Plan, selector: Selector | None, grid: int, teacher: dict[str, str] | None
) -> dict[str, Any]:
    """build.yaml: what determines the bytes of the set."""
    settings = {key: value for key, value in as_plain(config).items() if key not in MACHINE_KEYS}
    plugins = load_plugins(config.plugins)
    return {
        "format": "focusdd_det set",
        "format_version": 1,
        "task": task_of(config),
        "config": settings,
        "classes": list(plan.class_map.names),
        "maps": plan.map_sha256,
        "selector": None
        if selector is None
        else {
            "name": Path(config.selector).name,
            "sha256": selector.sha256,
            "spec": selector.spec,
            "view": selector.view,
        },
        "token_grid": grid,
        "teacher": teacher,
        **({"plugins": plugins} if plugins else {}),
        "versions": {"focusdd_det": version("focusdd_det"), **{name: version(name) for name in PACKAGES}},
    }


def task_of(config: SetConfig) -> str:
    """What a set is for: detect or classify."""
    return "detect" if isinstance(config, BuildConfig) else "classify"


def _labeller(config: SetConfig, plan: Plan) -> tuple[Labeller, dict[str, str] | None]:
    """Who labels the composites, and the teacher's name and hash."""
    if not isinstance(config, BuildConfig):
        return ClassLabels(in_flight=4 * _workers(config)), None
    names = plan.class_map.names
    detector = load_detector(config.teacher, device_of(config.device), names, config.download)
    return TeacherBoxes(config, detector, len(names)), {
        "name": Path(config.teacher).name,
        "sha256": detector.sha256,
    }


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys in which two build.yaml contents differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}, key=str):
            found += differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return [] if old == new else [f"{prefix[:-1]}: {old!r} there, {new!r} asked for"]


def _already_there(
    out: Path, work: Path, identity: dict[str, Any], config: SetConfig, plan: Plan, resume: bool
) -> bool:
    """Whether the set is there, whole. Refuses what must not be touched, and only when nothing is left to refuse
    reopens a damaged set to repair it, or removes one that was begun."""
    damaged = outdated = False
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not detset.is_ours(out) and not detset.seals(out, "build.yaml", _identity_bytes(identity)):
            raise DiskError(
                f"{out} exists and is not a set of this program; nothing is done to it. Choose another `out`"
            )
        changed = differences(_read_identity(out), identity)
        if not changed or detset.seals(out, "build.yaml", _identity_bytes(identity)):
            problems = detset.verify(out)
            if not problems:
                log.info("%s is there already, complete and intact: nothing to do", out)
                _warn_of_other_sources(out, plan)
                return True
            if not config.overwrite:
                listed = "\n  ".join(problems[:20])
                if not resume:
                    raise VerifyError(
                        f"{out} is there but damaged:\n  {listed}\nThe same command with --resume repairs it"
                    )
                log.warning("%s is damaged and will be repaired:\n  %s", out, listed)
                damaged = True
        elif not config.overwrite:
            raise ConfigError(_refusal(f"{out} holds another set", changed, whole=True))
    if work.exists():
        if not detset.is_ours(work) and any(path.name != ".build.yaml.tmp" for path in work.iterdir()):
            raise DiskError(f"{work} exists and is not a build of this program; move it away, or choose another `out`")
        changed = differences(_read_identity(work), identity) if detset.is_ours(work) else []
        outdated = bool(changed)
        if outdated and not config.overwrite:
            raise ConfigError(_refusal(f"{work} was begun with another configuration", changed))
    if config.grow_from:
        _growable(Path(config.grow_from), identity)
    if damaged:
        _reopen(out, work, identity)
    if outdated:
        with disk.locked(work):
            detset.set_strays_aside(work, _aside(out), begun=True)
            detset.remove_ours(work)
    return False


def _warn_of_other_sources(out: Path, plan: Plan) -> None:
    """Say so when a set was built from folders at another place, or of another number of pictures."""
    try:
        log_of = json.loads((out / "build.log.json").read_text(encoding="utf-8"))
        before, pictures = log_of["sources"], log_of.get("pictures", plan.sources)
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = {root.name: str(root.path) for root in plan.roots}
    if before != now:
        advice = "If the pictures differ, choose another `out`, or move the set away"
        log.warning("%s was built from %s, not from %s. %s", out, before, now, advice)
    elif pictures != plan.sources:
        log.warning(
            "%s was built when there were %d pictures; the %d that are there now were not looked at. Choose another "
            "`out` to build from these, or move the set away",
            out, pictures, plan.sources,
        )  # fmt: skip


def _refusal(what: str, changed: Sequence[str], whole: bool = False) -> str:
    listed = "\n  ".join(changed[:20])
    only_ipc = whole and len(changed) == 1 and changed[0].startswith("config.ipc:")
    grown = ", another `out` with grow_from= to begin with its composites (for a larger ipc)" if only_ipc else ""
    return (
        f"{what}:\n  {listed}\nGive the same one to go on, another `out` to begin anew{grown}, or overwrite=true to "
        "replace it"
    )


def _reopen(out: Path, work: Path, identity: dict[str, Any]) -> None:
    """Turn a damaged set back into one that is being built; what is not part of it is moved aside, never deleted."""
    if work.exists():
        raise DiskError(f"both {out} and {work} exist; move one of them away")
    detset.set_strays_aside(out, _aside(out))
    try:
        out.replace(work)
        (work / "COMPLETE").unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(
            f"cannot reopen {out} as {work}: {error.strerror}; fix that, or choose another `out`"
        ) from error
    disk.write_atomic(work / "build.yaml", _identity_bytes(identity))


def _aside(out: Path) -> Path:
    """Where things go that lie in a set and are no part of it."""
    return out.with_name(out.name + ".strays")


def _identity_bytes(identity: dict[str, Any]) -> bytes:
    note = "# what determines the bytes of this set; written by focusdd_det\n"
    return (note + yaml.safe_dump(identity, sort_keys=False)).encode()


def _read_identity(folder: Path) -> Any:
    try:
        content = parse_yaml((folder / "build.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        return content
    before = _SINCE if content.get("task", "detect") == "classify" else {**_SINCE, **_SINCE_DETECT}
    return {"task": "detect", **content, "config": {**before, **content["config"]}}


def _start(work: Path, identity: dict[str, Any], config: SetConfig) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(work / "build.yaml", _identity_bytes(identity))  # first: from now on it is seen to be ours
        for part in detset.PARTS if task_of(config) == "detect" else ():
            (work / part / "train").mkdir(parents=True, exist_ok=True)
        if task_of(config) == "classify":
            (work / "train").mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {work}: {error.strerror}; choose another `out`") from error


def _growable(source: Path, identity: dict[str, Any]) -> None:
    """Whether a set is whole, and a smaller one of what is asked for.

    Raises:
        ConfigError, VerifyError: it is not.
    """
    if not detset.is_ours(source):
        raise ConfigError(f"grow_from={source}: there is no distilled set there; expected the folder of a smaller one")
    problems = detset.verify(source)
    if problems:
        raise VerifyError(f"grow_from={source} is not an intact set:\n  " + "\n  ".join(problems[:10]))
    smaller = _read_identity(source)
    changed = [line for line in differences(smaller, identity) if not line.startswith("config.ipc:")]
    if changed or smaller["config"]["ipc"] > identity["config"]["ipc"]:
        listed = "\n  ".join(changed or differences(smaller, identity))
        raise ConfigError(f"grow_from={source}: only a larger ipc may differ, but:\n  {listed}")
    if identity["config"]["selection"] != "grow":
        raise ConfigError("grow_from: selection=paper depends on the ipc and cannot be grown; use selection=grow")


def _grow(source: Path, work: Path) -> None:
    """Take the composites of a complete smaller set over, byte for byte; the build then goes on behind them."""
    have = {item.line() for item in detset.read_manifest(work, tolerant=True) if detset.intact(work, item)}
    for item in detset.read_manifest(source):
        if item.line() not in have:
            for part in item.sha256:
                detset.write_part(work, part, item, detset.part_path(source, part, item).read_bytes())
            detset.append(work, item)


def _check_grown(source: Path, items: Sequence[detset.Item]) -> None:
    """The larger set must begin with the composites of the smaller one, to the byte."""
    lines = {item.line() for item in items}
    other = [item.id for item in detset.read_manifest(source) if item.line() not in lines]
    if other:
        raise DataError(
            f"grow_from={source}: {len(other)} of its composites cannot be made of the sources as they are now "
            f"({', '.join(other[:3])} ...): sources were added, removed or changed since. Build without grow_from"
        )


def _require_space(work: Path, plan: Plan, config: SetConfig, method: Method) -> None:
    done = sum(1 for _ in detset.read_manifest(work, tolerant=True))
    row = 400 + (_BYTES_OF_FEATURES if method.needs_features else 0)
    need = int(max(0, plan.composites - done) * (config.image_size**2 * _BYTES_PER_PIXEL + 16_000) + plan.sources * row)
    have = shutil.disk_usage(work).free
    if have < need:
        raise DiskError(
            f"{work}: {have / 1e9:.2f} GB free, about {need / 1e9:.2f} GB needed; "
            "free some space or choose another `out`"
        )


# --- the ViT's part


def _selector(config: SetConfig, method: Method) -> Selector | None:
    if not method.needs_selector:
        return None
    return load_selector(
        config.selector, config.selector_weights, config.view, config.attention, config.precision,
        device_of(config.device), config.download,
    )  # fmt: skip


def _judge(config: SetConfig, method: Method, plan: Plan, labeller: Labeller, grid: int) -> WindowJudge | None:
    """The teacher that labels composites also looks at sources, for methods that want it."""
    if not method.needs_teacher or not isinstance(config, BuildConfig) or not isinstance(labeller, TeacherBoxes):
        return None
    return WindowJudge(labeller.detector, method, config, {g.name: g.class_index for g in plan.groups}, grid)


def _score(
    config: SetConfig,
    method: Method,
    plan: Plan,
    store: ScoreStore,
    selector: Selector | None,
    judge: WindowJudge | None,
) -> Screen | None:
    """Every source looked at, and those that can be chosen again where the first look is one in low precision."""
    columns = columns_of(config, plan, selector)
    blind = _blind(config, plan, selector)
    if blind:
        log.info("the selector knows no class for %s: its largest probability stands in", ", ".join(blind))
    who = f"{Path(judge.config.teacher).name} looks at sources" if judge else "looking at sources"
    fast = screen_precision(config, method, plan, device_of(config.device))
    quick = in_precision(selector, fast) if selector is not None and fast is not None else None
    with progress_bar(plan.sources, who + (f", in {fast}" if quick else "")) as bar:
        score_all(plan.stream(), store, selector, method, columns, config, _workers(config), bar.update, judge, quick)
    if quick is None:
        return None
    assert selector is not None
    screen = Screen.of(store, quick, selector, method, columns, config, plan, _workers(config))
    with progress_bar(0, f"looking again, in {config.precision}") as bar:
        screen.settle_all(plan.groups, bar)
    return screen


def _blind(config: SetConfig, plan: Plan, selector: Selector | None) -> list[str]:
    """Classes for which the ViT has no output, so that its largest probability is their confidence."""
    if selector is None or config.confidence != "true":
        return []
    return [name for name, own in columns_of(config, plan, selector).items() if not own]


def columns_of(config: SetConfig, plan: Plan, selector: Selector | None) -> dict[str, tuple[int, ...]]:
    """Class -> outputs of the ViT that stand for it: those of its folders and of the class map's synsets."""
    position = {name: i for i, name in enumerate(selector.classes)} if selector else {}
    columns = {}
    for group in plan.groups:
        names = set(group.folders)
        if isinstance(config, BuildConfig) and config.ipc_unit == "coco":
            names |= set(plan.class_map.folders_of(group.class_name)) | {group.class_name}
        columns[group.name] = tuple(sorted(position[name] for name in names if name in position))
    return columns


# --- after the work


def _report_repeats(repeats: Sequence[tuple[str, int]]) -> None:
    if repeats:
        shown = ", ".join(f"{path} ({count} times)" for path, count in repeats[:5])
        log.info("the same picture under several names, used once a class: %d, such as %s", len(repeats), shown)


def _report_passed_over(blank: dict[str, int] | None, counts: dict[str, tuple[int, int]], config: SetConfig) -> None:
    if blank is not None:
        usable = sum(good for good, _ in counts.values())
        what = (config.least_entropy, sum(blank.values()), usable)
        log.info("least_entropy=%g: %d of %d usable sources passed over; the set's README.md has each class", *what)


def _finish(
    work: Path,
    out: Path,
    config: SetConfig,
    plan: Plan,
    identity: dict[str, Any],
    items: Sequence[detset.Item],
    quarantined: Sequence[tuple[str, str, str]],
    counts: dict[str, tuple[int, int]],
    blind: Sequence[str],
    blank: dict[str, int] | None,
    seconds: dict[str, float],
    screened: dict[str, float | int] | None,
) -> None:
    """Put the manifest in plan order, write what describes the set, seal it."""
    if not items:
        passed_over = sum(blank.values()) if blank else 0
        raise DataError(
            (
                "no composite was made: the teacher found nothing in any of them. Look at the sources, lower conf, "
                "or keep empty composites with empty=keep"
                if task_of(config) == "detect"
                else "no composite was made: no class has enough usable sources; quarantine.jsonl says what was wrong"
            )
            + (f"; least_entropy={config.least_entropy:g} passed over {passed_over} sources" if passed_over else "")
        )
    disk.write_atomic(work / "manifest.jsonl", "".join(item.line() for item in items).encode())
    detset.sweep(work, items, _aside(out))
    disk.write_atomic(work / "data.yaml", detset.data_yaml(plan.class_map.names, task_of(config)))
    disk.write_atomic(work / "README.md", card(items, plan, identity, counts, blind, blank).encode())
    lines = [json.dumps({"root": r, "path": p, "reason": why}, ensure_ascii=True) + "\n" for r, p, why in quarantined]
    disk.write_atomic(work / "quarantine.jsonl", "".join(lines).encode())
    disk.write_atomic(work / "contact_sheet.jpg", contact_sheet(work, items, plan.class_map.names))
    write_gallery(work, work / GALLERY)
    build_log = {
        "command": sys.argv,
        "sources": {root.name: str(root.path) for root in plan.roots},
        "pictures": plan.sources,
        "settings": {key: value for key, value in as_plain(config).items() if key in MACHINE_KEYS},
        "torch_threads": torch.get_num_threads(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "device": device_of(config.device)},
        "screening": screened,
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    disk.write_atomic(work / "build.log.json", (json.dumps(build_log, indent=1, sort_keys=True) + "\n").encode())
    if not config.scores:
        (work / "scores.sqlite").unlink(missing_ok=True)
    disk.write_atomic(work / "COMPLETE", detset.seal(work))


def _report_short(plan: Plan, items: Sequence[detset.Item]) -> None:
    """Classes that came out smaller than planned: copies and bad sources are only known by now."""
    made = Counter(item.group for item in items)
    short = [f"{group.name} {made[group.name]} of {group.ipc}" for group in plan.groups if made[group.name] < group.ipc]
    if short:
        log.warning(
            "%d classes have fewer composites than planned, as sources were copies of others or could not be used: "
            "%s%s. Add pictures, or lower ipc",
            len(short),
            ", ".join(short[:20]),
            ", ..." if len(short) > 20 else "",
        )


def _publish(work: Path, out: Path, config: SetConfig) -> None:
    """`<out>.incomplete` becomes `out`; an older set makes room only now that the new one is whole."""
    replaced = out.with_name(out.name + ".replaced")
    try:
        (work / ".lock").unlink(missing_ok=True)
        if out.exists() and any(out.iterdir()):
            if not config.overwrite:
                raise DiskError(f"{out} appeared while the set was built; the new set is complete in {work}")
            if not detset.is_ours(out):
                raise DiskError(f"{out} is not a set of this program; it is not replaced. The new one is in {work}")
            if replaced.exists():  # of a replacement that was cut off
                detset.remove_ours(replaced)
            detset.set_strays_aside(out, _aside(out))
            out.replace(replaced)
        work.replace(out)
        (out / ".lock").unlink(missing_ok=True)  # of a build that was started in this very moment
    except OSError as error:
        raise DiskError(
            f"the set is complete in {work} but cannot be renamed to {out}: {error.strerror}; fix that and run the "
            "same command again"
        ) from error
    if replaced.exists():
        detset.remove_ours(replaced)


def _result(out: Path, plan: Plan, seconds: dict[str, float]) -> BuildResult:
    items = list(detset.read_manifest(out))
    have = {item.class_name for item in items}
    covered = tuple(name for name in plan.class_map.names if name in have)
    return BuildResult(out, len(items), covered, seconds)


@contextlib.contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def _workers(config: SetConfig) -> int:
    return config.workers or processors()
