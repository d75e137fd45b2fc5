"""`focusdd stats SET [SET ...]`: options -> numbers, a table and pictures in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from focusdd_det import __version__
from focusdd_det.commandline import parse_tokens, wants_help
from focusdd_det.config import suggest
from focusdd_det.devices import device_of
from focusdd_det.errors import ConfigError, DataError, DiskError

USAGE = """Statistics of distilled sets, one or several beside each other: a table, stats.json and PNGs.

  focusdd stats datasets/focusdd
  focusdd stats datasets/focusdd datasets/random out=stats/both reference=coco/annotations/instances_val2017.json
  focusdd stats datasets/focusdd features=deit_small_patch16_224 selector_weights=weights/deit_small.safetensors
  focusdd stats datasets/focusdd --curves run=runs/detect/train run=runs/detect/train2
  focusdd stats datasets/focusdd --hessian weights=runs/detect/train/weights/last.pt probes=16
  focusdd stats datasets/focusdd_cls --hessian weights=runs/classify/train/weights/last.json

  out               folder for stats.json, stats.md and the PNGs; a folder of its own, never in a set (default stats)
  reference         annotations in COCO's format whose box sizes stand beside the set's; `none` for nothing. Without it
                    a small sample of COCO val2017 (177 pictures) stands in, and is named so
  features          a ViT of timm (or a .json of a trained one): adds diversity, the mean distance of its pooled
                    features over all pairs of images
  selector_weights  its weights, .safetensors or .pth;  download=true lets timm fetch them
  curves, run       training loss and accuracy from each run's results.csv, as curves.png
  hessian, weights  trace of the Hessian of the training loss on the set, by Hutchinson's estimate with random signs:
                    of a classifier (last.json) on a classification set, of a detector (last.pt) on a detection set,
                    there with the assignment of anchors to boxes held. probes (16), seed (0), batch (32, classifiers)
  plugins           files of yours that add a ViT for features=; they are run
  device            of the ViT and of the Hessian (default cpu);  workers: threads that read (default 2)

