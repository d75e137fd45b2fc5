"""One stage in a process of its own: `python -m focusdd_det.experiment.child <out>/stages/<stage>.json`.

It ends when the experiment that started it does (its standard input is closed then), and it waits for another process
that is still ending the same stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """Run the stage that a file describes; returns the exit code of its command."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    from focusdd_det.cli import run_main

    file = Path(argv[0])
    return run_main(lambda _: _run(file), [str(file)])


def _end_with_the_parent() -> None:
    # Nothing is ever sent: this returns when the other end is gone. Not sys.stdin: its lock, held by a waiting thread,
    # makes the interpreter abort at its own end.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(file: Path) -> int:
    with _waited(file.with_suffix(".lock")):
        stage = json.loads(file.read_text(encoding="utf-8"))
        began = time.monotonic()
        code = _command(stage)
        trained = stage["kind"] in ("train", "distill")
        if code == 0 and trained and state_of(Path(stage["output"]), stage["argv"][0]) != "finished":
            from focusdd_det.errors import VerifyError

            raise VerifyError(f"the training ended, but {stage['output']} holds no finished one; see its log above")
        if code == 0 and stage["kind"] not in ("build", "eval"):
            from focusdd_det.disk import write_atomic

            told = {"seconds": round(time.monotonic() - began, 1), "argv": stage["argv"]}
            write_atomic(Path(stage["marker"]), (json.dumps(told) + "\n").encode())
        return code


def _command(stage: dict[str, Any]) -> int:
    argv, kind = list(stage["argv"]), stage["kind"]
    if kind in ("train", "distill"):
        how = state_of(Path(stage["output"]), argv[0])
        print(f"{kind}: {how}", flush=True)
        if how == "finished":
            return 0
        if how == "resume":
            last = Path(stage["output"]) / "weights" / "last.pt"
            argv = [*argv[:2], f"resume={last}", *(f"{key}={value}" for key, value in stage["resume"].items())]
        elif Path(stage["output"]).is_dir():
            shutil.rmtree(stage["output"])  # ours: begun by this very stage, and nothing in it can be gone on with
    if kind == "distill":
        from focusdd_det.experiment.distill import distill_command

        return distill_command(argv[1:])
    from focusdd_det.cli import dispatch

    return int(dispatch(argv) or 0)


def state_of(run: Path, command: str) -> str:
    """Whether a run folder's training is `finished`, goes on (`resume`), or has to begin (`new`).

    Args:
        command: detect, classify or distill. Stock distillation keeps nothing that it could go on from exactly.
    """
    from focusdd_det.training.exact_resume import TENSORS

    last = run / "weights" / "last.pt"
    if not last.is_file():
        return "new"
    if command == "classify":
        if (run / "accuracy.json").is_file():
            return "finished"
        return "resume" if (last.parent / TENSORS).is_file() else "new"
    from focusdd_det.checkpoints import safe_read
    from focusdd_det.errors import WeightsError

    try:
        checkpoint = safe_read(last)
    except WeightsError:
        return "new"
    if checkpoint.get("optimizer") is None and checkpoint.get("epoch", -1) < 0:
        return "finished"
    return "resume" if command == "detect" and (last.parent / TENSORS).is_file() else "new"


@contextlib.contextmanager
def _waited(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
