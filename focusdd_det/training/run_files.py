"""Files of a run: what `model=` and `resume=` mean, and checkpoints that are replaced whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.tasks import DetectionModel, guess_model_task, yaml_model_load
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.files import get_latest_run
from ultralytics.utils.torch_utils import strip_optimizer

from focusdd_det.checkpoints import resolve_weights, safe_checkpoint, safe_read, safe_ultralytics
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, WeightsError


class WholePath(type(Path())):  # type: ignore[misc]
    """A path whose write_bytes is atomic: Ultralytics writes its checkpoints with it."""

    def write_bytes(self, data: Any) -> int:
        write_atomic(Path(self), bytes(data))
        return len(data)


def find_last(resume: Any) -> Path:
    """The last.pt that `resume=` means: a file, a run folder, or True for the latest run.

    Raises:
        WeightsError: there is none.
    """
    if isinstance(resume, (str, Path)):
        path = Path(resume)
        file = path / "weights" / "last.pt" if path.is_dir() else path
        if not file.is_file():
            raise WeightsError(f"nothing to resume: {file} does not exist; expected a run's weights/last.pt")
        return file
    latest = get_latest_run()
    if not latest:
        raise WeightsError("nothing to resume here; give the checkpoint: resume=<run>/weights/last.pt")
    return Path(latest)


def resumable_args(last: Path) -> dict[str, Any]:
    """The arguments of the run that a last.pt belongs to; refuses a file that cannot be resumed."""
    try:
        checkpoint = safe_read(last)
    except WeightsError as error:
        others = [p.name for p in sorted(last.parent.glob("*.pt")) if p != last]
        beside = f"model={last.parent / others[0]}" if others else "another checkpoint"
        raise WeightsError(
            f"cannot resume: {error}\nStart a new run from {beside}, or run the original command again"
        ) from error
    model = checkpoint.get("ema") or checkpoint.get("model")
    if checkpoint.get("epoch", -1) < 0 or checkpoint.get("optimizer") is None or not isinstance(model, nn.Module):
        raise WeightsError(
            f"{last} is the checkpoint of a finished run (no optimizer in it), so there is nothing to resume; "
            f"start a new run from it with model={last}"
        )
    args = checkpoint.get("train_args") or {}
    return dict(args) if isinstance(args, Mapping) else vars(args)


def checkpoint_argument(name: str, download: bool) -> str:
    """A .pt that holds a detector and nothing that runs."""
    file = resolve_weights(name, download)
    safe_checkpoint(file)
    return str(file)


def model_argument(model: Any, download: bool) -> str:
    """A .pt that exists, or a YAML of a detector; never something that Ultralytics would fetch."""
    if model is None:
        raise ConfigError("model= is missing; e.g. model=yolo11n.yaml trains YOLO11n from scratch")
    name = str(check_model_file_from_stem(str(model)))
    if Path(name).suffix == ".pt":
        return checkpoint_argument(name, download)
    if Path(name).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"model={model}: expected a .yaml (from scratch) or a .pt (from its weights)")
    try:
        task = guess_model_task(yaml_model_load(name))
    except FileNotFoundError as error:
        raise ConfigError(f"model={model}: no such YAML here or in Ultralytics; e.g. yolo11n.yaml") from error
    if task != "detect":
        raise ConfigError(f"model={model} is a model for {task}; expected a detector such as yolo11n.yaml")
    try:
        with safe_ultralytics():
            DetectionModel(name, verbose=False)
    except Exception as error:  # a model's YAML reaches us as whatever the builder trips over
        raise ConfigError(f"model={model}: no model can be built from it ({type(error).__name__}: {error})") from error
    return name


def student_head(name: str) -> tuple[int, list[float]]:
    """reg_max and the strides of the head that a model argument has, as `model_argument` returns it."""
    if Path(name).suffix == ".pt":
        model = safe_checkpoint(name)
    else:
        with safe_ultralytics():
            model = DetectionModel(name, verbose=False)
    head: Any = model.model[-1]
    return int(head.reg_max), [float(stride) for stride in head.stride]


def strip(file: Path, updates: dict[str, Any] | None) -> dict[str, Any]:
    """Ultralytics' strip_optimizer, replacing the file whole."""
    temporary = Path(file).with_name(f".{file.name}.tmp.pt")
    shutil.copyfile(file, temporary)
    stripped: dict[str, Any] = strip_optimizer(temporary, updates=updates)
    if stripped:
        temporary.replace(file)
    temporary.unlink(missing_ok=True)
    return stripped


def cut_results(csv: Path, epochs: int) -> None:
    """Drop rows of epochs that will be run again, and rows that a full disk cut short."""
    head, *rows = csv.read_text(encoding="utf-8").splitlines() if csv.is_file() and csv.stat().st_size else [""]
    kept = [row for row in rows if row.count(",") == head.count(",") and float(row.split(",")[0]) <= epochs]
    if kept:
        write_atomic(csv, ("\n".join([head, *kept]) + "\n").encode())
    else:
        csv.unlink(missing_ok=True)  # Ultralytics writes the header into a new file only