Measured: images, boxes and classes; box sizes, sqrt(area) / side; boxes an image; the area and the cells that boxes
cover; the teacher's confidence (soft/); signal to noise with the 3 x 3 Laplacian, 20 log10(mean / sigma) with
Immerkaer's sigma: our reading of the paper's Appendix D, whose formula we were not given; near duplicates, pairs whose
64-bit difference hashes differ in at most 6 bits; cells that show a source which another cell shows already.
"""

_HINTS: dict[str, Any] = {
    "out": str,
    "reference": str,
    "features": str,
    "selector_weights": str,
    "plugins": tuple[str, ...],
    "download": bool,
    "curves": bool,
    "run": tuple[str, ...],
    "hessian": bool,
    "weights": tuple[str, ...],
    "probes": int,
    "seed": int,
    "batch": int,
    "device": str,
    "workers": int,
}


@dataclass(frozen=True)
class Options:
    """What `focusdd stats` was asked for; USAGE says what each means."""

    sets: tuple[Path, ...]
    out: Path
    reference: str | None
    features: str | None
    selector_weights: str | None
    plugins: tuple[str, ...]
    download: bool
    runs: tuple[Path, ...]
    weights: tuple[Path, ...]
    probes: int
    seed: int
    batch: int
    device: str
    workers: int


def read_options(argv: Sequence[str]) -> Options:
    """Command line -> options.

    Raises:
        ConfigError: all that is wrong with it at once.
    """
    tokens = list(argv)
    sets = list(takewhile(lambda token: not _is_option(token), tokens))
    given = parse_tokens(tokens[len(sets) :], _HINTS, {"runs": "run"})
    problems = [f"unknown option `{key}`{suggest(key, list(_HINTS))}" for key in given if key not in _HINTS]
    if not sets:
        problems.append("no set: give the folders of one or more distilled sets first, e.g. focusdd stats datasets/a")
    for key, least in (("probes", 1), ("seed", 0), ("batch", 1), ("workers", 1)):
        if key in given and (type(given[key]) is not int or given[key] < least):
            problems.append(f"{key}={given[key]!r}: expected a whole number from {least} on")
    for key in ("curves", "hessian", "download"):
        if not isinstance(given.get(key, False), bool):
            problems.append(f"{key}={given[key]!r}: expected true or false")
    for key in ("out", "reference", "features", "selector_weights", "device"):
        if key in given and (given[key] is None or isinstance(given[key], (bool, list, dict))):
            problems.append(f"{key}={given[key]!r}: expected text")
    runs, weights = (_several(given.get(key)) for key in ("run", "weights"))
    if given.get("curves") is True and not runs:
        problems.append("--curves needs run=FOLDER, the folder of a training with its results.csv")
    if given.get("hessian") is True and not weights:
        problems.append(
            "--hessian needs weights=last.pt, a trained detector, or weights=last.json, a trained classifier"
        )
    if weights and given.get("hessian") is not True:
        problems.append("weights= goes with --hessian; the ViT's are selector_weights=")
    if given.get("selector_weights") and not given.get("features"):
        problems.append("selector_weights= goes with features=NAME, the ViT that they are of")
    if problems:
        raise ConfigError("focusdd stats cannot start:\n  " + "\n  ".join(problems) + "\n`focusdd stats --help`")
    reference = given.get("reference")
    return Options(
        sets=tuple(Path(one) for one in sets),
        out=Path(str(given.get("out", "stats"))),
        reference=None if reference is None else str(reference),
        features=str(given["features"]) if given.get("features") else None,
        selector_weights=str(given["selector_weights"]) if given.get("selector_weights") else None,
        plugins=tuple(_several(given.get("plugins"))),
        download=given.get("download", False),
        runs=tuple(map(Path, runs)),
        weights=tuple(map(Path, weights)),
        probes=given.get("probes", 16),
        seed=given.get("seed", 0),
        batch=given.get("batch", 32),
        device=device_of(str(given.get("device", "cpu"))),
        workers=given.get("workers", 2),
    )


def stats_command(argv: Sequence[str]) -> int:
    """`focusdd stats`.

    Raises:
        ConfigError, DataError, VerifyError, WeightsError, DiskError: see errors.py for the exit codes.
    """
    if not argv or wants_help(argv):
        print(USAGE)
        return 0 if argv else 2
    options = read_options(argv)
    files, text = measure(options)
    _write(options.out, files)
    print(text)
    print(f"\n{options.out}: {', '.join(sorted(files))}")
    return 0


def measure(options: Options) -> tuple[dict[str, bytes], str]:
    """Everything that was asked for: file name -> content, and the text that is printed."""
    _check_out(options.out, options.sets)
    from focusdd_det.stats import curvature_cls, curvature_det, curves, plots, summary
    from focusdd_det.stats.collect import read_set

    runs = [curves.read_run(run, name) for run, name in zip(options.runs, short_names(options.runs), strict=True)]
    beside = _reference(options)
    vit = None
    if options.features:
        from focusdd_det.plugins import load_plugins
        from focusdd_det.selector import load_selector

        load_plugins(options.plugins)
        vit = load_selector(
            options.features, options.selector_weights, device=options.device, download=options.download
        )
    names = dict(zip(options.sets, short_names(options.sets), strict=True))
    pairs = _measured_on(options)
    facts = [read_set(folder, name, vit, options.workers) for folder, name in names.items()]
    if all(one.task == "classify" for one in facts):
        beside = None
    told = [summary.numbers(one, beside) for one in facts]
    parts = [summary.table(told, beside)]
    if beside is not None:
        parts.append(f"Reference: {beside.origin}.")
    parts.append("SNR: 20 log10(mean / sigma), sigma by the 3 x 3 Laplacian (Immerkaer): our reading of Appendix D.")
    content: dict[str, Any] = {"focusdd_det": __version__, "sets": told}
    content["reference"] = None if beside is None else summary.reference_numbers(beside)
    if vit is not None:
        content["features"] = {"model": options.features, "sha256": vit.sha256, "view": vit.view}
        parts.append(f"Diversity: pooled features of {options.features} at {vit.view} px, over all pairs of images.")
    sharp = []
    for one, weights in pairs:
        how = (weights, one, options.probes, options.seed)
        if weights.suffix == ".pt":
            found = curvature_det.of_detector(*how, options.device)
        else:
            found = curvature_cls.of_classifier(*how, options.batch, options.device)
        sharp.append({"set": names[one], **found.plain()})
        parts.append(f"{names[one]}, {found.line()}")
    content["hessian"] = sharp
    content["curves"] = [run.plain() for run in runs]
    files = plots.figures(facts, beside)
    if runs:
        files["curves.png"] = plots.curves_png(runs)
    text = "\n\n".join(parts)
    files["stats.json"] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    files["stats.md"] = (text + "\n").encode()
    return files, text


def _measured_on(options: Options) -> list[tuple[Path, Path]]:
    """Sets and the weights whose Hessian is measured on them: detectors on detection sets, classifiers on the others.

    Raises:
        ConfigError: a set or weights without the other.
    """
    from focusdd_det.detset import task_of

    if not options.weights:
        return []
    detects = {folder: task_of(folder) == "detect" for folder in options.sets}
    pairs = [(s, w) for s, detect in detects.items() for w in options.weights if (w.suffix == ".pt") == detect]
    alone = [str(one) for one in (*options.sets, *options.weights) if not any(one in pair for pair in pairs)]
    if alone:
        raise ConfigError(
            f"--hessian: nothing goes with {', '.join(alone)}; a detection set needs weights=last.pt of a detector, a "
            "classification set weights=last.json of a classifier"
        )
    return pairs


def _reference(options: Options) -> Any:
    from focusdd_det.stats import reference

    if options.reference is None:
        return reference.SHIPPED
    return None if options.reference == "none" else reference.measure(options.reference)


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with those above where several have the same.

    Raises:
        ConfigError: a folder that is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    twice = {str(folder) for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1}
    if twice:
        raise ConfigError(f"given twice: {', '.join(sorted(twice))}")
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return ["/".join(own[-depth:]) for own in parts]


def _check_out(out: Path, sets: Sequence[Path]) -> None:
    from focusdd_det.detset import refuse_inside

    refuse_inside(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; expected a folder, or a name that is free")
    _refuse_loss(out)
    if missing := [str(one) for one in sets if not one.is_dir()]:
        raise DataError(f"no such folder: {', '.join(missing)}; expected distilled sets")


def _write(out: Path, files: dict[str, bytes]) -> None:
    from focusdd_det.disk import write_atomic

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}; choose another `out`") from error
    for name, data in files.items():
        write_atomic(out / name, data)


def _refuse_loss(out: Path) -> None:
    """A table of somebody else's is not replaced."""
    try:
        ours = "focusdd_det" in json.loads((out / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours and (there := [name for name in ("stats.md", "stats.json") if (out / name).exists()]):
        raise ConfigError(f"{out / there[0]} is there and not of `focusdd stats`; choose another `out`")


def _is_option(token: str) -> bool:
    """Whether a token is --option or key=value, not a folder (whose name may hold a =)."""
    return token.startswith("--") or token.partition("=")[0] in _HINTS or ("=" in token and not Path(token).exists())


def _several(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]
