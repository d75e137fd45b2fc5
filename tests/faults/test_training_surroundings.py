"""The same training in another locale, time zone and hash seed, as a user's own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from faults.training import equal_runs, options, words
from focusdd_det.cli import run_main
from focusdd_det.training.command import train

SITECUSTOMIZE = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"reached for the network: {args}")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""


def test_another_locale_timezone_and_hash_seed_and_no_network(
    tmp_path: Path, drawn_set: Path, teacher_file: Path
) -> None:
    """Weights and results are the same bits, and a process without a network misses nothing."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    given = options(tmp_path, data=drawn_set, teacher=teacher_file, epochs=2)
    elsewhere = {
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Pacific/Kiritimati",
        "PYTHONHASHSEED": "4242",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "python"), str(REPOSITORY)]),
    }
    command = [sys.executable, str(REPOSITORY / "tools" / "train_det.py"), *words({**given, "name": "elsewhere"})]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **elsewhere}, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert run_main(train, words({**given, "name": "here"})) == 0
    assert equal_runs(tmp_path / "runs" / "elsewhere", tmp_path / "runs" / "here")
