"""Trainings on several GPUs, as far as they can be tried without one: who ends with whom, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from focusdd_det.errors import FocusDDError
from focusdd_det.training.run_guard import run_to_end

CHILD = """
import time
from focusdd_det.training.run_guard import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize(("rank", "ends"), [("0", True), ("-1", False)])
def test_a_process_of_a_training_ends_with_the_one_that_started_it(rank: str, ends: bool) -> None:
    environment = {**os.environ, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    try:
        until = time.monotonic() + (20 if ends else 1)
        while alive(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert alive(pid) is not ends
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_failed_is_no_bug_of_ours(tmp_path: Path) -> None:
    def train() -> None:
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=True)

    trainer = SimpleNamespace(train=train, last=tmp_path / "last.pt", save_dir=tmp_path)
    with pytest.raises(FocusDDError, match=r"its error stands above\. No epoch was finished"):
        run_to_end(trainer, "detect train")
    trainer.last.touch()
    with pytest.raises(FocusDDError, match=r"go on with resume=.*last\.pt"):
        run_to_end(trainer, "detect train")
