"""The build's benchmark: it measures what it says, on its own pictures, without a network. No time is asserted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from focusdd_det.bench import build as bench_build
from focusdd_det.bench import scaling
from focusdd_det.bench.machine import peak_resident
from focusdd_det.bench.options import DEMO, BenchOptions
from focusdd_det.bench.pictures import draw_sources, prepare
from focusdd_det.errors import ConfigError, FocusDDError, WeightsError
from focusdd_det.scoring.decode import decode, upright_jpeg


@pytest.fixture
def options(tmp_path: Path) -> BenchOptions:
    return BenchOptions(
        quick=True, rounds=1, device="cpu", workers=2, out=tmp_path / "out", sources=None,
        selector=str(DEMO / "vit_demo.json"), selector_weights=str(DEMO / "vit_demo.safetensors"),
        teacher=str(DEMO / "yolo_demo.pt"), model="", imgsz=64, batch=2, precision=("fp32",),
    )  # fmt: skip


def test_drawn_sources_are_different_files_of_the_usual_size(tmp_path: Path) -> None:
    files = sorted(draw_sources(tmp_path / "s", 2, 5, kinds=3).rglob("*.jpg"))
    data = [file.read_bytes() for file in files]
    assert len({hashlib.sha256(d).digest() for d in data}) == 10
    assert {upright_jpeg(d) for d in data} == {(500, 375)}
    assert all(40_000 < len(d) < 200_000 for d in data)
    assert decode(data[0], 112)[0].shape == (188, 250, 3)


def test_a_build_is_measured_beside_its_floor(
    options: BenchOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_build, "precision_of", lambda *_: "bf16")  # whatever this machine would take
    result = bench_build.measure(options, tmp_path)
    assert json.loads(json.dumps(result)) == result
    assert {"decode alone", "ViT alone, fp32", "scoring, fp32", "straightforward loop (fp32)"} <= set(result["seconds"])
    assert {"read", "decode for the view", "resize", "ViT", "selection", "cut", "compose, a composite",
            "teacher, a composite", "write, a composite"} <= set(result["stages_ms"])  # fmt: skip
    assert "scoring / (decode + ViT), fp32" in result["ratios"]
    agreement = result["agreement"]["fp32"]
    assert 0.5 < agreement["chosen"] <= 1
    assert 0 < agreement["p"] < 0.5  # decoding at reduced size is not the same as decoding in full
    text = bench_build.table(result)
    assert "<= 1.15" in text
    assert ">= 1.7" in text


def test_a_screening_is_measured_and_chooses_what_full_precision_chooses(
    options: BenchOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_build, "precision_of", lambda *_: "bf16")  # whatever this machine would take
    result = bench_build.measure(options, tmp_path)
    seen = result["screening"]
    assert seen["same"] == 1
    assert seen["wanted"] > 0 and seen["looked_twice"] >= seen["looked_again"]
    assert "scoring, bf16 then fp32" in result["seconds"]
    assert "bf16 then fp32" in result["agreement"]


def test_damaged_pictures_are_left_out_and_batches_are_full(options: BenchOptions, tmp_path: Path) -> None:
    """Scoring pads its last batch and the straightforward loop does not."""
    top = draw_sources(tmp_path / "mine", 2, 19)
    broken = sorted(top.rglob("*.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:500])
    (tmp_path / "work").mkdir()
    result = bench_build.measure(replace(options, sources=str(top)), tmp_path / "work")
    assert result["batch"] == 16 and result["sources"] == 32
    assert result["stages_ms"]["decode for the view"] > 0


def test_many_workers_do_not_start_processes_in_what_is_timed(options: BenchOptions, tmp_path: Path) -> None:
    assert prepare(replace(options, workers=16), tmp_path, 1, 3).config.loader == "threads"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"teacher": "yolo99.yaml"}, WeightsError),
        ({"teacher": "yolo99.yml"}, WeightsError),
        ({"selector": "nosuch", "selector_weights": None}, ConfigError),
        ({"selector": "lvvit_s", "selector_weights": None}, ConfigError),
        ({"selector": "missing.json", "selector_weights": None}, FocusDDError),
    ],
)
def test_models_that_are_none(
    wrong: dict[str, str | None], error: type[Exception], options: BenchOptions, tmp_path: Path
) -> None:
    with pytest.raises(error, match=str(next(iter(wrong.values())))):
        bench_build.measure(replace(options, **wrong), tmp_path)  # type: ignore[arg-type]


def test_without_weights_the_models_are_random_and_it_says_so(options: BenchOptions, tmp_path: Path) -> None:
    bare = replace(options, selector="vit_tiny_patch16_224", selector_weights=None, teacher="yolo11n.yaml")
    bench = prepare(bare, tmp_path, 2, 3)
    assert "random weights" in "".join(bench.notes)
    assert Path(bench.config.teacher).is_file()
    assert Path(str(bench.config.selector_weights)).is_file()


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(os.urandom(1 << 20) * 600)
    code = "from focusdd_det.bench.machine import peak_resident; print(peak_resident())"
    child = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert len(held) > 500 << 20
    assert child < 550
    assert peak_resident() > 600


def test_slopes() -> None:
    assert scaling.slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert scaling.slope([10, 100], [5, 500]) == pytest.approx(2)
    assert scaling.slope([1, 10, 100], [7, 7, 7]) == pytest.approx(0)
    with pytest.raises(ValueError, match="above 0"):
        scaling.slope([1, 2], [0, 1])


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    values = {"x": [1, 2], "seconds": [1.0, 2.0], "what": "w", "expected": "1"}
    names = ("sources", "classes", "ipc", "workers")
    result = {"series": dict.fromkeys(names, values), "slopes": dict.fromkeys(names, 1.0), "memory": [], "growth": {}}
    scaling.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| sources | w | 1: 1.00, 2: 2.00 | 1.00 | 1 |" in scaling.table(result)


def test_the_growth_of_memory_is_that_between_the_first_and_the_last_row() -> None:
    rows = [
        {"sources": n, "peak": 100.0 + b, "beyond": b} for n, b in ((1_000, 30.0), (10_000, 99.0), (101_000, 130.0))
    ]
    found = scaling.growth(rows)
    assert found == pytest.approx({"from": 1_000, "to": 101_000, "mib_per_1000": 1.0, "bytes_a_source": 1048.576})
    assert scaling.growth(rows[:1]) == scaling.growth([]) == {}
    text = scaling.table({"series": {}, "slopes": {}, "memory": rows, "growth": found})
    assert "| 101,000 | 230 | 130 |" in text
    assert "Growth from 1,000 to 101,000 sources: 1.000 MiB per 1,000 sources, 1049 bytes a source." in text
    assert "below 1536 MiB" in text


@pytest.mark.slow
def test_how_a_build_grows(options: BenchOptions, tmp_path: Path) -> None:
    result = scaling.measure(options, tmp_path)
    assert set(result["slopes"]) == {"sources", "classes", "ipc", "workers"}
    assert [row["sources"] for row in result["memory"]] == [200, 2000]
    assert all(row["peak"] > row["beyond"] for row in result["memory"])
    assert result["growth"] == scaling.growth(result["memory"])
    assert (options.out / "scaling.png").is_file()
