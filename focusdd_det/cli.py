"""`focusdd`: one command a stage, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import io
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from focusdd_det import __version__
from focusdd_det.commandline import command_config, read_options, spelled, wants_help
from focusdd_det.config import BuildConfig, ClassBuildConfig, SetConfig, describe, suggest
from focusdd_det.errors import DISK_FULL, ConfigError, DiskError, FocusDDError, VerifyError

log = logging.getLogger("focusdd")

Command = Callable[[Sequence[str]], "int | None"]

USAGE = """focusdd: the smallest training set that still trains a good detector

  focusdd build --source imagenet/train --ipc 50 --out datasets/focusdd     photographs -> distilled set
  focusdd detect train model=yolo11n.yaml data=datasets/focusdd teacher=yolo11x.pt epochs=100
  focusdd detect targets data=datasets/focusdd teacher=yolo11x.pt pool=20   soft targets, to train without the teacher
  focusdd detect val model=best.pt annotations=instances_val2017.json images=val2017
  focusdd classify build|relabel|train|continual|export ...                 the same for classifiers
  focusdd experiment methods imagenet=... coco=... teacher=... selector=... builds, trains, evaluates a grid of arms
  focusdd verify datasets/focusdd                                           is the set what its manifest says?
  focusdd sheet datasets/focusdd                                            a contact sheet with boxes
  focusdd explain picture.jpg selector=... selector_weights=...             where the selector looks, its best window
  focusdd export datasets/focusdd format=coco out=focusdd_coco              COCO JSON, DD-Ranking, RethinkDC
  focusdd annotations data=mine.yaml out=mine_coco                          COCO JSON from YOLO labels, for COCO mAP
  focusdd pack datasets/focusdd out=focusdd.tar                             one tar with checksums; `unpack` checks it
  focusdd card datasets/focusdd results=coco_eval.json out=card.md          the dataset card with measured numbers
  focusdd stats datasets/focusdd datasets/random                            what sets hold, in numbers and plots
  focusdd grids datasets/focusdd reference=instances_val2017.json           which grids= come nearest to its box sizes
  focusdd map audit source=imagenet/train teacher=yolo11x.pt                does the teacher find each folder's class?
  focusdd bench --quick                                                     how fast all of it is on this machine
  focusdd gallery datasets/focusdd                                          every composite on one page, for a browser

`focusdd <command> --help` lists the options with examples. The scripts in tools/ are the same commands.
Exit codes: 0 done, 1 unexpected, 2 usage or config, 3 input data, 4 teacher or weights, 5 disk or lock,
6 verification failed, 130 interrupted (nothing is lost: the message says how to go on)."""

BUILD_USAGE = """Build a distilled detection set from class folders.

  python tools/build_det_set.py --source imagenet/train --ipc 50
  python tools/build_det_set.py --source imagenet/train --source my_giraffes::my_map.yaml --ipc 10 --out datasets/small
  python tools/build_det_set.py --source imagenet/train --ipc 50 --dry-run     what would be built, and from what
  python tools/build_det_set.py --source imagenet/train --ipc 50 --resume      only go on with a build (or repair a set)
  focusdd build config=my.yaml method=random

Every key of the list below as `key=value` or `--key value`. The same command goes on where it was stopped.
--dry-run, --resume, --help.
"""


BUILD_CLS_USAGE = """Build a distilled classification set from class folders: composites by class, no boxes.

  python tools/build_cls_set.py --source imagenet/train --ipc 10
  python tools/build_cls_set.py --source imagenet/train --ipc 10 --method whole --out datasets/random_pictures
  python tools/build_cls_set.py --source imagenet/train --ipc 10 --dry-run     what would be built, and from what
  python tools/build_cls_set.py --source imagenet/train --ipc 10 --resume      only go on with a build (or repair a set)
  focusdd classify build config=my.yaml method=realism

