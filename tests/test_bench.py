"""The benchmark: its arithmetic on clocks that are made up, its options, and that it runs. No test asserts a time."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from conftest import save_detector, tiny_yaml

from focusdd_det.bench.command import USAGE, bench_command
from focusdd_det.bench.options import PARTS, BenchOptions, Request
from focusdd_det.bench.quoting import busy, wide
from focusdd_det.bench.timing import Ratio, compare, in_turns, ratio, together
from focusdd_det.bench.train import ratios
from focusdd_det.cli import run_main
from focusdd_det.commandline import parse_tokens
from focusdd_det.config import load
from focusdd_det.errors import ConfigError, DataError


class Clock:
    """A clock that moves only when something takes its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def case(self, name: str, *takes: float) -> Any:
        times = list(takes)

        def run() -> None:
            self.order.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


def test_cases_are_timed_in_turns_that_rotate() -> None:
    clock = Clock()
    cases = {"a": clock.case("a", 100.0, 1.0, 2.0, 4.0), "b": clock.case("b", 10.0), "c": clock.case("c", 20.0)}
    seconds = compare(cases, 3, warmup=1, clock=lambda: clock.now, wait=lambda: None)
    assert seconds == {"a": [1.0, 2.0, 4.0], "b": [10.0] * 3, "c": [20.0] * 3}, "the warm-up is not counted"
    assert "".join(clock.order[3:]) == "abc" + "bca" + "cab"
    assert sorted(clock.order[:3]) == ["a", "b", "c"]


def test_what_the_device_still_does_is_waited_for_and_counted() -> None:
    clock, pending = Clock(), [0.0]

    def hand_over() -> None:
        pending[0] += 5.0

    def wait() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    pending[0] = 99.0  # of somebody before
    assert compare({"a": hand_over}, 2, warmup=0, clock=lambda: clock.now, wait=wait) == {"a": [5.0, 5.0]}


