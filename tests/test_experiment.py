"""Experiments end to end: shipped files, the scheduler, and a real one that is killed in the middle and goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES, REPOSITORY, draw, save_detector, tiny_yaml
from safetensors.torch import load_file, save_file
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.cli import main
from focusdd_det.errors import ConfigError, VerifyError
from focusdd_det.experiment import child, results, runner, stages
from focusdd_det.experiment.child import state_of
from focusdd_det.experiment.distill import StockDistillation, check_distill, distill_command, stock_arguments
from focusdd_det.experiment.preview import _Composites
from focusdd_det.experiment.settings import build_config, check, steps_of, train_settings, uses_targets
from focusdd_det.experiment.spec import Experiment, read_experiment, shipped, variables
from focusdd_det.experiment.stages import Fingerprints, Stage, Work

# ---- shipped files ----


def given(name: str, small: bool, tmp_path: Path) -> dict[str, Path]:
    """Something that exists for every variable; an assets folder with the files that the small variants name."""
    return dict.fromkeys(variables(name, small), tmp_path)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_experiments_are_valid(name: str, small: bool, tmp_path: Path) -> None:
    experiment = read_experiment(name, given(name, small, tmp_path), small)
    check(experiment)
    assert experiment.title
    assert experiment.about
    assert bool(variables(name, small, only_used=True))
    assert small is False or set(variables(name, True, only_used=True)) == {"assets"}
    text = shipped()[name].read_text()
    assert text.startswith("#"), "the head says what it shows and what it needs"
    assert "# Data: " in text
    if name.startswith(("fig", "table")):
        assert any(word in " ".join(experiment.about.split()) for word in ("ur reading", "not known here"))


def test_every_table_and_figure_of_the_list_is_shipped() -> None:
    numbers = [5, 6, 7, 8, 11, 13, 15, 16, 17]
    names = {f"table{n}" for n in numbers} | {"fig1_map_over_ipc", "fig5_epochs", "fig5_resolution", "fig8_patches"}
    assert set(shipped()) == names | {"methods", "variants", "supervision", "noise", "probe", "stored"}


def test_only_the_numbers_that_are_known_are_called_the_papers(tmp_path: Path) -> None:
    found = {}
    for name in shipped():
        experiment = read_experiment(name, given(name, False, tmp_path))
        for number in experiment.paper:
            assert sum(number.fits(arm) for arm in experiment.arms) == 1
            found[name, number.value] = next(arm.name for arm in experiment.arms if number.fits(arm))
    assert found == {
        ("fig1_map_over_ipc", 24.4): "focusdd, yolo11n.yaml, ipc=50",
        ("fig1_map_over_ipc", 32.1): "focusdd, yolo11s.yaml, ipc=50",
    }


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--help"]) == 0
    assert "fig1_map_over_ipc" in capsys.readouterr().out
    assert main(["experiment", "table7", "--help"]) == 0
    assert "imagenet_val=..." in capsys.readouterr().out
    for words, told in [
        ([], "expected an experiment's file or name"),
        (["tabel7"], "did you mean table7"),
        (["table7"], "imagenet=...   class folders"),
        (["noise", "--small", f"asets={tmp_path}"], "did you mean assets"),
        (["noise", "--small", "assets=0010"], "assets=0010: no such file or folder"),
        (["noise", "--small", f"assets={tmp_path}", "parallel=0"], "parallel=0"),
        (["noise", "--small", f"assets={tmp_path}", "train.epoch=2"], "did you mean epochs"),
        (["noise", "--small", f"assets={tmp_path}", "build.ipcc=2"], "did you mean ipc"),
    ]:
        assert main(["experiment", *words]) == 2
        assert told in capsys.readouterr().err
    assert main(["experiment", "noise", "--small", f"assets={tmp_path}", "--table", f"out={tmp_path / 'no'}"]) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    assert main(["experiment", "noise", "--small", f"assets={tmp_path}", f"out={tmp_path / 'other'}"]) == 5
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


# ---- what a stage is given, and its key ----


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, a class map, a tiny ViT, a tiny teacher and student, and scenes to evaluate on."""
    import timm
    from conftest import write_coco

    top = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(3)
    for folder in NAMES:
        (top / "sources" / folder).mkdir(parents=True)
        for i in range(9):
            cv2.imwrite(str(top / "sources" / folder / f"{i}.jpg"), draw(rng, 80)[0])
    (top / "map.yaml").write_text(yaml.safe_dump({"names": list(NAMES), "folders": {n: n for n in NAMES}}))
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, top / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": list(NAMES), "weights": "vit.safetensors"}
    (top / "vit.json").write_text(json.dumps(spec))
    save_detector(top / "teacher.pt", names=("bar", "other", "disc", "square"))
    tiny_yaml(top)
    write_coco(top / "coco", count=3)
    content = {
        "title": "Drawn",
        "task": "detect",
        "needs": {"bench": "the folder of this test"},
        "build": {
            "sources": ["${bench}/sources"],
            "method": "focusdd",
            "class_map": "${bench}/map.yaml",
            "selector": "${bench}/vit.json",
            "teacher": "${bench}/teacher.pt",
            "ipc": 1,
            "image_size": 96,
            "near_duplicate": 0,
            "conf": 0.05,
            "min_side": 1.0,
            "device": "cpu",
            "threads": 1,
        },
        "train": {
            "model": "${bench}/yolo11n-tiny.yaml",
            "imgsz": 64,
            "batch": 2,
            "device": "cpu",
            "plots": False,
            "verbose": False,
            "supervision": "labels",
            "close_mosaic": "50%",
        },
        "eval": {"data": "${bench}/coco/data.yaml"},
        "iterations": 2,
        "seeds": [0, 1],
        "arms": {"vary": {"train.supervision": ["labels", "both"]}},
        "baseline": "labels",
    }
    (top / "drawn.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return top


def drawn(bench: Path, **more: Any) -> Experiment:
    return read_experiment(bench / "drawn.yaml", {"bench": bench}, overrides=more)


def with_arms(experiment: Experiment, blocks: Any, tmp_path: Path, bench: Path, **more: Any) -> Experiment:
    content = {**yaml.safe_load((bench / "drawn.yaml").read_text()), "arms": blocks, "baseline": None, **more}
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_experiment(file, {"bench": bench})


def test_arms_share_what_is_equal_and_nothing_else(bench: Path, tmp_path: Path) -> None:
    blocks = [
        {"plain": None, "kl": {"train.supervision": "kl"}},
        {"vary": {"method": ["random", "whole"]}},
        {"alpha": {"build.alpha": 1.0}, "workers": {"build.workers": 3, "train.workers": 2}},
    ]
    experiment = with_arms(drawn(bench), blocks, tmp_path, bench)
    work = Work(experiment, tmp_path / "out")
    keys = {arm.name: work.build(arm, 0).key for arm in experiment.arms}
    assert keys["plain"] == keys["kl"] == keys["workers"]
    assert len({keys[name] for name in ("plain", "random", "whole", "alpha")}) == 4
    assert work.build(experiment.arms[0], 1).key != keys["plain"]
    scores = {arm.name: work.build(arm, seed).alone for arm in experiment.arms for seed in (0, 1)}
    assert scores["plain"] == scores["alpha"], "another alpha needs no other look at the sources"
    assert scores["random"] == scores["whole"] != scores["plain"]


def test_keys_follow_the_content_of_files_not_their_place(bench: Path, tmp_path: Path) -> None:
    prints = Fingerprints()
    for folder in ("a", "b"):
        (tmp_path / folder / "n01").mkdir(parents=True)
        (tmp_path / folder / "n01" / "x.jpg").write_bytes(b"1234")
        (tmp_path / folder / "t.pt").write_bytes(b"weights")
    assert prints.folder(tmp_path / "a") == prints.folder(tmp_path / "b")
    assert prints.of(str(tmp_path / "a" / "t.pt")) == prints.of(str(tmp_path / "b" / "t.pt"))
    (tmp_path / "b" / "n01" / "y.jpg").write_bytes(b"")
    (tmp_path / "b" / "t.pt").write_bytes(b"others!")
    again = Fingerprints()
    assert again.folder(tmp_path / "a") != again.folder(tmp_path / "b")
    assert again.of(str(tmp_path / "a" / "t.pt")) != again.of(str(tmp_path / "b" / "t.pt"))
    assert again.of("deit_small_patch16_224") == "deit_small_patch16_224"


def test_a_training_without_backbone_is_that_of_before_the_option(bench: Path, tmp_path: Path) -> None:
    experiment = drawn(bench)
    work = Work(experiment, tmp_path / "out")
    values = train_settings(experiment, experiment.arms[0], 0)
    (tmp_path / "start.pt").write_bytes(b"start")
    found = [
        work._train(given, "manifest", tmp_path, None).key
        for given in (
            values,
            {key: value for key, value in values.items() if key != "backbone"},
            {**values, "backbone": str(tmp_path / "start.pt")},
        )
    ]
    assert found[0] == found[1] != found[2]
    (tmp_path / "start.pt").write_bytes(b"other")
    again = Work(experiment, tmp_path / "out")._train(
        {**values, "backbone": str(tmp_path / "start.pt")}, "manifest", tmp_path, None
    )
    assert again.key not in found


def test_linked_folders_and_pictures_are_looked_into(tmp_path: Path) -> None:
    """As builds and trainings do: a class folder may be a link, a picture, too."""
    for name in ("one", "two"):
        (tmp_path / "real" / name).mkdir(parents=True)
        (tmp_path / "real" / name / "x.jpg").write_bytes(name.encode() * len(name))
    (tmp_path / "real" / "round").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "val").mkdir(parents=True)
    (tmp_path / "set" / "n01").symlink_to(tmp_path / "real" / "one")
    (tmp_path / "set" / "val" / "n01").symlink_to(tmp_path / "real" / "round")
    (tmp_path / "set" / "y.jpg").symlink_to(tmp_path / "gone.jpg")
    found = [Fingerprints().folder(tmp_path / "set")]
    (tmp_path / "real" / "one" / "z.jpg").write_bytes(b"more")
    found.append(Fingerprints().folder(tmp_path / "set"))
    (tmp_path / "gone.jpg").write_bytes(b"there again, and longer than its link")
    found.append(Fingerprints().folder(tmp_path / "set"))
    assert len(set(found)) == 3


