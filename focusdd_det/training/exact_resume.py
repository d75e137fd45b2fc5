"""What a stock checkpoint forgets, kept beside it, so that a resumed run is the run that was never stopped.

`weights/resume.safetensors` holds the live float32 weights, the EMA, the optimizer's state, gradients that were
still being accumulated and the generators' states; its metadata holds the counters as JSON, so that one atomic
replacement updates everything. `weights/resume.json` is a copy of that JSON for people.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from focusdd_det.disk import write_atomic
from focusdd_det.errors import WeightsError

TENSORS, SIDECAR = "resume.safetensors", "resume.json"
FORMAT = 1
_KEY = "focusdd"


@dataclass(frozen=True)
class ResumeState:
    """A run at the end of an epoch.

    Attributes:
        tensors: names with prefixes model., ema., optimizer., grad., rng.
        counters: plain values: epoch (the last finished one, from 0), last_step (number of the batch of the last
            optimizer step), optimizer groups, EMA updates, best fitness and so on.
    """

    tensors: dict[str, Tensor]
    counters: dict[str, Any]

    @property
    def epoch(self) -> int:
        return int(self.counters["epoch"])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under a prefix, without it."""
        cut = len(prefix) + 1
        return {name[cut:]: tensor for name, tensor in self.tensors.items() if name.startswith(f"{prefix}.")}


def capture(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> ResumeState:
    """A copy of everything that the next epoch depends on; `counters` are the caller's own plain values."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    tensors |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    numpy_state: Any = np.random.get_state()
    tensors["rng.numpy"] = torch.from_numpy(numpy_state[1].astype(np.int64))
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    everything = {
        "format": FORMAT,
        **counters,
        "optimizer_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "rng_python": random.getstate(),
        "rng_numpy": [numpy_state[0], *numpy_state[2:]],
    }
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    return ResumeState(copies, everything)


def restore(state: ResumeState, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights, EMA and optimizer as they were; gradients and generators have functions of their own."""
    model.load_state_dict(state.part("model"))
    ema.load_state_dict(state.part("ema"))
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in state.part("optimizer").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    for key, values in state.counters["optimizer_scalars"].items():
        slots.setdefault(int(key), {}).update(values)
    groups = [
        {name: tuple(value) if name == "betas" else value for name, value in group.items()}
        for group in state.counters["optimizer_groups"]
    ]
    for group, live in zip(groups, optimizer.param_groups, strict=False):
        if "fused" in live:
            group["fused"] = live["fused"]  # which kernel runs is the device's, not the run's
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    for parameter, slot in optimizer.state.items():
        for name, value in slot.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slot[name] = laid_out_like(parameter, value)


def restore_gradients(state: ResumeState, model: nn.Module) -> None:
    """Gradients that were being accumulated over the end of the epoch."""
    gradients = state.part("grad")
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = laid_out_like(parameter, gradients[name])


def laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The values on the parameter's device and in its memory layout: sums run in the order of the layout."""
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def restore_generators(state: ResumeState) -> None:
    """Python's, NumPy's and torch's random generators as they were."""
    version, words, gauss = state.counters["rng_python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = state.counters["rng_numpy"]
    words_numpy = state.tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, words_numpy, position, has_gauss, cached))
    torch.set_rng_state(state.tensors["rng.torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng.cuda{index}" in state.tensors:
            torch.cuda.set_rng_state(state.tensors[f"rng.cuda{index}"], index)


def save(state: ResumeState, weights: Path) -> None:
    """Write both files into the run's weights folder, each by a temporary name and one replacement.

    Raises:
        DiskError: full disk, no permission; the files of the epoch before are still there.
    """
    write_atomic(weights / TENSORS, serialize(state.tensors, metadata={_KEY: json.dumps(state.counters)}))
    readable = {k: v for k, v in state.counters.items() if not k.startswith("rng_")}
    write_atomic(weights / SIDECAR, json.dumps(readable, indent=1).encode())


def load(weights: Path) -> ResumeState | None:
    """The state in a run's weights folder, or None if there is none.

    Raises:
        WeightsError: the file is damaged or of another format.
    """
    return _read(weights, tensors=True)


def load_counters(weights: Path) -> dict[str, Any] | None:
    """Only the counters of the state in a run's weights folder, or None if there is none.

    Raises:
        WeightsError: the file is damaged or of another format.
    """
    state = _read(weights, tensors=False)
    return None if state is None else state.counters


def _read(weights: Path, *, tensors: bool) -> ResumeState | None:
    file = weights / TENSORS
    if not file.is_file():
        return None
    way_on = "delete it to resume from last.pt alone, which is not exact"
    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            counters = json.loads((archive.metadata() or {})[_KEY])
            names = archive.keys() if tensors else ()
            found = {name: archive.get_tensor(name) for name in names}
    except Exception as error:  # the reader's own error type is not part of its public names
        raise WeightsError(f"{file} is damaged ({error}); {way_on}") from error
    if counters.get("format") != FORMAT:
        raise WeightsError(f"{file} has format {counters.get('format')}, expected {FORMAT}; {way_on}")
    return ResumeState(found, counters)


def remove(weights: Path) -> None:
    """Delete both files: a finished run has nothing to resume."""
    for name in (TENSORS, SIDECAR):
        (weights / name).unlink(missing_ok=True)