def test_every_run_is_told() -> None:
    told: list[str] = []
    compare({"a": lambda: None, "b": lambda: None}, 2, warmup=1, tick=told.append)
    assert sorted(told) == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize(("cases", "rounds"), [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_compare(cases: dict[str, Any], rounds: int) -> None:
    with pytest.raises(ValueError, match="expected some cases"):
        compare(cases, rounds)


def test_a_ratio_is_paired_by_round() -> None:
    # A machine that is ten times slower in the last round: the ratio does not see it.
    assert ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == Ratio(2.0, 2.0, 2.0)
    found = ratio([float(n) for n in range(1, 12)], [1.0] * 11)
    assert found == pytest.approx((6.0, 2.0, 10.0)), "median, 10 % and 90 % quantile"
    assert str(found) == "6.00 (2.00 to 10.00)"
    for a, b in (([1.0], []), ([], []), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="as many times"):
            ratio(a, b)


def test_sums() -> None:
    assert together([1.0, 2.0], [10.0, 20.0]) == [11.0, 22.0]


def test_points_that_measure_themselves_take_turns() -> None:
    order: list[str] = []

    def point(name: str) -> Any:
        def run() -> str:
            order.append(name)
            return f"{name}{len(order)}"

        return run

    assert in_turns([point("a"), point("b"), point("c")], 2) == [["a1", "b2", "c3"], ["a6", "b4", "c5"]]


# ---- what should not be quoted ----


def test_a_busy_machine_is_told() -> None:
    assert busy(1.0, 2) == busy(None, 2) == busy(8.0, 16) == []
    assert busy(1.01, 2) == [
        "the machine was busy before this began (load 1.01 on 2 processors): its numbers should not be quoted"
    ]


def test_a_wide_spread_is_told_wherever_it_is() -> None:
    def spread(low: float, high: float) -> dict[str, float]:
        return {"median": (low + high) / 2, "low": low, "high": high}

    part = {"ratios": {"a / b": spread(1.0, 1.5), "c / d": spread(0.8, 1.25)}, "seconds": {"a": [1.0]}, "n": 3}
    assert wide({}) == wide({"ratios": {"a / b": spread(2.0, 3.0)}}) == []
    (note,) = wide({**part, "epochs": {"ratios": {"e / f": spread(1.0, 2.0)}}})
    assert "not to be quoted" in note and note.endswith(": c / d; e / f")


# ---- options ----


def options(gpus: int = 0, bf16: bool = True, **given: Any) -> BenchOptions:
    return load(Request, "bench.yaml", given).options(gpus, bf16)


def test_the_machine_decides_what_is_left_open() -> None:
    cpu, old, gpu, quick = options(), options(bf16=False), options(gpus=1), options(quick=True)
    assert (cpu.device, cpu.precision, cpu.teacher) == ("cpu", ("fp32", "bf16+channels_last"), "yolo11n.yaml")
    assert old.precision == ("fp32",)
    assert (gpu.device, gpu.precision, gpu.teacher, gpu.imgsz) == ("0", ("fp16",), "yolo11x.yaml", 640)
    assert quick.rounds < cpu.rounds
    assert Path(str(quick.teacher)).is_file() and Path(str(quick.selector_weights)).is_file()
    assert options(precision="bf16,fp32").precision == ("bf16", "fp32")


@pytest.mark.parametrize("name", ["0", "cuda", "cuda:0"])
def test_a_gpu_has_one_name(name: str) -> None:
    assert options(gpus=1, device=name).device == "0"


def documented() -> list[str]:
    """Every command line of the benchmark that is written down, also over two lines or with a comment."""
    top = Path(__file__).parents[1]
    texts = [USAGE, *(file.read_text() for file in (top / "README.md", *(top / "docs").glob("*.md")))]
    text = re.sub(r" *\\\n *", " ", "\n".join(texts))
    return sorted({line.strip() for line in re.findall(r"python tools/bench\.py((?: [\w-]+(?:=[\w./,+-]+)?)+)", text)})


@pytest.mark.parametrize("line", documented())
def test_what_is_written_down_is_understood(line: str) -> None:
    request = load(Request, "bench.yaml", parse_tokens(line.split(), get_type_hints(Request), {"part": "parts"}))
    found = request.options(int("device" in line), True)
    assert found.on_gpu == ("device" in line)
    assert set(request.parts) <= set(PARTS)


def test_there_are_such_lines() -> None:
    assert len(documented()) > 8
    assert any("parts=build,scaling" in line and "device=0" in line for line in documented())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "0"}, "torch sees no GPU"),
        ({"device": "gpu"}, "expected cpu or the number of one GPU"),
        ({"device": "0,1"}, "expected cpu or the number of one GPU"),
        ({"precision": ["fp16"]}, "on a CPU"),
        ({"rounds": 0}, "rounds=0: expected at least 1"),
        ({"imgsz": 100}, "a multiple of 32"),
        ({"parts": ["trian"]}, "did you mean train"),
        ({"clock": "sun"}, "expected one of wall, cpu"),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**given)


# ---- the command ----


def test_help_and_unknown_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(bench_command, ["--help"]) == 0
    assert "parts=train" in capsys.readouterr().out
    assert run_main(bench_command, ["round=3"]) == 2
    assert "did you mean rounds" in capsys.readouterr().err


def test_ratios_of_training_steps() -> None:
    seconds = {
        "plain": [2.0, 4.0],
        "teacher": [1.0, 2.0],
        "live": [6.0, 12.0],
        "stored": [3.0, 6.0],
        "distill": [4.0, 8.0],
    }
    both = {f"fp32 {case}": times for case, times in seconds.items()}
    both |= {"bf16 plain": [1.0, 2.0], "bf16 teacher": [0.5, 1.0], "bf16 live": [3.0, 6.0]}
    found = {name: value.median for name, value in ratios(both).items()}
    assert found == {
        "fp32: live / (plain + teacher)": 2.0, "fp32: stored / plain": 1.5, "fp32: distill / plain": 2.0,
        "fp32: live / plain": 3.0, "fp32: live / distill": 1.5,
        "bf16: live / (plain + teacher)": 2.0, "bf16: live / plain": 3.0,
        "plain: bf16 / fp32": 0.5, "live: bf16 / fp32": 0.5,
    }  # fmt: skip