def test_archives_of_one_size_are_told_apart(tmp_path: Path) -> None:
    """tar pads to 10,240 bytes, so that the same number of bytes says little."""
    found = set()
    for folder, name, data in [("a", "x.jpg", b"1"), ("b", "y.jpg", b"1"), ("c", "x.jpg", b"22"), ("d", "x.jpg", b"2")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(data)
        with tarfile.open(tmp_path / folder / "n01.tar", "w") as archive:
            archive.add(tmp_path / folder / name, f"n01/{name}")
        (tmp_path / folder / name).unlink()
        prints = Fingerprints()
        found.add((prints.folder(tmp_path / folder / "n01.tar"), prints.folder(tmp_path / folder)))
    assert len({file for file, _ in found}) == len({folder for _, folder in found}) == 3
    (tmp_path / "cut.tar").write_bytes(b"no tar")
    assert Fingerprints().folder(tmp_path / "cut.tar") == "6"


def test_seeds_and_shares_reach_build_and_training(bench: Path) -> None:
    experiment = drawn(bench, iterations=40)
    arm = experiment.arms[1]
    steps = steps_of(experiment, arm, 10)
    values = train_settings(experiment, arm, 7, steps)
    assert (values["seed"], values["epochs"], values["close_mosaic"]) == (7, 8, 4)
    assert values["teacher"] == str(bench / "teacher.pt"), "the teacher of the labels, where none is named"
    assert train_settings(experiment, experiment.arms[0], 7, steps)["teacher"] is None
    assert values["augmentations"] == []
    assert build_config(experiment, arm, 7).seed == 7


def test_stock_distillation_gets_the_same_recipe(bench: Path, tmp_path: Path) -> None:
    experiment = with_arms(drawn(bench), {"vary": {"train.supervision": ["both", "distill_model"]}}, tmp_path, bench)
    check(experiment)
    both, stock = (train_settings(experiment, arm, 3) for arm in experiment.arms)
    arguments = stock_arguments(stock)
    assert arguments["distill_model"] == both["teacher"]
    same = ("optimizer", "lr0", "momentum", "seed", "augmentations", "imgsz", "batch", "model", "close_mosaic")
    assert {key: arguments[key] for key in same} == {key: both[key] for key in same}
    assert arguments["augmentations"] == []
    assert not {"supervision", "teacher", "kl_cls"} & set(arguments)
    with pytest.raises(ConfigError, match="needs teacher"):
        stock_arguments({**stock, "teacher": None})


def test_an_arm_with_a_teacher_of_its_own_asks_it_beside_arms_that_read_a_store(bench: Path, tmp_path: Path) -> None:
    own = {"train.teacher": "${bench}/teacher.pt"}
    blocks = {
        "live": {**own, "train.supervision": "both"},
        "stored": {"train.supervision": "both"},
        "boxes": {**own, "train.supervision": "labels"},
    }
    experiment = with_arms(drawn(bench), blocks, tmp_path, bench, targets={"pool": 2})
    check(experiment)
    values = [train_settings(experiment, arm, 0) for arm in experiment.arms]
    assert [each["teacher"] for each in values] == [str(bench / "teacher.pt"), None, None]
    assert [uses_targets(experiment, each) for each in values] == [False, True, False]
    del blocks["stored"]
    with pytest.raises(ConfigError, match="`targets` that no arm reads"):
        check(with_arms(drawn(bench), blocks, tmp_path, bench, targets={"pool": 2}))


def test_several_gpus_build_the_stock_distillation_anew(bench: Path, drawn_set: Path, tmp_path: Path) -> None:
    """As the file does that Ultralytics writes for them: cfg, overrides and callbacks by name."""
    experiment = with_arms(drawn(bench), {"distill": {"train.supervision": "distill_model"}}, tmp_path, bench)
    values = {**train_settings(experiment, experiment.arms[0], 0), "data": str(drawn_set), "project": str(tmp_path)}
    first = StockDistillation(overrides=stock_arguments(values))
    state = dict(vars(first.args))
    again = StockDistillation(cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=state, _callbacks=None)
    assert (again.args.distill_model, again.args.data) == (first.args.distill_model, first.args.data)


def test_a_gpu_that_cannot_have_the_precision_is_told_before_anything_is_built(bench: Path, tmp_path: Path) -> None:
    experiment = drawn(bench, **{"train.precision": "bf16", "train.device": "0"})
    with pytest.raises(ConfigError, match="precision=bf16 is for training on a CPU"):
        check(experiment)
    check(drawn(bench, **{"train.precision": "fp32", "train.amp": "bf16", "train.device": "0"}))


def test_a_processor_without_bfloat16_is_told_of(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr("focusdd_det.training.precision.warn_if_slow", lambda: told.append(True))
    check(drawn(bench))
    assert not told
    check(drawn(bench, **{"train.precision": "bf16"}))
    assert told == [True]


def test_stock_distillation_has_the_precision_of_the_other_arms(
    bench: Path, drawn_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"distill": {"train.supervision": "distill_model", "train.precision": "bf16", "train.channels_last": True}}
    experiment = with_arms(drawn(bench), arms, tmp_path, bench)
    values = train_settings(experiment, experiment.arms[0], 0)
    for wrong, told in [("bf61", "did you mean bf16"), ("bf16", "is for training on a CPU")]:
        with pytest.raises(ConfigError, match=told):
            check_distill({**values, "precision": wrong, "device": "0"})
    seen: list[tuple[str, torch.dtype, bool]] = []

    def watch(trainer: Any) -> None:
        for name, net in (("student", trainer.model.student_model), ("teacher", trainer.model.teacher_model)):
            layer = net.model[0].conv
            last = layer.weight.is_contiguous(memory_format=torch.channels_last)
            layer.register_forward_hook(lambda *a, name=name, last=last: seen.append((name, a[-1].dtype, last)))

    started = StockDistillation.__init__

    def start(trainer: Any, *given: Any, **named: Any) -> None:
        started(trainer, *given, **named)
        trainer.add_callback("on_train_start", watch)

    monkeypatch.setattr(StockDistillation, "__init__", start)
    values |= {"data": str(drawn_set), "project": str(tmp_path / "runs"), "name": "one", "epochs": 1, "workers": 0}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    distill_command([str(tmp_path / "train.yaml")])
    assert set(seen) == {(name, torch.bfloat16, True) for name in ("student", "teacher")}
    assert (tmp_path / "runs" / "one" / "weights" / "last.pt").is_file()


# ---- the scheduler, with stages that only pretend ----

PRETEND = """
import json, os, pathlib, sys, time
stage = json.loads(pathlib.Path(sys.argv[1]).read_text())
out, kind = pathlib.Path(stage["output"]), stage["kind"]
with open(os.environ["PRETEND_LOG"], "a") as log:
    log.write(f"{kind} {out.name}\\n")
config = stage["argv"][-1].partition("=")[2] if kind != "eval" else ""
text = pathlib.Path(config).read_text() if config else ""
if os.environ.get("PRETEND_FAIL") and os.environ["PRETEND_FAIL"] in text:
    print("something broke here")
    raise SystemExit(3)
if kind == "build":
    out.mkdir()
    (out / "manifest.jsonl").write_text(f"{out.name}\\nb\\nc\\n")
    (out / "COMPLETE").write_text("")
elif kind == "train":
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "last.pt").write_text("")
    pathlib.Path(stage["marker"]).write_text("{}")
else:
    n = int(out.stem, 16) % 7
    ap = {"AP": n / 100, "AP50": n / 50}
    out.write_text(json.dumps({"all": ap, "covered": ap, "covered_classes": ["disc"], "per_class": {"disc": n / 100}}))
"""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    script = tmp_path / "pretend.py"
    script.write_text(PRETEND)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("PRETEND_LOG", str(log))
    monkeypatch.setattr(runner, "command_of", lambda file: [sys.executable, str(script), str(file)])
    monkeypatch.setattr(runner, "POLL", 0.01)
    return log


@pytest.mark.parametrize("parallel", [1, 4])
def test_every_stage_is_run_once(bench: Path, tmp_path: Path, pretend: Path, parallel: int) -> None:
    experiment, out = drawn(bench), tmp_path / "out"
    assert runner.run(experiment, out, parallel) == 0
    lines = pretend.read_text().splitlines()
    assert len(lines) == len(set(lines))
    kinds = [line.split()[0] for line in lines]
    assert (kinds.count("build"), kinds.count("train"), kinds.count("eval")) == (2, 4, 4)
    found, failed = results.read(out, experiment)
    assert ([r.seed for r in found], failed) == ([0, 1, 0, 1], [])
    assert {r.composites for r in found} == {3}
    assert {r.iterations for r in found} == {2}
    assert runner.run(experiment, out, parallel) == 0
    assert pretend.read_text().splitlines() == lines, "nothing is run again"
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    more = drawn(bench, seeds=[0, 1, 2])
    assert runner.run(more, out, parallel) == 0
    added = [line.split()[0] for line in pretend.read_text().splitlines()[len(lines) :]]
    assert sorted(added) == ["build", "eval", "eval", "train", "train"]


def test_results_say_which_code_made_them(
    bench: Path, tmp_path: Path, pretend: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other code makes nothing again, and a table of both says so, however often it is run."""
    out = tmp_path / "out"
    words = ["experiment", str(bench / "drawn.yaml"), f"bench={bench}", f"out={out}"]
    monkeypatch.setattr(stages, "code_sha256", lambda *_: "old")
    assert main([*words, "seeds=[0]"]) == 0
    assert "different versions" not in capsys.readouterr().out
    before = pretend.read_text().splitlines()
    monkeypatch.setattr(stages, "code_sha256", lambda *_: "new")
    assert main([*words, "seeds=[0]"]) == 0
    assert pretend.read_text().splitlines() == before
    assert "different versions" not in capsys.readouterr().out
    for _ in range(2):
        assert main([*words, "seeds=[0, 1]"]) == 0
        assert "different versions of code" in capsys.readouterr().out
    found, _ = results.read(out, drawn(bench))
    assert [(r.seed, r.versions["code"]) for r in found] == [(0, "old"), (1, "new")] * 2
    (out / "evals" / f"{found[0].stages['eval']}.json").unlink()  # made again, by other code than its training
    assert main([*words, "seeds=[0, 1]"]) == 0
    assert [r.versions["code"] for r in results.read(out, drawn(bench))[0]] == ["new old", "new", "old", "new"]


def test_a_stage_that_other_code_began_is_of_both(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "code_sha256", lambda *_: "old")
    experiment, out = drawn(bench), tmp_path / "out"
    with runner.opened(experiment, out):
        work = Work(experiment, out)
    stage = work.build(experiment.arms[0], 0)
    stages.write_stage(work, stage)
    work.code = "new"
    assert work.codes_until(stage) == ["new"], "nothing of the old one is there"
    stage.output.with_name(stage.output.name + ".incomplete").mkdir()
    assert work.codes_until(stage) == ["new", "old"]
    stages.write_stage(work, stage)
    assert work.code_of([stage.key]) == "new old"
    assert work.code_of(["0" * 12]) == "unknown"


def test_the_hash_of_the_code_follows_code_and_configs(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.py", "cfg/train.yaml", "cfg/experiments/mine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    found = [stages.code_sha256(tmp_path, tmp_path / "cfg")]
    (tmp_path / "cfg" / "experiments" / "mine.yaml").write_text("2")
    assert stages.code_sha256(tmp_path, tmp_path / "cfg") == found[0]
    for name in ("a.py", "sub/b.py", "cfg/train.yaml"):
        (tmp_path / name).write_text("2")
        found.append(stages.code_sha256(tmp_path, tmp_path / "cfg"))
    assert len(set(found)) == 4


def test_a_result_names_the_data_it_was_made_of(bench: Path, tmp_path: Path, pretend: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(bench / "sources", sources)
    build = {**yaml.safe_load((bench / "drawn.yaml").read_text())["build"], "sources": [str(sources)]}
    experiment = with_arms(drawn(bench), {"plain": None}, tmp_path, bench, build=build, seeds=[0])
    out = tmp_path / "out"
    runner.run(experiment, out)
    before = results.read(out, experiment)[0][0].inputs
    models = {str(bench / "teacher.pt"), str(bench / "vit.json")}
    assert set(before) == {str(sources), *models, str(bench / "coco" / "data.yaml")}
    next(sources.rglob("*.jpg")).unlink()
    runner.run(experiment, out)
    after = results.read(out, experiment)[0][0].inputs
    assert [path for path in before if after[path] != before[path]] == [str(sources)]
    other = load_file(bench / "vit.safetensors")
    save_file({key: value + 1 for key, value in other.items()}, tmp_path / "other.safetensors")
    build |= {"sources": [str(sources)], "selector_weights": str(tmp_path / "other.safetensors")}
    experiment = with_arms(drawn(bench), {"plain": None}, tmp_path, bench, build=build, seeds=[0])
    assert str(tmp_path / "other.safetensors") in Work(experiment, out).inputs(experiment.arms[0], 0)


def test_a_lost_result_is_made_again_alone(bench: Path, tmp_path: Path, pretend: Path) -> None:
    experiment, out = drawn(bench, seeds=[0]), tmp_path / "out"
    runner.run(experiment, out)
    before = pretend.read_text().splitlines()
    next(iter(sorted((out / "evals").iterdir()))).unlink()
    runner.run(experiment, out)
    assert [line.split()[0] for line in pretend.read_text().splitlines()[len(before) :]] == ["eval"]


def test_a_failure_stops_its_arms_and_no_others(
    bench: Path, tmp_path: Path, pretend: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRETEND_FAIL", "supervision: both")
    out = tmp_path / "out"
    words = ["experiment", str(bench / "drawn.yaml"), f"bench={bench}", f"out={out}"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "2 of 4 arms and seeds failed" in said.err
    assert "something broke here" in said.out
    experiment = drawn(bench)
    found, failed = results.read(out, experiment)
    assert ([r.arm for r in found], [f.arm for f in failed]) == (["labels"] * 2, ["both"] * 2)
    assert all(f.exit_code == 3 and f.stage.startswith("train-") for f in failed)
    assert "something broke here" in (out / "results.md").read_text()
    monkeypatch.delenv("PRETEND_FAIL")
    assert main(words) == 0
    assert results.read(out, experiment)[1] == []
    table = json.loads((out / "results.json").read_text())
    assert [row["arm"] for row in table["rows"]] == ["labels", "both"]
    assert all(len(row["seeds"]) == 2 for row in table["rows"])
    assert table["rows"][1]["verdict"] == "not resolved"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*words, "--table"]) == 0
    assert "| both |" in capsys.readouterr().out


def test_a_dry_run_writes_nothing_and_knows_what_is_there(
    bench: Path, tmp_path: Path, pretend: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["experiment", str(bench / "drawn.yaml"), f"bench={bench}", f"out={out}", "seeds=[0]"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert main([*words, "--dry-run", "train.close-mosaic=1", "--train.warmup-epochs", "0"]) == 0
    assert capsys.readouterr().out == said
    assert "there: 0 of 2 results; to do: 1 builds, 2 trainings" in said
    assert not out.exists()
    runner.run(drawn(bench, seeds=[0]), out)
    assert main([*words, "--dry-run"]) == 0
    assert "there: 2 of 2 results; to do: 0 builds, 0 trainings" in capsys.readouterr().out


def test_a_dry_run_counts_the_composites_of_every_arm_and_seed(bench: Path, tmp_path: Path) -> None:
    """9 sources a class are two composites of 2 x 2, or one of 3 x 3; which grid a composite has is drawn by seed."""
    build = {**yaml.safe_load((bench / "drawn.yaml").read_text())["build"], "ipc": 2, "short_class": "reduce"}
    arms = {"vary": {"grids": [[], [3], [2, 3]]}}
    experiment = with_arms(drawn(bench), arms, tmp_path, bench, build=build, seeds=[0, 1, 2, 3])
    kept = _Composites()
    configs = [build_config(experiment, arm, seed) for arm in experiment.arms for seed in experiment.seeds]
    found = [kept.of(config)[0] for config in configs]
    assert found == [_Composites().of(config)[0] for config in configs]
    assert found[:8] == [6] * 4 + [3] * 4
    assert len(set(found[8:])) > 1


def test_one_experiment_at_a_time_in_a_folder(bench: Path, tmp_path: Path, pretend: Path) -> None:
    """The one that comes second touches nothing, not even the description of what runs there."""
    from focusdd_det.errors import DiskError

    experiment, out = drawn(bench), tmp_path / "out"
    with runner.opened(experiment, out):
        described = (out / runner.MARK).read_bytes()
        with pytest.raises(DiskError, match="is being written"):
            runner.run(drawn(bench, seeds=[7]), out)
        assert (out / runner.MARK).read_bytes() == described
    killed = tmp_path / "killed"  # between its first two steps
    killed.mkdir()
    (killed / ".lock").touch()
    assert runner.run(drawn(bench, seeds=[0]), killed) == 0


def test_a_stage_ends_with_its_experiment(tmp_path: Path) -> None:
    """Nothing goes on training when the scheduler was killed outright: the end of standard input ends the child."""
    code = (
        "import time, threading, sys\n"
        "from focusdd_det.experiment import child\n"
        "threading.Thread(target=child._end_with_the_parent, daemon=True).start()\n"
        "print('up', flush=True)\n"
        "time.sleep(120)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(60) == -signal.SIGTERM
    process.stdout.close()


@pytest.mark.parametrize(("argv", "code"), [(["verify", "--help"], 0), (["verify"], 2)])
def test_a_stages_process_ends_with_the_code_of_its_command(tmp_path: Path, argv: list[str], code: int) -> None:
    stage = {"kind": "eval", "output": str(tmp_path / "x"), "marker": "", "argv": argv, "resume": {}}
    (tmp_path / "stage.json").write_text(json.dumps(stage))
    process = subprocess.Popen(runner.command_of(tmp_path / "stage.json"), stdin=subprocess.PIPE)
    assert process.wait(120) == code  # its standard input is still open: it ended by itself
    assert process.stdin is not None
    process.stdin.close()


def test_a_training_that_finished_elsewhere_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train-0.json"
    stage = {"kind": "train", "output": str(tmp_path / "run"), "marker": str(tmp_path / "train-0.done"),
             "argv": ["detect", "train"], "resume": {}}  # fmt: skip
    file.write_text(json.dumps(stage))
    monkeypatch.setattr("focusdd_det.cli.dispatch", lambda argv: 0)
    with pytest.raises(VerifyError, match="holds no finished one"):
        child._run(file)
    assert not (tmp_path / "train-0.done").exists()


def test_what_a_run_folder_can_be_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert state_of(run, "detect") == "new"
    (run / "weights").mkdir(parents=True)
    torch.save({"epoch": 3, "optimizer": {}, "model": None}, run / "weights" / "last.pt")
    assert state_of(run, "detect") == "new", "without the exact state it begins anew"
    (run / "weights" / "resume.safetensors").touch()
    assert state_of(run, "detect") == "resume"
    assert state_of(run, "distill") == "new"
    torch.save({"epoch": -1, "optimizer": None, "model": None}, run / "weights" / "last.pt")
    assert state_of(run, "detect") == "finished"
    assert state_of(run, "classify") == "resume"
    (run / "accuracy.json").touch()
    assert state_of(run, "classify") == "finished"


# ---- a real one ----


def stage_files(out: Path) -> dict[str, int]:
    """What finished stages left, with the time of its writing."""
    kept = [*out.glob("sets/*/COMPLETE"), *out.glob("stages/*.done"), *out.glob("evals/*.json")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in kept}


@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_runs_nothing_twice(bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [
        sys.executable, "-c", "from focusdd_det.cli import main; raise SystemExit(main())",
        "experiment", str(bench / "drawn.yaml"), f"bench={bench}", f"out={out}", "iterations=40", "train.workers=0",
    ]  # fmt: skip
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline:  # until the second training is on its way
        trained = list(out.glob("stages/train-*.done"))
        begun = [p for p in out.glob("runs/*/weights/resume.safetensors") if (p.parent / "last.pt").is_file()]
        if trained and [p for p in begun if f"train-{p.parent.parent.name}" not in {t.stem for t in trained}]:
            break
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = stage_files(out)
    assert before
    stopped = [p.parent.parent for p in out.glob("runs/*/weights/resume.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    after = stage_files(out)
    assert {name: after[name] for name in before} == before, "a finished stage was run again"
    experiment = drawn(bench, iterations=40)
    found, failed = results.read(out, experiment)
    assert ([(r.arm, r.seed) for r in found], failed) == (
        [("labels", 0), ("labels", 1), ("both", 0), ("both", 1)],
        [],
    )
    assert {(r.composites, r.epochs, r.iterations) for r in found} == {(3, 20, 40)}
    for run in out.glob("runs/*"):
        with (run / "results.csv").open() as file:
            assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, 21))
    for run in stopped:
        journal = (out / "stages" / f"train-{run.name}.log").read_text()
        assert "train: resume" in journal
        assert "resuming exactly after epoch" in journal
    assert "| both | 3 | 40 | 2 |" in (out / "results.md").read_text()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0
    assert stage_files(out) == after


@pytest.mark.slow
def test_stock_distillation_trains_from_the_same_start(bench: Path, tmp_path: Path) -> None:
    from ultralytics.nn.distill_model import DistillationModel

    from focusdd_det.checkpoints import safe_checkpoint
    from focusdd_det.detset import verify
    from focusdd_det.trainer import FocusDDTrainer

    arms = {"vary": {"train.supervision": ["both", "distill_model"]}}
    experiment = with_arms(drawn(bench), arms, tmp_path, bench, seeds=[3])
    starts: list[dict[str, torch.Tensor]] = []

    def keep(trainer: Any) -> None:
        model = trainer.model.student_model if isinstance(trainer.model, DistillationModel) else trainer.model
        starts.append({k: v.clone() for k, v in model.named_parameters()})

    out = tmp_path / "out"
    assert runner.run(experiment, out) == 0
    found, _ = results.read(out, experiment)
    assert len(found) == 2
    sets = list((out / "sets").iterdir())
    assert len(sets) == 1
    assert verify(sets[0]) == []
    assert not list(sets[0].rglob("*.cache"))
    distilled = next(out.glob("stages/distill-*.done"))
    last = out / "runs" / distilled.stem.partition("-")[2] / "weights" / "last.pt"
    assert type(safe_checkpoint(last)).__name__ == "DetectionModel"
    for arm, kind in zip(experiment.arms, (FocusDDTrainer, StockDistillation), strict=True):
        values = train_settings(experiment, arm, 3)
        values = {**values, "data": str(sets[0]), "project": str(tmp_path / "more"), "name": arm.name, "epochs": 1}
        trainer = kind(overrides=values if kind is FocusDDTrainer else stock_arguments(values))
        trainer.add_callback("on_train_start", keep)
        trainer.train()
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])


@pytest.mark.slow
def test_classifiers_and_their_stores(tmp_path: Path) -> None:
    from cls_support import NET, make_pictures, make_teacher

    pictures = make_pictures(tmp_path / "pictures")
    teacher = make_teacher(tmp_path)
    content = {
        "task": "classify",
        "build": {
            "sources": [str(pictures / "train")], "ipc": 1, "image_size": 64, "near_duplicate": 0, "device": "cpu",
            "threads": 1, "method": "random",
        },
        "relabel": {"teacher": str(teacher), "epochs": 2, "device": "cpu", "workers": 1, "batch": 4},
        "train": {"model": NET, "imgsz": 32, "batch": 4, "device": "cpu", "plots": False, "every": "50%"},
        "eval": {"data": str(pictures / "val")},
        "iterations": 4,
        "seeds": [0],
        "arms": {"vary": {"train.labels": ["hard", "store"]}},
        "baseline": "hard",
    }  # fmt: skip
    file = tmp_path / "cls.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "out"
    assert main(["experiment", str(file), f"out={out}"]) == 0, (out / "results.md").read_text()
    found, _ = results.read(out, read_experiment(file))
    assert [sorted(r.values) for r in found] == [["top1", "top5"]] * 2
    assert [sorted(r.stages) for r in found] == [["build", "train"], ["build", "relabel", "train"]]
    assert [r.iterations for r in found] == [4, 4]


def test_a_stage_is_named_by_kind_and_key() -> None:
    assert Stage("train", "0123", Path("x"), ("detect", "train")).name == "train-0123"
