"""The stages of an arm: build, store, train, evaluate; each with a key, a place and a command.

<out>/
  sets/<key>/      distilled sets            stores/<key>/  soft targets or logits
  runs/<key>/      run folders               evals/<key>.json  COCO mAP
  scores/<key>.sqlite  what the ViT saw, shared by builds      stages/  each stage's command, config, log and marker
  results.jsonl    a line per arm and seed that is finished, and per stage that failed
  results.md, results.json, plot.png

A key is the hash of everything that determines the stage's result: its config, the content of every file that it names,
the manifest of its set, the versions. So equal stages of several arms are one, and a finished one is found again. The
code itself is not in it: hours of work would be made again after any change. A result says which code made its stages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from focusdd_det import disk
from focusdd_det.build import MACHINE_KEYS, PACKAGES
from focusdd_det.checkpoints import resolve_weights
from focusdd_det.classmap import find_map
from focusdd_det.config import SetConfig, as_plain, cfg_dir
from focusdd_det.disk import file_sha256
from focusdd_det.errors import ConfigError, DataError, VerifyError, WeightsError
from focusdd_det.experiment.grid import Arm
from focusdd_det.experiment.settings import (
    DISTILL,
    Steps,
    build_config,
    build_settings,
    eval_settings,
    existing,
    relabel_settings,
    steps_of,
    targets_settings,
    train_settings,
    uses_store,
    uses_targets,
)
from focusdd_det.experiment.spec import Experiment
from focusdd_det.methods import METHODS
from focusdd_det.plan import source_entry
from focusdd_det.sources import tar_members
from focusdd_det.training.traindata import load_yolo_data, resolve_data
from focusdd_det.tree import entries_below

PLACES = ("sets", "stores", "runs", "evals", "scores", "stages")
# Of the training and the evaluation: where and how fast, not what.
TRAIN_MACHINE = ("device", "workers", "plots", "verbose", "save_period", "cache", "download")
TRAIN_FILES = ("model", "teacher", "teacher_weights", "weights", "pretrained", "backbone", "eval_data")
STORE_MACHINE = ("device", "workers", "download", "overwrite")
STORE_FILES = ("teacher", "teacher_weights", "eval_data")
EVAL_MACHINE = ("device", "download")
PACKAGE = Path(__file__).resolve().parent.parent
_ALL_EQUAL = ("random", "whole")  # methods that look at sources in the same way, without the ViT


@dataclass(frozen=True)
class Stage:
    """One command that has a result of its own.

    Attributes:
        kind: build, targets, relabel, train, distill or eval.
        key: hash of what determines the result.
        output: the folder or file that it makes.
        argv: of the `focusdd` command; `{config}` stands for the file with `config`.
        config: keys and values of that file.
        resume: options that a stopped training goes on with, besides `resume=`.
        alone: stages with the same one do not run at the same time; empty: any may.
    """

    kind: str
    key: str
    output: Path
    argv: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    resume: Mapping[str, Any] = field(default_factory=dict)
    alone: str = ""

    @property
    def name(self) -> str:
        """`train-0123456789ab`: names its files."""
        return f"{self.kind}-{self.key}"


class Fingerprints:
    """Hashes of files and folders, each computed once while it does not change."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int, int], str] = {}
        self._folders: dict[Path, str] = {}

    def of(self, value: Any) -> Any:
        """What stands for a value in a key: the content of the file or folder that it names, else itself."""
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        path = existing(value)
        if path is None:
            try:
                path = resolve_weights(str(value)) if isinstance(value, str) and value.endswith(".pt") else None
            except WeightsError:
                path = None
        if path is None:
            return value
        return {"folder": self.folder(path)} if path.is_dir() else {"file": self.file(path)}

    def file(self, path: Path) -> str:
        """Of a file's bytes; of a spec .json, also of the weights that it names."""
        status = path.stat()
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
        if key not in self._files:
            digest = file_sha256(path)
            if path.suffix == ".json" and status.st_size < 1 << 20:
                digest += self._beside(path)
            self._files[key] = digest
        return self._files[key]

    def _beside(self, path: Path) -> str:
        try:
            weights = json.loads(path.read_text(encoding="utf-8")).get("weights")
        except (ValueError, AttributeError, OSError):
            return ""
        beside = path.parent / str(weights)
        return file_sha256(beside) if weights and beside.is_file() else ""

    def folder(self, path: Path) -> str:
        """Of the names and sizes of the files in a folder (hidden ones left out) in any order, and in tars there; or of
        those in a tar."""
        path = path.resolve()
        if path not in self._folders:
            if path.is_file():
                self._folders[path] = _archive(path)
            else:
                total = count = 0
                for entry in entries_below(path, pass_over=True):
                    if entry.name.endswith(".cache"):
                        continue  # of Ultralytics, not of the data
                    relative = os.path.relpath(entry.path, path)
                    relative = relative if "/" in relative else f"./{relative}"  # as ever, so that results are found
                    inside = _archive(Path(entry.path)) if entry.name.endswith(".tar") else ""
                    line = f"{relative}/{_size(entry.path)}{inside}".encode("utf-8", "surrogateescape")
                    total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "big")
                    count += 1
                self._folders[path] = f"{count} files {total % (1 << 128):032x}"
        return self._folders[path]

    def sources(self, config: SetConfig) -> list[Any]:
        """Of every source of a build and its map."""
        found = []
        for path, own, name in map(source_entry, config.sources):
            location = Path(path).expanduser()
            listed = self.folder(location) if location.exists() else path
            found.append([name or location.name, listed, self.file(find_map(str(own))) if own else None])
        return found


