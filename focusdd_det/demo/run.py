"""The whole main job on the embedded default, or on the user's own: `make demo`.

    sources -> FocusDD set and a random-crop set of the same size -> a small student on each -> COCO mAP

Every step is the package's own command; nothing here is a second copy of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from focusdd_det.demo.quiet import keep_quiet
from focusdd_det.devices import processors
from focusdd_det.errors import ConfigError, DataError, DiskError, FocusDDError

HERE = Path(__file__).resolve().parent
MARK = ".focusdd-demo"  # stands in every folder that a demo made, so that no other folder is written into
TEACHER_FLOOR, STUDENT_FLOOR = 0.60, 0.10  # mAP50 on the drawn scenes; below them something is broken
SOURCES_PER_CLASS, VAL_PICTURES = 80, 120
SMALL_THREADS = 1  # torch threads for the shipped models: their layers are too small to be shared out
METHODS = {"focusdd": "FocusDD", "random": "random crops"}

USAGE = """The whole main job, small: build a FocusDD set and a random-crop set, train a student on each, COCO mAP.

  python tools/demo.py                                     drawn pictures, about five minutes on two cores
  python tools/demo.py --source imagenet/train --teacher yolo11x.pt --selector deit_small_patch16_224.fb_in1k \\
      --selector-weights deit_small.safetensors --val coco/annotations/instances_val2017.json --ipc 10
