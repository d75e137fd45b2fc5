"""Epochs in the benchmark: that they are whole, that a store is used for the first time, that nothing else is in them.
No test asserts a time."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_detector, tiny_yaml

from focusdd_det import trainer as trainers
from focusdd_det.bench import epoch as epochs
from focusdd_det.bench import train
from focusdd_det.bench.command import bench_command
from focusdd_det.bench.epoch import EpochTrainer, Extent, Lead, forget
from focusdd_det.bench.options import BenchOptions, Request
from focusdd_det.cli import run_main
from focusdd_det.config import load
from focusdd_det.training import targets
from focusdd_det.training.replay import replay_loader
from focusdd_det.training.targets import TargetStore, epoch_name

ROUNDS, BATCH = 2, 4
PICTURES = epochs.QUICK_BATCHES * BATCH
TRAINED = ("plain", "live", "stored")
TINY = f"imgsz=64 batch={BATCH} device=cpu precision=fp32"


class Seen:
    """What a run of the benchmark did, in order."""

    def __init__(self, log: Path) -> None:
        self.log = log  # of the loading processes, too: a line each
        self.events: list[tuple[str, int]] = []  # an epoch of a case begins
        self.pictures: dict[tuple[str, int], list[str]] = {}
        self.views: list[Any] = []  # whose targets the stored training was given
        self.folders: list[Path] = []  # of which nothing is held in memory
        self.train: dict[str, Any] = {}
        self.printed = ""

    def checked(self) -> list[tuple[str, str]]:
        """(process, epoch's file) of each hash that was computed."""
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return [(process, name) for what, process, name in rows if what == "hash"]

    def looks(self) -> int:
        """Views that were compared with what the teacher saw."""
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return sum(int(count) for what, _, count in rows if what == "looks")


def watched(folder: Path, words: str, patch: pytest.MonkeyPatch) -> Seen:
    """Run the benchmark's training part and look on."""
    seen = Seen(folder / "log")
    seen.log.touch()

    def note(*words: Any) -> None:
        with seen.log.open("a") as file:  # a short line at the end of a file is written whole
            file.write(" ".join(map(str, words)) + "\n")

    class Watched(EpochTrainer):
        def run_callbacks(self, event: str) -> None:
            if event == "on_train_epoch_start":
                seen.events.append((case_of(self), self.epoch))
            super().run_callbacks(event)

        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            seen.pictures.setdefault((case_of(self), self.epoch), []).extend(Path(f).name for f in batch["im_file"])
            seen.views += batch.get("view", ()) if case_of(self) == "stored" else ()
            return super().preprocess_batch(batch)

        def validate(self) -> Any:
            raise AssertionError("an epoch was validated")

        def save_model(self) -> bool:
            raise AssertionError("a checkpoint was written")

    def check_file(path: Path, *rest: Any) -> None:
        if path.parent in seen.folders:  # not those of the steps' store
            note("hash", os.getpid(), path.name)
        before["check"](path, *rest)

    def heads(self: TargetStore, views: Any, looks: Any = None) -> Any:
        if self.folder in seen.folders and looks is not None:
            note("looks", os.getpid(), len(views))
        return before["heads"](self, views, looks)

    def forgotten(folder: Path) -> None:
        seen.folders.append(folder)
        before["forget"](folder)

    before: dict[str, Any] = {"check": targets.check_file, "heads": TargetStore.heads, "forget": forget}
    patch.setattr(train, "EpochTrainer", Watched)
    patch.setattr(targets, "check_file", check_file)
    patch.setattr(TargetStore, "heads", heads)
    patch.setattr(train, "forget", forgotten)
    out, printed = folder / "bench", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_main(bench_command, [*f"parts=train {words}".split(), f"out={out}"]) == 0
    seen.train = json.loads((out / "bench.json").read_text())["parts"]["train"]
    seen.printed = printed.getvalue()
    return seen


def case_of(trainer: EpochTrainer) -> str:
    return str(trainer.args.name).rpartition("_")[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The demo's models, as `--quick` takes them."""
    with pytest.MonkeyPatch.context() as patch:
        yield watched(tmp_path_factory.mktemp("quick"), f"--quick rounds={ROUNDS} {TINY}", patch)


def test_epochs_are_measured_beside_steps(quick: Seen) -> None:
    found = quick.train["epochs"]
    assert (found["pictures"], found["batches"], found["rounds"]) == (PICTURES, epochs.QUICK_BATCHES, ROUNDS)
    assert found["workers"] == 0, "on a CPU a training loads for itself"
    assert set(found["seconds"]) == {f"fp32 {case}" for case in (*TRAINED, "teacher")} == set(found["ms_a_picture"])
    assert all(len(times) == ROUNDS and min(times) > 0 for times in found["seconds"].values())
    for name in ("stored / plain", "live / (plain + teacher)", "live / stored"):
        assert set(found["ratios"][f"epoch, fp32: {name}"]) == {"median", "low", "high"}
    assert found["bytes_of_a_stored_epoch"] > 0 and found["notes"] == []
    _, _, printed = quick.printed.partition("Training epoch: ")
    assert printed.startswith(f"{PICTURES} pictures in {epochs.QUICK_BATCHES} batches of {BATCH}, loaded by the train")
    for told in ("ms a picture", "| epoch, fp32: live / stored |", "<= 1.05 |", "<= 1.10 |", "for the first time"):
        assert told in printed


def test_every_picture_once_an_epoch(quick: Seen) -> None:
    assert set(quick.pictures) == {(case, epoch) for case in TRAINED for epoch in range(ROUNDS + 1)}
    whole = {name for names in quick.pictures.values() for name in names}
    assert len(whole) == PICTURES
    assert all(sorted(names) == sorted(whole) for names in quick.pictures.values())
    orders = {tuple(quick.pictures["plain", epoch]) for epoch in range(ROUNDS + 1)}
    assert len(orders) > 1, "epochs of a training, not one epoch again and again"
    for epoch in range(ROUNDS + 1):
        assert len({tuple(quick.pictures[case, epoch]) for case in TRAINED}) == 1, "cases differ in nothing else"


def test_an_epoch_each_in_turns(quick: Seen) -> None:
    for epoch in range(ROUNDS + 1):
        turn = quick.events[epoch * len(TRAINED) : (epoch + 1) * len(TRAINED)]
        assert sorted(turn) == sorted((case, epoch) for case in TRAINED)


def test_a_store_is_used_for_the_first_time(quick: Seen) -> None:
    names = [epoch_name(False, epoch) for epoch in range(ROUNDS + 1)]
    assert [name for _, name in quick.checked()] == names, "each epoch's file is hashed, in its own epoch, and once"
    assert quick.looks() == len(quick.views) == PICTURES * (ROUNDS + 1), "every view is compared with the stored one"
    assert len(set(quick.views)) == len(quick.views), "no view twice"
    assert len(quick.folders) == 1, "its pages were let go of"


def test_processes_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_two(dataset: Any, batch: int, workers: int, **rest: Any) -> Any:
        return replay_loader(dataset, batch, 2 if workers == 0 and len(dataset) == PICTURES else workers, **rest)

    monkeypatch.setattr(trainers, "replay_loader", with_two)
    model, teacher = tiny_yaml(tmp_path), save_detector(tmp_path / "teacher.pt")
    seen = watched(tmp_path, f"--quick rounds={ROUNDS} {TINY} model={model} teacher={teacher}", monkeypatch)
    assert seen.train["epochs"]["workers"] == 2
    assert "loaded by 2 processes" in seen.printed
    assert all(len(set(names)) == len(names) == PICTURES for names in seen.pictures.values())
    assert len(seen.pictures) == len(TRAINED) * (ROUNDS + 1)
    assert len(set(seen.views)) == len(seen.views) == PICTURES * (ROUNDS + 1)
    checked = seen.checked()
    assert len(set(checked)) == len(checked), "a process hashes a file once"
    assert str(os.getpid()) not in {process for process, _ in checked}
    # 6 batches taken and 8 more ahead, 2 an epoch: what is loaded last is the seventh epoch
    assert {name for _, name in checked} == {epoch_name(False, epoch) for epoch in range(7)}


def test_a_teacher_with_two_heads_has_no_stored_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_detector(tmp_path / "two.pt", "yolo26")
    seen = watched(tmp_path, f"--quick rounds=1 {TINY} model={tiny_yaml(tmp_path)} teacher={teacher}", monkeypatch)
    found = seen.train["epochs"]
    assert set(found["seconds"]) == {"fp32 plain", "fp32 teacher", "fp32 live"}
    assert "stored: left out" in found["notes"][0] and "two heads" in found["notes"][0]
    assert "epoch, fp32: live / (plain + teacher)" in found["ratios"]
    assert found["bytes_of_a_stored_epoch"] == 0 and seen.checked() == []
    assert seen.printed.count("stored: left out") == 2, "under the steps and under the epochs"


def test_ratios_of_epochs() -> None:
    seconds = {"plain": [2.0, 4.0], "teacher": [1.0, 2.0], "live": [6.0, 12.0], "stored": [3.0, 6.0]}
    found = train.epoch_ratios({f"fp32 {case}": times for case, times in seconds.items()})
    assert {name: value.median for name, value in found.items()} == {
        "epoch, fp32: live / (plain + teacher)": 2.0,
        "epoch, fp32: stored / plain": 1.5,
        "epoch, fp32: live / plain": 3.0,
        "epoch, fp32: live / stored": 2.0,
    }


# ---- how much is timed ----


def options(**given: Any) -> BenchOptions:
    return load(Request, "bench.yaml", {"device": "cpu", **given}).options(0, False)


def test_extent() -> None:
    assert Extent.of(options()) == (epochs.ROUNDS, epochs.BATCHES, options().workers)
    assert Extent.of(options(quick=True)).batches == epochs.QUICK_BATCHES
    assert Extent.of(options(rounds=1)).rounds == 1
    assert Extent.of(options(rounds=100)).rounds == epochs.ROUNDS
    assert Extent.of(options(workers=64)).workers == 8, "as many as a training takes"
    assert Extent.of(options(workers=1)).workers == 1


@pytest.mark.parametrize(
    ("ahead", "pool"),
    [(0, 6), (1, 7), (8, 7), (9, 8), (32, 10)],  # 1 to warm up, 5 that count, and what is loaded of the next ones
)
def test_no_view_is_used_twice(ahead: int, pool: int) -> None:
    assert Extent(5, 8, 8).pool(ahead) == pool


# ---- loading ahead ----


class Numbers:
    """A data set of pictures that are numbers."""

    def __init__(self, length: int = 6, broken: tuple[int, ...] = ()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        if item[0] in self.broken:
            raise ValueError("cannot be read")
        return torch.tensor(item)

    @staticmethod
    def collate_fn(samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples)


@pytest.fixture
def two() -> Iterator[Any]:
    """Makes loaders with two processes, and ends those."""
    made = []

    def make(dataset: Numbers) -> Any:
        made.append(replay_loader(dataset, 2, 2, seed=0))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def test_an_epoch_ends_as_far_ahead_as_it_began(two: Any) -> None:
    loader = two(Numbers())
    lead = Lead(loader)
    assert lead.ahead == 2 * loader.prefetch_factor and lead.made == 0
    counted = []
    for epoch in range(3):
        batches = list(loader)
        assert Counter(int(n) for batch in batches for n in batch[:, 1]) == dict.fromkeys(range(6), 1)
        assert {int(n) for batch in batches for n in batch[:, 0]} == {epoch}
        lead.regain(len(batches))
        counted.append(lead.made)
    assert counted == [lead.ahead + 3 * taken for taken in (1, 2, 3)], "as many batches are loaded as are taken"


def test_without_processes_there_is_nothing_to_wait_for() -> None:
    loader = replay_loader(Numbers(), 2, 0, seed=0)
    lead = Lead(loader)
    lead.regain(len(list(loader)))
    assert (lead.ahead, lead.made) == (0, 0)


def test_what_is_broken_is_not_waited_for(two: Any) -> None:
    loader = two(Numbers(broken=(1, 2, 3, 4)))
    lead = Lead(loader)
    lead.regain(len(list(loader)), stalled=0.3)
    with pytest.raises(ValueError, match="cannot be read"):
        next(iter(loader))
    loader = two(Numbers())
    lead = Lead(loader)
    list(loader)
    for worker in loader.iterator._workers:
        worker.terminate()
        worker.join()
    lead.regain(1000)


def test_a_folder_is_not_held_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "mixed_00000.safetensors"
    content = os.urandom(4 << 20)
    file.write_bytes(content)
    forget(tmp_path)
    held = [in_memory(file, start) for start in range(0, len(content), 1 << 16)]
    assert file.read_bytes() == content
    if all(held):
        pytest.skip("this file system is memory, or has no such request")
    assert not any(held[len(held) // 2 :]), "but for what else may have looked at its head"


def in_memory(file: Path, start: int) -> bool:
    """Whether the system holds these bytes, without reading them from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1 << 12)], start, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return True
    finally:
        os.close(descriptor)
