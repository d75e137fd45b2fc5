"""Trainings that are killed, interrupted, or run out of disk go on, and end with the weights of an unbroken one."""

from __future__ import annotations

import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from faults.child import Fault
from faults.support import temporary_files, until
from faults.training import EPOCHS, Moment, Train, equal_runs, options, rows, start, words

SAVES = ("last.pt.tmp", "best.pt.tmp", "resume.safetensors.tmp")


@pytest.fixture(scope="module")
def given(
    drawn_set: Path, teacher_file: Path, drawn_coco: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Data, teacher, and an evaluation that chooses best.pt; without annotations, which would cost half of the time."""
    evaluation = Path(shutil.copytree(drawn_coco.parent, tmp_path_factory.mktemp("evaluation") / "val"))
    shutil.rmtree(evaluation / "annotations")
    file = evaluation / "data.yaml"
    file.write_text(file.read_text().replace(str(drawn_coco.parent), str(evaluation)))
    return {"data": str(drawn_set), "teacher": str(teacher_file), "eval_data": str(file)}


@pytest.fixture(scope="module")
def unbroken(given: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training that nothing happened to. Read only."""
    top = tmp_path_factory.mktemp("unbroken-training")
    run = start(words(options(top, **given)), top / "logs")
    assert run.wait() == 0, run.err
    return top / "runs" / "run"


@pytest.fixture
def begin(given: dict[str, str], tmp_path: Path) -> Train:
    """Start the same training in `tmp_path / "runs"`, with a fault."""

    def train(fault: Fault | None = None, moment: Moment | None = None, top: Path = tmp_path) -> object:
        return start(words(options(top, **given)), tmp_path / "logs", fault, moment)

    return train  # type: ignore[return-value]


def go_on(top: Path, logs: Path, unbroken: Path, moment: Moment | None = None) -> str:
    """Resume, compare with the unbroken run, and return what was said."""
    run = top / "runs" / "run"
    again = start([f"resume={run / 'weights' / 'last.pt'}"], logs, moment=moment)
    assert again.wait() == 0, again.err
    assert equal_runs(run, unbroken)
    assert temporary_files(run) == []
    assert "resuming exactly" in again.out + again.err
    return again.out + again.err


def second(top: Path) -> Path:
    """The run folder that the same command made beside the first one."""
    (folder,) = (path for path in (top / "runs").iterdir() if path.name != "run")
    return folder


@pytest.mark.slow
def test_sigkill_inside_an_epoch(begin: Train, tmp_path: Path, unbroken: Path) -> None:
    assert begin(moment=Moment(2, 1, "kill")).wait() == -signal.SIGKILL
    go_on(tmp_path, tmp_path / "again", unbroken)


def test_sigkill_from_outside(begin: Train, tmp_path: Path, unbroken: Path) -> None:
    run = begin()
    state = tmp_path / "runs" / "run" / "weights" / "resume.json"
    until(lambda: state.is_file() and '"epoch": 0' in state.read_text(), "the end of the first epoch")
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    go_on(tmp_path, tmp_path / "again", unbroken)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        # results.csv has the row of epoch 2, last.pt is that of epoch 1
        pytest.param("last.pt.tmp", 1, marks=pytest.mark.slow),
        ("resume.safetensors.tmp", 1),  # last.pt of epoch 1, nothing of ours but the start
        ("resume.safetensors.tmp", 2),  # last.pt is one epoch ahead
        ("last.pt.tmp.pt", 0),  # all epochs done, checkpoints not yet stripped
    ],
)
def test_sigkill_while_a_checkpoint_is_saved(begin: Train, tmp_path: Path, unbroken: Path, name: str, at: int) -> None:
    """At the rename that would have put the file in its place."""
    fault = Fault("kill", str(tmp_path / "runs"), at, name, ("os.rename",))
    assert begin(fault).wait() == -signal.SIGKILL
    go_on(tmp_path, tmp_path / "again", unbroken)


def test_sigkill_in_the_first_epoch_costs_nothing_but_the_start(begin: Train, tmp_path: Path, unbroken: Path) -> None:
    assert begin(moment=Moment(0, 1, "kill")).wait() == -signal.SIGKILL
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    refused = start([f"resume={last}"], tmp_path / "refused")
    assert refused.wait() == 4
    assert f"{last} does not exist" in refused.err
    assert begin().wait() == 0
    assert equal_runs(second(tmp_path), unbroken)