"""


@dataclass(frozen=True)
class Inputs:
    """What a demo works on.

    Attributes:
        source: class folders.
        class_map: path of the class map, or the name of one in cfg/.
        selector, selector_weights, teacher, student: as the keys of the build and of the training.
        annotations, images: COCO annotations and the folder of their pictures.
        drawn: whether all of it is the embedded default, whose results are known.
    """

    source: Path
    class_map: str
    selector: str
    selector_weights: str | None
    teacher: str
    student: str
    annotations: Path
    images: Any
    drawn: bool


@dataclass(frozen=True)
class Recipe:
    """How much of it: composites per class, their side in px, epochs and pictures a step of the students."""

    ipc: int
    image_size: int
    epochs: int
    batch: int
    seed: int


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `--help` prints it."""
    parser = argparse.ArgumentParser(
        "demo", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", type=Path, help="class folders; default: drawn pictures")
    parser.add_argument("--map", help="class map of --source; default: ImageNet's for synsets, else the folders")
    parser.add_argument("--teacher", help="Ultralytics checkpoint; default: the shipped one, for drawn objects")
    parser.add_argument("--selector", help="timm name or .json of a ViT; default: the shipped one")
    parser.add_argument("--selector-weights", help="checkpoint of --selector")
    parser.add_argument("--val", type=Path, help="COCO annotations, or a data.yaml that has some beside it")
    parser.add_argument("--student", help="model YAML; default: the shipped one, or yolo11n.yaml with --teacher")
    parser.add_argument("--ipc", type=int, help="composites per class; default 12, or 10 with --source")
    parser.add_argument("--image-size", type=int, help="px; default 192, or 320 with --source")
    parser.add_argument("--epochs", type=int, help="of each student; default 30, or 100 with --source")
    parser.add_argument("--batch", type=int, help="composites a step; default 8, or 16 with --source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="everything is written here; default demo/")
    return parser.parse_args(argv)


def demo(argv: Sequence[str]) -> int:
    """Run the demo and print its results; they are also in `<out>/results.json`.

    Raises:
        DemoFailed: the drawn default ran, but teacher or student stayed below what is known of them.
        FocusDDError: as the stages.
    """
    args = parse(argv)
    claim(args.out)
    keep_quiet(args.out)
    clock: dict[str, float] = {}
    with _timed(clock, "draw"):
        inputs = gather(args)
    recipe = choose(args)
    with _timed(clock, "evaluate teacher"):
        scores = {"teacher": evaluate(inputs.teacher, inputs, recipe)}
    sets = {}
    for method in METHODS:
        with _timed(clock, f"build {METHODS[method]} set"):
            sets[method] = build_set(method, args.out, inputs, recipe)
    with _timed(clock, "train both students"):
        students = train_students(sets, args.out, inputs, recipe)
    with _timed(clock, "evaluate students"):
        scores |= {method: evaluate(str(student), inputs, recipe) for method, student in students.items()}
    print(table(scores, clock))
    results = {**scores, "seconds": {key: round(value, 1) for key, value in clock.items()}}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if inputs.drawn:
        judge(scores)
    return 0


def claim(out: Path) -> None:
    """Make the output folder, or take one that an earlier demo made.

    Raises:
        DiskError: it holds something else, or cannot be written.
    """
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
            raise DiskError(f"{out} holds something that no demo made; nothing is done to it. Choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise DiskError(f"cannot write to {out}: {error.strerror}; choose another --out") from error


def gather(args: argparse.Namespace) -> Inputs:
    """The user's own, and drawn pictures and shipped models for what is not given.

    Raises:
        ConfigError: own sources with nothing to evaluate on, or the reverse.
        DataError: a source or val that is not there.
    """
    if (args.source is None) != (args.val is None):
        raise ConfigError("--source and --val go together: a student can only be evaluated on the classes it has seen")
    own = args.source is not None
    if own:
        class_map = args.map or _map_of_folders(args.source, args.out)
        annotations, images = _own_val(args.val)
    else:
        from focusdd_det.demo.objects import CLASSES
        from focusdd_det.demo.write import write_sources, write_val

        args.source = args.out / "sources"
        write_sources(args.source, SOURCES_PER_CLASS, args.seed)
        annotations = write_val(args.out / "val", VAL_PICTURES, args.seed)
        images = args.out / "val" / "images" / "val"
        class_map = args.map or _write_map(CLASSES, args.out)
    if own and not args.selector:
        print("warning: no --selector: the shipped ViT knows only drawn objects; give one trained on photographs")
    shipped = HERE / "yolo11-demo.yaml"
    return Inputs(
        source=args.source,
        class_map=class_map,
        selector=args.selector or str(HERE / "vit_demo.json"),
        selector_weights=args.selector_weights,
        teacher=args.teacher or str(HERE / "yolo_demo.pt"),
        student=args.student or ("yolo11n.yaml" if args.teacher else str(shipped)),
        annotations=annotations,
        images=images,
        drawn=not (own or args.teacher or args.selector or args.student or args.map),
    )


def _map_of_folders(source: Path, out: Path) -> str:
    """A class map for class folders: ImageNet's if they are synsets, else each folder is a class of its own name."""
    from focusdd_det.classmap import imagenet_synsets
    from focusdd_det.sources import Root, folder_names

    folders = sorted(folder_names(Root("source", source, {})))
    if not folders:
        raise DataError(f"{source} has no class folders; expected <class>/*.jpg in it")
    return "coco_imagenet.yaml" if set(folders) <= set(imagenet_synsets()) else _write_map(folders, out)


def _write_map(names: Sequence[str], out: Path) -> str:
    path = out / "classes.yaml"
    path.write_text(yaml.safe_dump({"names": list(names)}, sort_keys=False), encoding="utf-8")
    return str(path)


def _own_val(val: Path) -> tuple[Path, Any]:
    """COCO annotations and where their pictures are."""
    if val.suffix in (".yaml", ".yml"):
        from focusdd_det.coco_eval import usual_annotations
        from focusdd_det.training.traindata import load_yolo_data, resolve_data

        data = load_yolo_data(resolve_data(val).yaml, "val")
        found = usual_annotations(data)
        if found is None:
            raise DataError(f"{val} has no annotations/instances_<split>.json beside it; give the JSON itself as --val")
        return found, data["val"]
    if not val.is_file():
        raise DataError(f"--val {val} does not exist; expected COCO annotations (.json) or a data.yaml")
    root, split = val.resolve().parent.parent, val.stem.removeprefix("instances_")
    for folder in (root / "images" / split, root / split, root / "images", root):
        if folder.is_dir():
            return val, folder
    raise DataError(f"no pictures found for {val}; expected them in {root / 'images' / split} or {root / split}")


def choose(args: argparse.Namespace) -> Recipe:
    """The sizes that were asked for, or those that fit the demo's time."""
    small = args.val is None
    usual = Recipe(12, 192, 30, 8, args.seed) if small else Recipe(10, 320, 100, 16, args.seed)
    return Recipe(
        ipc=usual.ipc if args.ipc is None else args.ipc,
        image_size=usual.image_size if args.image_size is None else args.image_size,
        epochs=usual.epochs if args.epochs is None else args.epochs,
        batch=usual.batch if args.batch is None else args.batch,
        seed=args.seed,
    )


def build_set(method: str, out: Path, inputs: Inputs, recipe: Recipe) -> Path:
    """Build `<out>/<method>`, or take it as it is if it is complete and the same was asked for."""
    from focusdd_det.build import build, load_config

    config = load_config(
        sources=[str(inputs.source)],
        out=str(out / method),
        class_map=inputs.class_map,
        method=method,
        ipc=recipe.ipc,
        image_size=recipe.image_size,
        selector=inputs.selector,
        selector_weights=inputs.selector_weights,
        teacher=inputs.teacher,
        seed=recipe.seed,
        scores=str(out / f"{method}.scores.sqlite"),
        threads=SMALL_THREADS if inputs.drawn else 0,
        overwrite=True,
    )
    return build(config).folder


def train_students(sets: Mapping[str, Path], out: Path, inputs: Inputs, recipe: Recipe) -> dict[str, Path]:
    """Train one student on each set from scratch: side by side on a CPU, one core each, else one after the other.

    Returns:
        Method -> last.pt.
    """
    import torch

    gpu = torch.cuda.is_available()
    at_once = 1 if gpu else min(len(sets), processors())
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {
            method: pool.submit(train_student, folder, out / "students", method, inputs, recipe, "0" if gpu else "cpu")
            for method, folder in sets.items()
        }
        _watch(jobs, out / "students", recipe.epochs)
        return {method: job.result() for method, job in jobs.items()}


def train_student(data: Path, project: Path, name: str, inputs: Inputs, recipe: Recipe, device: str) -> Path:
    """Train one student; what Ultralytics prints goes to `<project>/<name>.log`."""
    project.mkdir(parents=True, exist_ok=True)
    (project / name / "results.csv").unlink(missing_ok=True)
    with (project / f"{name}.log").open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        from ultralytics import YOLO

        from focusdd_det.trainer import FocusDDTrainer

        YOLO(inputs.student).train(
            trainer=FocusDDTrainer,
            data=str(data),
            teacher=inputs.teacher,
            supervision="both",
            epochs=recipe.epochs,
            imgsz=recipe.image_size,
            batch=recipe.batch,
            nbs=recipe.batch,
            seed=recipe.seed,
            device=device,
            project=str(project.resolve()),
            name=name,
            exist_ok=True,
            plots=False,
            **(DRAWN_RECIPE if inputs.student.endswith("yolo11-demo.yaml") else {}),
        )
    return project / name / "weights" / "last.pt"


# A few hundred steps must do, so AdamW; composites already hold four pictures, so hardly any mosaic.
DRAWN_RECIPE: dict[str, Any] = {
    "optimizer": "AdamW",
    "lr0": 2e-3,
    "cos_lr": True,
    "warmup_epochs": 2,
    "mosaic": 0.0,
    "scale": 0.4,
}


def _watch(jobs: Mapping[str, Future[Path]], project: Path, epochs: int) -> None:
    """Say now and then how far the students are."""
    pending = set(jobs.values())
    while pending:
        pending = wait(pending, timeout=15).not_done
        states = []
        for method in jobs:
            file = project / method / "results.csv"
            done = len(file.read_text(encoding="utf-8").splitlines()) - 1 if file.is_file() else 0
            states.append(f"{METHODS[method]} {max(done, 0)}/{epochs}")
        print(f"training, epochs: {', '.join(states)}", flush=True)


def evaluate(weights: str, inputs: Inputs, recipe: Recipe) -> dict[str, float]:
    """Official COCO mAP of a checkpoint, in [0, 1]."""
    import torch

    from focusdd_det import coco_eval

    if inputs.drawn:
        torch.set_num_threads(SMALL_THREADS)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    result = coco_eval.evaluate(weights, inputs.annotations, inputs.images, imgsz=recipe.image_size, device=device)
    return {"mAP50-95": result.all["AP"] or 0.0, "mAP50": result.all["AP50"] or 0.0}


def table(scores: Mapping[str, Mapping[str, float]], clock: Mapping[str, float]) -> str:
    """Results in percent, and the time of each stage."""
    lines = ["", f"{'official COCO mAP, in percent':34}{'mAP50-95':>9}{'mAP50':>9}"]
    for key, score in scores.items():
        name = f"student, {METHODS[key]} set" if key in METHODS else key
        lines.append(f"{name:34}{100 * score['mAP50-95']:9.1f}{100 * score['mAP50']:9.1f}")
    lines += ["", f"{'stage':34}{'seconds':>9}"]
    lines += [f"{stage:34}{seconds:9.1f}" for stage, seconds in clock.items()]
    lines.append(f"{'all':34}{sum(clock.values()):9.1f}")
    return "\n".join(lines)


def judge(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Fail when the drawn default does not reach what it is known to reach: a demo that prints 0.0 is broken.

    Raises:
        DemoFailed: teacher or FocusDD student below its floor.
    """
    problems = [
        f"{name} reached mAP50 {100 * scores[key]['mAP50']:.1f}, expected at least {100 * floor:.0f}"
        for key, name, floor in (
            ("teacher", "the teacher", TEACHER_FLOOR),
            ("focusdd", "the FocusDD student", STUDENT_FLOOR),
        )
        if scores[key]["mAP50"] < floor
    ]
    if problems:
        raise DemoFailed("the demo failed:\n  " + "\n  ".join(problems))


class DemoFailed(FocusDDError):
    """The demo ran, but its result is not what the drawn default is known to give."""


@contextmanager
def _timed(clock: dict[str, float], stage: str) -> Iterator[None]:
    print(f"-- {stage}", flush=True)
    start = time.monotonic()
    yield
    clock[stage] = time.monotonic() - start