def test_what_was_measured_is_kept_when_a_later_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Part:
        @staticmethod
        def measure(options: object, work: Path) -> dict[str, int]:
            if work.name == "train":
                raise DataError("it broke")
            torch.set_num_threads(2)
            return {"answer": 42}

        @staticmethod
        def table(result: dict[str, int]) -> str:
            return f"answer {result['answer']}"

    monkeypatch.setattr("focusdd_det.bench.command.part_module", lambda name: Part)
    before = torch.get_num_threads()
    assert run_main(bench_command, ["--quick", f"out={tmp_path / 'out'}"]) == 3
    assert "answer 42" in capsys.readouterr().out
    parts = json.loads((tmp_path / "out" / "bench.json").read_text())["parts"]
    assert parts["build"]["answer"] == 42 and parts["build"]["torch_threads"] == 2 and "train" not in parts
    assert torch.get_num_threads() == before
    (tmp_path / "file").touch()
    assert run_main(bench_command, ["--quick", f"out={tmp_path / 'file'}"]) == 5


def test_notes_say_what_should_not_be_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Part:
        @staticmethod
        def measure(options: object, work: Path) -> dict[str, Any]:
            high = 1.0 if work.name == "build" else 2.0
            return {"ratios": {"a / b": {"median": 1.0, "low": 1.0, "high": high}}}

        @staticmethod
        def table(result: dict[str, Any]) -> str:
            return "the table"

    monkeypatch.setattr("focusdd_det.bench.command.part_module", lambda name: Part)
    for mean, notes in ((0.0, (0, 1)), (999.0, (1, 2))):
        monkeypatch.setattr("os.getloadavg", lambda mean=mean: (mean,) * 3)
        assert run_main(bench_command, ["--quick", f"out={tmp_path}", "parts=build,scaling"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("the machine was busy") == notes[0]
        assert printed.count("wide spread") == 1
        parts = json.loads((tmp_path / "bench.json").read_text())["parts"]
        assert [len(parts[name]["not_to_quote"]) for name in ("build", "scaling")] == list(notes)


def test_training_steps_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny_yaml(tmp_path, classes=80), tmp_path / "bench"
    given = f"parts=train rounds=2 imgsz=64 batch=2 device=cpu precision=fp32,bf16 model={model} teacher={model}"
    assert run_main(bench_command, [*given.split(), f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["bench.json"]
    content = json.loads((out / "bench.json").read_text())
    train = content["parts"]["train"]
    cases = {"plain", "teacher", "live", "stored"}
    once = {"fp32 distill", "fp32 read"}
    assert set(train["seconds"]) == {f"{kind} {case}" for kind in ("fp32", "bf16") for case in cases} | once
    assert all(len(times) == 2 and min(times) > 0 for times in train["seconds"].values())
    for name in (
        "fp32: live / (plain + teacher)",
        "bf16: stored / plain",
        "fp32: distill / plain",
        "live: bf16 / fp32",
    ):
        assert set(train["ratios"][name]) == {"median", "low", "high"}
        assert name in printed
    assert "<= 1.05" in printed and "<= 1.10" in printed
    assert train["peak_gpu_bytes"] == {}
    assert content["machine"]["torch_threads"] >= 1
    text = json.dumps({key: value for key, value in content.items() if key != "command"})
    assert platform.node() not in text
    assert str(tmp_path) not in text


def test_a_teacher_with_two_heads_has_no_stored_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_detector(tmp_path / "two.pt", "yolo26")
    model, out = tiny_yaml(tmp_path), tmp_path / "bench"
    given = f"parts=train rounds=1 imgsz=64 batch=2 device=cpu precision=fp32 model={model} teacher={teacher}"
    assert run_main(bench_command, [*given.split(), f"out={out}"]) == 0
    train = json.loads((out / "bench.json").read_text())["parts"]["train"]
    assert "fp32 stored" not in train["seconds"]
    assert "two heads" in train["notes"][0]
    assert "fp32: live / plain" in train["ratios"]