Every key of the list below as `key=value` or `--key value`. The same command goes on where it was stopped.
--dry-run, --resume, --help.
"""


def run_main(command: Command, argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of ours are one message, others a traceback (exit code 1)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not logging.getLogger("focusdd").handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(command(argv) or 0)
    except FocusDDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        name = Path(sys.argv[0]).name
        program = ["python", sys.argv[0]] if name.endswith(".py") else [name]
        print(f"\ninterrupted; what is done is kept. To go on: {shlex.join([*program, *argv])}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `focusdd ... | head` is no error
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print(f"error: {error}; free some space or fix the disk, then run the same command again", file=sys.stderr)
            return DiskError.exit_code
        traceback.print_exc()
        print("unexpected error: this is a bug of focusdd_det; please report the lines above", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_command(argv: Sequence[str]) -> int:
    """`focusdd build`, tools/build_det_set.py."""
    return _build(argv, BuildConfig, "build_det.yaml", BUILD_USAGE)


def build_cls_command(argv: Sequence[str]) -> int:
    """`focusdd classify build`, tools/build_cls_set.py."""
    return _build(argv, ClassBuildConfig, "build_cls.yaml", BUILD_CLS_USAGE)


def _build(argv: Sequence[str], kind: type[SetConfig], shipped: str, usage: str) -> int:
    if wants_help(argv):
        print(usage + "\n" + describe(shipped))
        return 0
    config, flags = command_config(kind, shipped, argv, {"source": "sources", "class": "classes"}, ("resume",))
    if flags["dry_run"]:
        from focusdd_det.plan import make_plan

        print(make_plan(config).table())
        return 0
    from focusdd_det.build import build

    result = build(config, resume=flags["resume"])
    print(f"{result.folder}: {result.composites} composites, {len(result.covered)} classes covered")
    if isinstance(config, BuildConfig):
        words = ["model=yolo11n.yaml", f"data={result.folder}", f"teacher={config.teacher}", "epochs=100"]
        print(f"next: {spelled('detect train', *words)}")
    else:
        words = [f"data={result.folder}", "teacher=resnet18", "teacher_weights=...", "eval_data=imagenet/val"]
        print(f"next: {spelled('classify relabel', *words)}")
    return 0


def verify_command(argv: Sequence[str]) -> int:
    """`focusdd verify <set>`."""
    if wants_help(argv) or len(argv) != 1:
        print(
            "focusdd verify SET: check every file of a distilled set against its manifest; exit code 6 if one differs"
        )
        if not wants_help(argv):
            raise ConfigError(f"verify takes one folder, got {len(argv)}")
        return 0
    from focusdd_det.detset import read_manifest, verify

    folder = Path(argv[0])
    if not folder.is_dir():
        raise VerifyError(f"{folder} is not there; expected the folder of a distilled set")
    problems = verify(folder)
    if problems:
        raise VerifyError(f"{folder} is not intact:\n  " + "\n  ".join(problems))
    print(f"{folder}: {sum(1 for _ in read_manifest(folder))} composites, intact")
    return 0


def sheet_command(argv: Sequence[str]) -> int:
    """`focusdd sheet <set>`."""
    hints = {"out": str, "count": int, "columns": int}
    if wants_help(argv) or not argv:
        print(
            "focusdd sheet SET [out=sheet.jpg | out=sheet.png] [count=36] [columns=6]: a contact sheet of composites "
            "with their boxes"
        )
        return 0 if argv else 2
    options = read_options("sheet", argv[1:], hints)
    from focusdd_det.detset import read_data_yaml, read_manifest, refuse_inside
    from focusdd_det.disk import write_atomic
    from focusdd_det.report import contact_sheet, is_sheet
    from focusdd_det.scoring.decode import BadImage

    folder = Path(argv[0])
    out = Path(options.get("out", "contact_sheet.jpg"))
    if out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ConfigError(f"sheet: out={out}: expected a name that ends in .jpg or .png")
    if out.resolve() != folder.resolve() / "contact_sheet.jpg":  # the one that a build makes is outside the hashes
        refuse_inside(out)
        if out.exists() and not is_sheet(out):
            raise DiskError(
                f"sheet: {out} exists and does not say that it is a contact sheet of this program; it stays. Choose "
                "another `out`"
            )
    numbers = {key: options.get(key, usual) for key, usual in (("count", 36), ("columns", 6))}
    wrong = [f"{key}={value}" for key, value in numbers.items() if value < 1]
    if wrong:
        raise ConfigError(f"sheet: {', '.join(wrong)}: expected a whole number from 1 on")
    items = list(read_manifest(folder))
    if not items:
        raise VerifyError(f"{folder}: its manifest lists no composite")
    try:
        data = contact_sheet(folder, items, read_data_yaml(folder), **numbers, png=out.suffix.lower() == ".png")
    except (OSError, ValueError, BadImage) as error:
        raise VerifyError(f"{folder}: {error}; `focusdd verify {folder}` says what is damaged") from error
    write_atomic(out, data)
    print(out)
    return 0


def detect_command(argv: Sequence[str]) -> int | None:
    """`focusdd detect targets|train|val ...`."""
    from focusdd_det.training import command as detect_cli
    from focusdd_det.training.store_targets import store_command

    return _mode("detect", {"targets": store_command, "train": detect_cli.train, "val": detect_cli.val_coco}, argv)


def classify_command(argv: Sequence[str]) -> int | None:
    """`focusdd classify build|relabel|train|export|continual ...`."""
    from focusdd_det.classify.continual import continual_command
    from focusdd_det.classify.export import export_command
    from focusdd_det.classify.relabel import relabel_command
    from focusdd_det.classify.train_cli import train

    modes: dict[str, Command] = {
        "build": build_cls_command,
        "relabel": relabel_command,
        "train": train,
        "export": export_command,
        "continual": continual_command,
    }
    return _mode("classify", modes, argv)


def _mode(command: str, modes: dict[str, Command], argv: Sequence[str]) -> int | None:
    """The second word of a command that has several."""
    if wants_help(argv[:1]):
        print(f"focusdd {command} {' | '.join(modes)} ...\n`focusdd {command} <one of them> --help` has examples")
        return 0
    if not argv or argv[0] not in modes:
        raise ConfigError(f"focusdd {command}: expected {', '.join(modes)}, got {argv[0] if argv else 'nothing'}")
    return modes[argv[0]](argv[1:])


COMMANDS: dict[str, Command | str] = {  # a text: module:function, imported when it is asked for
    "build": build_command,
    "detect": detect_command,
    "classify": classify_command,
    "verify": verify_command,
    "sheet": sheet_command,
    "grids": "focusdd_det.stats.size_match:grids_command",
    "explain": "focusdd_det.showing.command:explain_command",
    **{
        name: f"focusdd_det.interop.commands:{name}_command"
        for name in ("export", "annotations", "pack", "unpack", "card")
    },
    "stats": "focusdd_det.stats.command:stats_command",
    "map": "focusdd_det.maps.audit:map_command",
    "experiment": "focusdd_det.experiment.command:experiment_command",
    "bench": "focusdd_det.bench.command:bench_command",
    "gallery": "focusdd_det.showing.gallery:gallery_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `focusdd` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or wants_help(argv[:1]):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] in ("--version", "version"):
        print(__version__)
        return 0
    return run_main(dispatch, argv)


def dispatch(argv: Sequence[str]) -> int | None:
    """The command that the first word names, with the others; errors are raised.

    Raises:
        ConfigError: there is none of that name; FocusDDError: what the command raises.
    """
    if argv[0] not in COMMANDS:
        raise ConfigError(f"no command `{argv[0]}`{suggest(argv[0], list(COMMANDS))}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[argv[0]]
    if isinstance(command, str):
        module, _, function = command.partition(":")
        command = getattr(importlib.import_module(module), function)
    return command(argv[1:])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
