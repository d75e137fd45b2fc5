"""What a time was measured on. No name of a machine, of a user or of a folder."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from focusdd_det.devices import processors

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
PACKAGES = ("focusdd_det", "torch", "torchvision", "ultralytics", "timm", "opencv-python", "pillow", "numpy")


def machine(device: str) -> dict[str, Any]:
    """Processors, memory, GPU, versions.

    Args:
        device: cpu, or the number of the GPU that is measured.
    """
    import torch

    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _first_line("/proc/cpuinfo", "model name"),
        "processors": processors(),
        "flags": [flag for flag in FLAGS if flag in _first_line("/proc/cpuinfo", "flags").split()],
        "memory_gb": round(int(_first_line("/proc/meminfo", "MemTotal").split(" ")[0] or 0) / 1e6, 1),
        "torch_threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(int(device))
        facts["gpu"] = {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def described(facts: dict[str, Any]) -> str:
    """One line for people."""
    gpu, flags = facts.get("gpu"), ", ".join(facts["flags"]) or "no flags known"
    return (
        (f"{gpu['name']} ({gpu['memory_gb']} GB), CUDA {gpu['cuda']}; " if gpu else "")
        + f"{facts['processors']} x {facts['processor'] or facts['system']} ({flags}), "
        f"{facts['memory_gb']} GB, {facts['torch_threads']} torch threads, load {facts['load_at_start']}, "
        f"torch {facts['versions']['torch']}, ultralytics {facts['versions']['ultralytics']}"
    )


def _first_line(file: str, key: str) -> str:
    path = Path(file)
    if not path.is_file():
        return ""
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


def peak_resident() -> float:
    """The most memory that this process has held, MiB.

    On Linux by VmHWM: `ru_maxrss` begins with what the process held that started it.
    """
    if most := _status(Path("/proc/self")).get("VmHWM"):
        return _mib(most)
    import resource

    told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return told / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def children_peak(pid: int) -> float | None:
    """The most memory that each of a process' children that live now has held, added up, MiB; pages that they share
    count for each. None where the system does not tell (anything but Linux)."""
    own = _command(Path(f"/proc/{pid}"))
    if not own:
        return None
    children = [entry for entry in Path("/proc").glob("[0-9]*") if _status(entry).get("PPid") == str(pid)]
    # One that has not got to its own program yet holds, and counts, what its parent does.
    begun = [child for child in children if _command(child) not in (own, b"")]
    return sum(_mib(_status(child).get("VmHWM", "0")) for child in begun)


def _status(process: Path) -> dict[str, str]:
    """What Linux says of a process; empty if it has ended, and elsewhere."""
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def _mib(kib: str) -> float:
    """Of a number such as `1234 kB`."""
    return int(kib.split()[0]) / (1 << 10)