def test_sigkill_again_and_again(begin: Train, tmp_path: Path, unbroken: Path) -> None:
    assert begin(moment=Moment(1, 1, "kill")).wait() == -signal.SIGKILL
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    moment = Moment(2, 0, "kill")
    assert start([f"resume={last}"], tmp_path / "logs", moment=moment).wait() == -signal.SIGKILL
    go_on(tmp_path, tmp_path / "again", unbroken)


def test_sigint(begin: Train, tmp_path: Path, unbroken: Path) -> None:
    run = begin(moment=Moment(1, 1, "interrupt"))
    assert run.wait() == 130
    assert f"resume={tmp_path / 'runs' / 'run' / 'weights' / 'last.pt'}" in run.err
    assert temporary_files(tmp_path / "runs") == []
    go_on(tmp_path, tmp_path / "again", unbroken)


def test_sigkill_of_a_process_that_loads_pictures(given: dict[str, str], tmp_path: Path) -> None:
    """The run ends within the time that a test has, names the process, and can be resumed, with workers or without.

    Eight batches are loaded ahead, so there must be more of them left.
    """
    longer = {**given, "batch": 2, "epochs": 4, "close_mosaic": 0}
    alone = start(words(options(tmp_path, **longer, name="alone")), tmp_path / "alone")
    run = start(words(options(tmp_path, **longer)), tmp_path / "logs", moment=Moment(0, 4, "worker", workers=2))
    assert alone.wait() == 0, alone.err
    assert run.wait() == 1, run.err
    assert re.search(r"picture-loading process \d+ \(exit code -9\)[^\n]* died", run.err), run.err
    assert f"resume={tmp_path / 'runs' / 'run' / 'weights' / 'last.pt'}" in run.err
    assert "Traceback" not in run.err
    go_on(tmp_path, tmp_path / "again", tmp_path / "runs" / "alone", Moment(workers=2))


@pytest.mark.parametrize("name", ["results.csv", *(pytest.param(name, marks=pytest.mark.slow) for name in SAVES)])
def test_a_limit_on_file_size_is_reached(begin: Train, tmp_path: Path, unbroken: Path, name: str) -> None:
    """From the second time on that the file is written, no file can grow any more."""
    assert begin(Fault("limit", str(tmp_path / "runs"), 1, name, ("open",))).wait() == 5
    assert temporary_files(tmp_path / "runs") == []
    go_on(tmp_path, tmp_path / "again", unbroken)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0, "only the training was limited"


@pytest.mark.parametrize("name", ["resume.safetensors.tmp", pytest.param("results.csv", marks=pytest.mark.slow)])
def test_the_disk_is_full(begin: Train, small_disk: Path, tmp_path: Path, unbroken: Path, name: str) -> None:
    run = begin(Fault("fill", str(small_disk), 1, name, ("open",)), top=small_disk)
    assert run.wait() == 5, run.err
    assert "No space left on device" in run.err
    assert f"go on with resume={small_disk / 'runs' / 'run' / 'weights' / 'last.pt'}" in run.err
    assert temporary_files(small_disk) == []
    (small_disk / "filler").unlink()
    go_on(small_disk, tmp_path / "again", unbroken)


@pytest.mark.slow
def test_the_disk_is_full_before_the_first_epoch_ends(begin: Train, small_disk: Path, unbroken: Path) -> None:
    run = begin(Fault("fill", str(small_disk), 0, "resume.safetensors.tmp", ("open",)), top=small_disk)
    assert run.wait() == 5, run.err
    assert "No epoch was finished: when that is mended, give the same command again" in run.err
    (small_disk / "filler").unlink()
    assert begin(top=small_disk).wait() == 0
    assert equal_runs(second(small_disk), unbroken)


def test_the_run_folder_cannot_be_made(given: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    run = start(words(options(tmp_path, **given)), tmp_path / "logs")
    assert run.wait() == 5, run.err


@pytest.mark.slow
def test_sigkill_after_every_batch(begin: Train, tmp_path: Path, given: dict[str, str], unbroken: Path) -> None:
    for moment in [Moment(epoch, batch, "kill") for epoch in range(1, EPOCHS) for batch in range(3)]:
        top = tmp_path / f"{moment.epoch}-{moment.batch}"
        top.mkdir()
        assert begin(moment=moment, top=top).wait() == -signal.SIGKILL
        go_on(top, tmp_path / "again", unbroken)
    assert len(rows(unbroken)) == EPOCHS