def _size(file: str) -> int:
    """Of the file that a link leads to, where it leads to one."""
    try:
        return os.stat(file).st_size  # noqa: PTH116
    except OSError:
        return os.lstat(file).st_size


def _archive(path: Path) -> str:
    """Of the names and sizes of a tar's members: archives of equal size are common, as tar pads them. Of the size alone
    where it cannot be read as a tar; the build says why."""
    listed = hashlib.blake2b(digest_size=16)
    try:
        for member in tar_members(path) if path.is_file() else ():
            listed.update(f"{member.name}/{member.size}\n".encode("utf-8", "surrogateescape"))
    except DataError:
        return f"{path.stat().st_size}"
    return listed.hexdigest()


def code_sha256(package: Path, configs: Path) -> str:
    """12 hex digits of a package's code and configs; what an experiment's own file asks for, each result knows."""
    files = [*package.rglob("*.py"), *(f for f in configs.iterdir() if f.is_file())]
    total = hashlib.sha256()
    for file in sorted(set(files), key=str):
        place = package if file.is_relative_to(package) else configs
        total.update(f"{file.relative_to(place).as_posix()} {file_sha256(file)}\n".encode())
    return total.hexdigest()[:12]


def key_of(content: Any) -> str:
    """12 hex digits of anything plain."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Finished:
    """An arm and seed whose stages are all there.

    Attributes:
        stages: kind -> key.
        steps: of its training.
        measured: what the evaluation wrote.
    """

    stages: Mapping[str, str]
    steps: Steps
    measured: Mapping[str, Any]


class Work:
    """The work folder of an experiment: which stage comes next for an arm and seed, and what is there already."""

    def __init__(self, experiment: Experiment, out: Path) -> None:
        self.experiment = experiment
        self.out = out.resolve()
        self.prints = Fingerprints()
        self.versions = {name: version(name) for name in ("focusdd_det", *PACKAGES)}
        self.code = code_sha256(PACKAGE, cfg_dir())
        self._manifests: dict[tuple[Path, int], tuple[str, int]] = {}
        self._evaluated: dict[str, Any] = {}  # data.yaml -> what stands for its pictures

    def place(self, kind: str, name: str) -> Path:
        """Where something lies."""
        return self.out / kind / name

    def done(self, stage: Stage) -> bool:
        """Whether a stage has finished and its result is still there."""
        if stage.kind == "build":
            return (stage.output / "COMPLETE").is_file()
        if stage.kind == "eval":
            return stage.output.is_file()
        there = {"train": "weights/last.pt", "distill": "weights/last.pt"}.get(stage.kind, "")
        return self.marker(stage).is_file() and (stage.output / there).exists()

    def begun(self, stage: Stage) -> bool:
        """Whether there is something that the stage goes on with."""
        if stage.kind in ("build", "targets", "relabel"):
            return stage.output.with_name(stage.output.name + disk.INCOMPLETE).is_dir()
        return stage.kind in ("train", "distill") and (stage.output / "weights" / "last.pt").is_file()

    def marker(self, stage: Stage) -> Path:
        """The file that the stage's process writes when it has finished."""
        return self.place("stages", f"{stage.name}.done")

    def code_of(self, keys: Iterable[str]) -> str:
        """The code that made some stages: one hash, or several where it changed in between."""
        return " ".join(sorted({code for key in keys for code in self._codes(key)}))

    def _codes(self, key: str) -> list[str]:
        for file in (self.out / "stages").glob(f"*-{key}.json"):
            try:
                return [str(code) for code in json.loads(file.read_text(encoding="utf-8"))["code"]]
            except (OSError, ValueError, KeyError, TypeError):
                break  # written before there was a hash of the code
        return ["unknown"]

    def codes_until(self, stage: Stage) -> list[str]:
        """The code that will have made a stage when it has been run now: also that which began it."""
        return sorted({self.code, *(self._codes(stage.key) if self.begun(stage) else ())})

    def inputs(self, arm: Arm, seed: int) -> dict[str, str]:
        """Path -> what stands there, of an arm's sources, models and evaluation data.

        Raises:
            ConfigError, DataError: the evaluation data cannot be used.
        """
        config = build_config(self.experiment, arm, seed)
        paths = [source_entry(entry)[0] for entry in config.sources]
        found: dict[str, Any] = dict(zip(paths, self.prints.sources(config), strict=True))
        evaluation = self.experiment.section("eval", arm)
        given = [self.experiment.section(name, arm) for name in ("targets", "relabel", "train")]
        named = [section.get(key) for section in given for key in ("teacher", "teacher_weights", "weights", "backbone")]
        named += [config.selector, config.selector_weights, getattr(config, "teacher", None)]
        named += [evaluation.get("annotations"), evaluation.get("images")]
        found |= {str(value): self.prints.of(value) for value in named if value is not None}
        if evaluation.get("data"):
            data = str(evaluation["data"])
            found[data] = self._pictures(data) if self.experiment.task == "detect" else self.prints.of(data)
        return {path: key_of(content) for path, content in found.items()}

    # ---- the chain ----

    def next(self, arm: Arm, seed: int) -> Stage | Finished:
        """The first stage of an arm and seed that is not done, or what they all made.

        Raises:
            ConfigError, DataError, VerifyError: a result that cannot be used.
        """
        build = self.build(arm, seed)
        keys = {"build": build.key}
        if not self.done(build):
            return build
        manifest, composites = self.manifest(build.output)
        steps = steps_of(self.experiment, arm, composites)
        train = train_settings(self.experiment, arm, seed, steps)
        store: Stage | None = None
        if uses_targets(self.experiment, train):
            store = self._store("targets", targets_settings(self.experiment, arm, seed, train), manifest, build.output)
        elif uses_store(self.experiment, train):
            store = self._store("relabel", relabel_settings(self.experiment, arm, seed, train), manifest, build.output)
        if store is not None:
            keys[store.kind] = store.key
            if not self.done(store):
                return store
        training = self._train(train, manifest, build.output, store)
        keys["train"] = training.key
        if not self.done(training):
            return training
        if self.experiment.task == "classify":
            return Finished(keys, steps, _read_json(training.output / "accuracy.json"))
        evaluation = self._eval(eval_settings(self.experiment, arm, train), training, build.output)
        keys["eval"] = evaluation.key
        if not self.done(evaluation):
            return evaluation
        return Finished(keys, steps, _read_json(evaluation.output))

    def manifest(self, folder: Path) -> tuple[str, int]:
        """Hash of a set's manifest and how many composites it lists."""
        file = folder / "manifest.jsonl"
        key = (file, file.stat().st_mtime_ns)
        if key not in self._manifests:
            with file.open("rb") as lines:
                count = sum(1 for line in lines if line.strip())
            self._manifests[key] = file_sha256(file), count
        return self._manifests[key]

    def build(self, arm: Arm, seed: int) -> Stage:
        """The build of an arm's set."""
        config = build_config(self.experiment, arm, seed)
        content = {key: value for key, value in as_plain(config).items() if key not in MACHINE_KEYS}
        for name in ("selector", "selector_weights", "teacher", "plugins"):
            if hasattr(config, name):
                content[name] = self.prints.of(getattr(config, name))
        if self.experiment.task == "detect":
            content["class_map"] = self.prints.file(find_map(str(config.class_map)))  # type: ignore[attr-defined]
        content["sources"] = self.prints.sources(config)
        key = key_of(["build", self.experiment.task, content, self.versions])
        output = self.place("sets", key)
        scores = self.place("scores", f"{self._scores_key(config, content)}.sqlite")
        given = {**build_settings(self.experiment, arm, seed), "out": str(output), "scores": str(scores)}
        command = ("build",) if self.experiment.task == "detect" else ("classify", "build")
        return Stage("build", key, output, (*command, "config={config}"), given, alone=str(scores))

    def _scores_key(self, config: SetConfig, content: Mapping[str, Any]) -> str:
        """Of builds that look at the same sources in the same way."""
        method = METHODS.get(config.method)
        shared = ["geometry", "max_pixels", "sources", "class_map", "classes", "ipc_unit", "levels"]
        if config.method not in _ALL_EQUAL:
            shared += ["method", "selector", "selector_weights", "view", "attention", "side_ratio"]
            shared += ["confidence", "precision", "plugins"] + (["seed"] if method is not None and method.looks else [])
        if method is None or method.needs_teacher:
            shared.append("teacher")  # it may be what looks
        return key_of([content.get(key) for key in shared])

    def _store(self, kind: str, values: dict[str, Any], manifest: str, data: Path) -> Stage:
        content = {key: value for key, value in values.items() if key not in (*STORE_MACHINE, "data", "out")}
        content |= {key: self.prints.of(content[key]) for key in STORE_FILES if key in content}
        key = key_of([kind, content, manifest, self.versions])
        output = self.place("stores", key)
        command = ("detect", "targets") if kind == "targets" else ("classify", "relabel")
        given = {**values, "data": str(data), "out": str(output)}
        return Stage(kind, key, output, (*command, "config={config}"), given)

    def _train(self, values: dict[str, Any], manifest: str, data: Path, store: Stage | None) -> Stage:
        detect = self.experiment.task == "detect"
        content = {key: value for key, value in values.items() if key not in TRAIN_MACHINE}
        if content.get("backbone") is None:
            content.pop("backbone", None)  # trainings from before there was such an option are the same
        content |= {key: self.prints.of(content[key]) for key in TRAIN_FILES if key in content}
        key = key_of(["train", content, manifest, store.key if store else None, self.versions])
        output = self.place("runs", key)
        given = {**values, "data": str(data), "project": str(output.parent), "name": key, "exist_ok": True}
        movable = ["data", "teacher", "teacher_weights", "eval_data", "device", "workers"]
        if store is not None:
            given["targets" if detect else "store"] = str(store.output)
            movable += ["targets", "store"]
        resume = {key: given[key] for key in movable if given.get(key) is not None}
        if detect and values["supervision"] == DISTILL:
            return Stage("distill", key, output, ("distill", "{config}"), given, resume)
        command = ("detect", "train") if detect else ("classify", "train")
        if detect:
            resume.pop("eval_data", None)
        return Stage("train", key, output, (*command, "cfg={config}"), given, resume)

    def _eval(self, values: dict[str, Any], training: Stage, data: Path) -> Stage:
        content: dict[str, Any] = {key: value for key, value in values.items() if key not in EVAL_MACHINE}
        content |= {key: self.prints.of(content[key]) for key in ("annotations", "images") if key in content}
        if content.get("data"):
            content["data"] = self._pictures(str(content["data"]))
        key = key_of(["eval", content, training.key, self.versions])
        output = self.place("evals", f"{key}.json")
        given = {**values, "model": str(training.output / "weights" / "last.pt"), "set": str(data), "out": str(output)}
        if given.get("covered"):
            del given["set"]
        words = [f"{name}={_word(value)}" for name, value in given.items() if value is not None]
        return Stage("eval", key, output, ("detect", "val", *words))

    def _pictures(self, data: str) -> Any:
        """What a YOLO data.yaml stands for: its pictures and their COCO annotations."""
        from focusdd_det.coco_eval import usual_annotations

        if data in self._evaluated:
            return self._evaluated[data]
        described = load_yolo_data(resolve_data(data).yaml, "val")
        annotations = usual_annotations(described)
        if annotations is None:
            raise ConfigError(
                f"eval: data={data}: there is no annotations/instances_*.json beside its pictures; give "
                "eval.annotations=, the official COCO mAP is computed from nothing else"
            )
        self._evaluated[data] = [self.prints.of(described["val"]), self.prints.file(annotations)]
        return self._evaluated[data]


def write_stage(work: Work, stage: Stage) -> Path:
    """What the stage's process reads; returns the file."""
    config = work.place("stages", f"{stage.name}.yaml")
    if stage.config:
        text = yaml.safe_dump(_plain(stage.config), sort_keys=False)
        disk.write_atomic(config, f"# {stage.kind}; written by focusdd experiment\n{text}".encode())
    content = {
        "kind": stage.kind,
        "output": str(stage.output),
        "marker": str(work.marker(stage)),
        "argv": [word.replace("{config}", str(config)) for word in stage.argv],
        "resume": _plain(stage.resume),
        "code": work.codes_until(stage),
    }
    file = work.place("stages", f"{stage.name}.json")
    disk.write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())
    return file


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path} cannot be read ({error}); remove it and run the experiment again") from error
    if not isinstance(content, dict):
        raise VerifyError(f"{path} is not a result of ours; remove it and run the experiment again")
    return content
