"""How a build grows, as the benchmark measures it: its arithmetic on values by hand, and that it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench_build import options  # noqa: F401

from focusdd_det.bench import decoders, memory, scaling
from focusdd_det.bench.machine import children_peak, peak_resident
from focusdd_det.bench.options import BenchOptions


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(os.urandom(1 << 20) * 600)
    code = "from focusdd_det.bench.machine import peak_resident; print(peak_resident())"
    child = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert len(held) > 500 << 20
    assert child < 550
    assert peak_resident() > 600


def test_children_are_counted_with_the_most_that_each_has_held() -> None:
    before = children_peak(os.getpid())
    if before is None:
        pytest.skip("the system does not tell what a process holds")
    code = "held = b'x' * (200 << 20); del held; print('held', flush=True); input()"
    begun = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for child in begun:
            assert child.stdout is not None and child.stdout.readline() == b"held\n"
        both = children_peak(os.getpid())
        assert both is not None and 400 < both - before < 500, "what was freed counts, too"
    finally:
        for child in begun:
            child.communicate(b"\n")
    assert children_peak(os.getpid()) == before


def test_slopes() -> None:
    assert scaling.slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert scaling.slope([10, 100], [5, 500]) == pytest.approx(2)
    assert scaling.slope([1, 10, 100], [7, 7, 7]) == pytest.approx(0)
    with pytest.raises(ValueError, match="above 0"):
        scaling.slope([1, 2], [0, 1])


def test_a_slope_is_that_of_a_round() -> None:
    # The machine is ten times slower in the second round: its slope is as good as the others'.
    rounds = [[1.0, 10.0], [10.0, 1000.0], [1.0, 1.0]]
    assert scaling.slopes([1, 10], rounds) == pytest.approx({"median": 1, "low": 0, "high": 2})
    assert scaling.medians(rounds) == [1, 10]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    values = {"x": [1, 2], "rounds": [[1.0, 2.0], [1.0, 4.0], [3.0, 3.0]], "what": "w", "expected": "1"}
    names = ("sources", "classes", "ipc", "workers (threads)", "workers (processes)")
    slopes = {name: {"median": 1.0, "low": 0.0, "high": 2.0} for name in names}
    result = {
        "series": dict.fromkeys(names, values),
        "slopes": slopes,
        "start_of_processes": [[0.5, 0.6], [0.7, 0.9], [0.6, 0.8]],
        "ratios": {"decoding by processes / by threads, 2 workers": {"median": 0.9, "low": 0.8, "high": 1.2}},
        "memory": [],
    }
    scaling.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = scaling.table(result)
    assert "| sources | w | 1: 1.00, 2: 3.00 | 1.00 (0.00 to 2.00) | 1 |" in text
    assert "by number of them: 1: 0.60, 2: 0.80." in text
    assert "decoding by processes / by threads, 2 workers: 0.90 (0.80 to 1.20)" in text


# ---- decoding ----


def test_the_start_of_processes_is_told_apart() -> None:
    # Two processes: the first answers after 5 s, the second after 7; the fourth source on is counted.
    arrived = [105.0, 107.0, 107.5, 108.0, 108.5, 109.0, 109.5]
    assert decoders.spans(100.0, arrived, workers=2, skipped=3) == (7.0, 2.0)


def test_what_is_decoded_before_counting() -> None:
    # Decoded ahead: 4 a worker and a batch, 24 and 128; twice that in whole batches.
    assert decoders.before_counting(2, 16) == 48
    assert decoders.before_counting(16, 64) == 256
    assert decoders.before_counting(2, 64) == 192, "144 are 2.25 batches"
    assert decoders.doubled(2) == [1, 2] and decoders.doubled(12) == [1, 2, 4, 8]


def test_threads_and_processes_decode_side_by_side(
    options: BenchOptions,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoders, "processors", lambda: 2)
    found = decoders.measure(options, tmp_path / "work", 1)
    assert set(found["series"]) == {"workers (threads)", "workers (processes)"}
    for series in found["series"].values():
        assert series["x"] == [1, 2] and len(series["rounds"]) == 1 and min(series["rounds"][0]) > 0
        assert "decoding 128 pictures of 500 x 375 px" in series["what"]
    assert len(found["start"]) == 1 and min(found["start"][0]) > 0
    assert set(found["ratios"]) == {f"decoding by processes / by threads, {n} workers" for n in (1, 2)}


# ---- memory ----


def row(sources: int, beyond: float, folders: int = 2, loader: str = "threads") -> dict[str, object]:
    return {"sources": sources, "folders": folders, "loader": loader, "peak": 100 + beyond, "beyond": beyond}


def test_a_source_more_is_compared_with_the_row_before_of_as_many_folders() -> None:
    rows = [row(1_000, 30), row(11_000, 40), row(111_000, 40.5), row(10_000, 35, 100), row(12_000, 34, 100)]
    rows.append(row(11_000, 99, loader="processes"))
    found = memory.growth(rows)
    # 10 MiB for 10,000 sources; 0.5 MiB for 100,000; -1 MiB for 2,000.
    expected = [None, 1048.576, 5.24288, None, -524.288, None]
    assert [each["bytes_a_source"] for each in found] == [value and pytest.approx(value) for value in expected]
    assert memory.growth([]) == []
    text = "\n".join(memory.table(found))
    assert "| 1,000 | 2 | threads | 130 | 30 |  |" in text
    assert "| 11,000 | 2 | threads | 140 | 40 | 1049 |" in text
    assert "| 11,000 | 2 | processes | 199 | 99 |  |" in text
    assert "below 1536 MiB" in text


def test_the_builds_whose_memory_is_measured() -> None:
    many = memory.MANY_FOLDERS
    assert many >= 100
    assert memory.cases([1, 10, 100]) == [
        (1, 2, "threads"), (10, 2, "threads"), (100, 2, "threads"), (10, many, "threads"), (100, many, "threads"),
        (10, 2, "processes"),
    ]  # fmt: skip
    for counts in (memory.COUNTS, memory.QUICK_COUNTS):
        assert all(case.sources % case.folders == 0 for case in memory.cases(counts))


@pytest.mark.slow
def test_how_a_build_grows(options: BenchOptions, tmp_path: Path) -> None:  # noqa: F811
    result = scaling.measure(options, tmp_path)
    names = {"sources", "classes", "ipc", "workers (threads)", "workers (processes)"}
    assert set(result["slopes"]) == set(result["series"]) == names
    assert all(each["low"] <= each["median"] <= each["high"] for each in result["slopes"].values())
    rows = {(row["sources"], row["folders"], row["loader"]): row for row in result["memory"]}
    threads = [(200, 2, "threads"), (2000, 2, "threads"), (2000, 100, "threads")]
    assert [key for key in rows if key[2] == "threads"] == threads
    assert all(row["peak"] > row["beyond"] for row in rows.values())
    assert rows[2000, 2, "threads"]["bytes_a_source"] is not None
    if processes := rows.get((2000, 2, "processes")):
        assert processes["peak"] > rows[2000, 2, "threads"]["peak"] + 30, "two interpreters with OpenCV"
    assert (options.out / "scaling.png").is_file()
