"""Checkpoints of Ultralytics: found or fetched, and read without running code from them."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import SETTINGS
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

from focusdd_det.errors import WeightsError

_HOW_TO_GET = "pass a checkpoint that Ultralytics saved, e.g. an official yolo11n.pt or the best.pt of a training run"


@contextlib.contextmanager
def safe_ultralytics() -> Iterator[None]:
    """Inside, Ultralytics loads checkpoints with weights_only and builds their models without eval().

    Its own switch, ULTRALYTICS_SAFE_LOAD, is read once at import; this one lasts for a block. Without it the
    `activation:` line inside a checkpoint is evaluated as Python when a model is built from it.
    """
    before = tasks.SAFE_LOAD
    tasks.SAFE_LOAD = True
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before


def resolve_weights(path: str | os.PathLike[str], download: bool = False) -> Path:
    """The file that a checkpoint argument means.

    Args:
        path: a file, or the bare name of an official checkpoint (`yolo11x.pt`), which is also looked for in
            Ultralytics' weights folder.
        download: fetch a missing official checkpoint with Ultralytics' own downloader, into the working
            folder.

    Raises:
        WeightsError: no such file, and either not an official name, or not asked to download it, or the
            download failed.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise WeightsError(f"{file} is a folder, expected a checkpoint file (.pt); {_HOW_TO_GET}")
    official = file.name in GITHUB_ASSETS_NAMES and file.name == str(path)
    if not official:
        raise WeightsError(f"checkpoint not found: {file} (looked in {Path.cwd()}); {_HOW_TO_GET}")
    known = Path(SETTINGS["weights_dir"]) / file.name
    if known.is_file():
        return known
    if not download:
        raise WeightsError(
            f"{file.name} is an official Ultralytics checkpoint, but there is no such file here or in "
            f"{known.parent}, and nothing is downloaded without being asked; add download=True to fetch it "
            "with Ultralytics, or get it from https://github.com/ultralytics/assets/releases and pass its "
            "path"
        )
    try:
        fetched = Path(attempt_download_asset(file.name))
    except Exception as error:  # the downloader raises whatever its transport raises
        raise WeightsError(
            f"downloading {file.name} failed: {error}; get the file yourself and pass its path"
        ) from error
    if not fetched.is_file():
        raise WeightsError(f"downloading {file.name} gave no file; get the file yourself and pass its path")
    return fetched


def _check_container(file: Path) -> None:
    """Name the usual wrong files before anything is unpickled."""
    size = file.stat().st_size
    if size == 0:
        raise WeightsError(f"{file} is empty (0 bytes), expected a checkpoint; download or copy it again")
    with file.open("rb") as stream:
        head = stream.read(512)
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{file} is a web page, not a checkpoint (a download that was answered with HTML); download it again"
        )
    if head[:2] != b"PK":
        raise WeightsError(
            f"{file} is not a PyTorch checkpoint ({size} bytes, starts with {head[:8]!r}; expected a zip "
            f"archive as torch.save writes it); {_HOW_TO_GET}"
        )
    if not zipfile.is_zipfile(file):
        raise WeightsError(
            f"{file} is cut short: it begins like a checkpoint, but the end of the archive is missing "
            f"({size} bytes); copy or download it again"
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        raise WeightsError(
            f"{file} is a TorchScript archive, an exported model; expected the checkpoint it was exported "
            f"from; {_HOW_TO_GET}"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(f"{file} is a zip archive without data.pkl, so not a PyTorch checkpoint; {_HOW_TO_GET}")


def safe_read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in an Ultralytics checkpoint, read with an allow-list of classes; no code from the file
    runs.

    Raises:
        WeightsError: missing, empty, a web page, cut short, TorchScript, not a checkpoint, or it needs a
            class that is not on Ultralytics' allow-list (custom code).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsError(f"checkpoint not found: {file}; {_HOW_TO_GET}")
    _check_container(file)
    # Ultralytics rewrites names (yolov5s.pt, quotes) and may then download another file; this name is never
    # rewritten.
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoint.pt"
        try:
            link.symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, link)
        try:
            checkpoint, _ = tasks.torch_safe_load(str(link), safe_only=True)
        except (TypeError, ImportError, AttributeError, pickle.UnpicklingError) as error:
            raise WeightsError(
                f"{file} was refused: it needs code that is not part of Ultralytics or PyTorch "
                f"({_reason(error, link)}). Such a file can run anything when it is opened. "
                f"{_HOW_TO_GET[0].upper()}{_HOW_TO_GET[1:]}"
            ) from error
        except Exception as error:  # a damaged archive reaches us as whatever the reader trips over
            raise WeightsError(
                f"{file} cannot be read as a checkpoint ({_reason(error, link)}); copy or download it again"
            ) from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{file} holds a {type(checkpoint).__name__}, expected a checkpoint dict; {_HOW_TO_GET}")
    return checkpoint


def _reason(error: BaseException, link: Path) -> str:
    cause: BaseException = error.__cause__ or error
    text = str(cause).replace(str(link), "the file")
    first = next((line.strip() for line in text.splitlines() if "GLOBAL" in line or "blocked" in line), "")
    return first or (text.splitlines() or [type(cause).__name__])[0]


def safe_checkpoint(path: str | os.PathLike[str]) -> DetectionModel:
    """A detection model from an Ultralytics checkpoint, without running code from the file and without a
    download.

    Returns:
        The EMA model if the file has one, else the model; float32, eval, on the CPU.

    Raises:
        WeightsError: as `safe_read`; or the file holds no detection model.
    """
    checkpoint = safe_read(path)
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, DetectionModel):
        what = type(model).__name__ if model is not None else f"keys {sorted(map(str, checkpoint))[:8]}"
        raise WeightsError(f"{path} holds no Ultralytics detection model ({what}); {_HOW_TO_GET}")
    head = model.model[-1]
    if type(head) is not Detect:
        raise WeightsError(
            f"{path} is a {type(head).__name__} model, expected a plain detector (head Detect); {_HOW_TO_GET}"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Upsample) and not hasattr(module, "recompute_scale_factor"):
            module.recompute_scale_factor = None  # checkpoints older than torch 1.11
    return model.float().eval()
