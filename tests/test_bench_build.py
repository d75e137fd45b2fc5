"""The build's benchmark: it measures what it says, on its own pictures, without a network. No time is asserted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from focusdd_det.bench import build as bench_build
from focusdd_det.bench.extrapolate import extrapolated, meaning, told
from focusdd_det.bench.options import DEMO, BenchOptions
from focusdd_det.bench.pictures import class_map, draw_large, draw_sources, prepare
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


def test_large_pictures_are_the_same_every_time_and_have_texture() -> None:
    data = draw_large(2)
    assert data[0] == draw_large(1)[0] != data[1]
    assert upright_jpeg(data[0]) == (2000, 1500)
    assert 700_000 < len(data[0]) < 2_000_000
    assert decode(data[0], 224)[0].shape == (375, 500, 3)


def test_folders_are_classes_or_share_them() -> None:
    assert class_map(["a", "b"], ["x", "y", "z"]) == {"names": ["x", "y"], "folders": {"a": "x", "b": "y"}}
    assert class_map(["a", "b"], ["x"]) == {"names": ["x"], "folders": {"a": "x"}}
    shared = {"names": ["x", "y"], "folders": {"a": "x", "b": "y", "c": "x"}}
    assert class_map(["a", "b", "c"], ["x", "y", "z"], shared=2) == shared


def test_near_duplicates_are_passed_over_in_pictures_that_were_not_drawn_for_it(
    options: BenchOptions, tmp_path: Path
) -> None:
    top = draw_sources(tmp_path / "mine", 2, 2)
    for name in ("drawn", "given"):
        (tmp_path / name).mkdir()
    assert prepare(options, tmp_path / "drawn", 2, 2).config.near_duplicate == 0
    assert prepare(replace(options, sources=str(top)), tmp_path / "given", 0, 0).config.near_duplicate == 6


def test_ratios_are_paired_by_round() -> None:
    seconds = {
        bench_build.DECODE: [1.0, 3.0], "ViT alone, fp32": [3.0, 1.0], "scoring, fp32": [8.0, 8.0],
        bench_build.PLAIN: [6.0, 2.0], bench_build.LOOP: [16.0, 16.0], "scoring, twice": [4.0, 4.0],
    }  # fmt: skip
    loop = bench_build.LOOP
    on_cpu = {name: each.median for name, each in bench_build.ratios(seconds, ["fp32"], ["twice"], False).items()}
    assert on_cpu == {
        "scoring / (decode + ViT), fp32": 2.0, f"{loop} / scoring, fp32": 2.0,
        f"ViT alone, fp32 / {bench_build.PLAIN}": 0.5, f"{loop} / scoring, twice": 4.0,
    }  # fmt: skip
    on_gpu = bench_build.ratios(seconds, ["fp32"], [], True)
    assert on_gpu["scoring / the slower of decode and ViT, fp32"].median == pytest.approx(8 / 3)


def test_what_the_times_mean_for_imagenet_and_for_the_paper_s_class() -> None:
    # 12,811.67 s + 50,000 x 0.1 s = 17,811.67 s; 13 s + 10 s.
    found = meaning(source_ms=10, composite_ms=100)
    assert found.imagenet_hours == pytest.approx(17_811.67 / 3600)
    assert found.class_seconds == pytest.approx(23)
    # 0.5, 1 and 0.4 s for 50 sources: 10 ms each in the median.
    times = {"scoring, fp32": [0.5, 1.0, 0.4], "scoring, bf16 then fp32": [0.25], "ViT alone, fp32": [9.0]}
    every = extrapolated(times, 50, composing=4.0, composites=40)
    assert extrapolated(times, 50, 0.0, 0) == {} and told({}, 640, None) == []
    assert every == {"fp32": found, "bf16 then fp32": meaning(5, 100, screened=True)}
    assert every["bf16 then fp32"].class_seconds is None, "1,300 sources are too few for a screening"
    plain = {name: each._asdict() for name, each in every.items()}
    text = "\n".join(told(plain, 640, None))
    assert "1,281,167 sources x 10.00 ms + 1000 classes x IPC 50 composites x 100.0 ms = 4.95 hours" in text
    assert "a class of 1,300 at IPC 100: 23.00 s" in text
    assert "8.67 s on an RTX 4090 with DeiT-S; target on a GPU 0.87 s" in text and "GB" not in text
    assert "1.50 GB; the paper's 6.84 GB; target 2 GB" in "\n".join(told(plain, 640, 1.5))


def test_a_build_is_measured_beside_its_floor_and_a_screening_chooses_what_full_precision_chooses(
    options: BenchOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_build, "precision_of", lambda *_: "bf16")  # whatever this machine would take
    result = bench_build.measure(options, tmp_path)
    assert json.loads(json.dumps(result)) == result
    assert {"decode alone", "ViT alone, fp32", "scoring, fp32", "straightforward loop (fp32)"} <= set(result["seconds"])
    assert {"read", "decode for the view", "resize", "ViT", "selection", "cut", "compose, a composite",
            "teacher, a composite", "write, a composite", "decode for the view, 2000 x 1500 px",
            "full decode, 2000 x 1500 px"} <= set(result["stages_ms"])  # fmt: skip
    assert "scoring / (decode + ViT), fp32" in result["ratios"]
    assert "full decode, 2000 x 1500 px / decode for the view, 2000 x 1500 px" in result["ratios"]
    agreement = result["agreement"]["fp32"]
    assert 0.5 < agreement["chosen"] <= 1 and agreement["composites"] <= agreement["windows"]
    assert agreement["of"] == result["whole_build"]["composites"] == 8
    assert 0 < agreement["p"] < 0.5  # decoding at reduced size is not the same as decoding in full
    assert {"fp32", "bf16", "bf16 then fp32"} <= set(result["extrapolated"])
    assert result["extrapolated"]["fp32"]["imagenet_hours"] > 0
    text = bench_build.table(result)
    assert "<= 1.15" in text
    assert ">= 1.7" in text
    assert "ImageNet-1K: 1,281,167 sources x " in text
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
