"""The shipped recipes, at a size for a test: dynamic fine-tuning, transfer, the tiny ViT, continual learning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from cls_support import CLASSES, NET, make_pictures, make_teacher
from safetensors.torch import load_file

from focusdd_det.build import build, load_class_config
from focusdd_det.classify.continual import class_steps, continual_command
from focusdd_det.classify.train_cli import train
from focusdd_det.cli import run_main
from focusdd_det.config import cfg_dir, read_yaml
from focusdd_det.detset import read_manifest, verify

SMALL = ["imgsz=32", "batch=4", "plots=False", "verbose=False", "device=cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("recipes"))


def run(tmp_path: Path, pictures: Path, name: str, *words: str) -> Path:
    argv = [f"data={pictures}", f"eval_data={pictures}", f"project={tmp_path}", f"name={name}", *SMALL, *words]
    assert run_main(train, argv) == 0
    return tmp_path / name


def test_the_recipes_say_what_the_paper_says() -> None:
    shipped = {path.name: read_yaml(path) for path in cfg_dir().glob("*.yaml")}
    base = shipped["train_cls.yaml"]
    assert (base["optimizer"], base["lr0"], base["weight_decay"], base["batch"]) == ("AdamW", 1e-3, 0.01, 128)
    assert (base["epochs"], base["cos_lr"], base["lrf"], base["temperature"]) == (300, True, 0, 20)
    assert (base["cutmix"], base["ema"]) == (1.0, False)
    tiny = {**base, **shipped["train_cls_tiny_imagenet.yaml"]}
    assert (tiny["optimizer"], tiny["lr0"], tiny["momentum"], tiny["weight_decay"]) == ("SGD", 0.2, 0.9, 1e-4)
    assert tiny["batch"] == 256
    assert {**base, **shipped["train_cls_1000.yaml"]}["epochs"] == 1000
    tuning = {**base, **shipped["finetune_cls.yaml"]}
    assert (tuning["epochs"], tuning["batch"], tuning["lr0"]) == (50, 64, 2.5e-4)
    assert shipped["transfer_cls.yaml"]["epochs"] == 10


RECIPES = (
    "train_cls_tiny_imagenet.yaml",
    "train_cls_1000.yaml",
    "transfer_cls.yaml",
    "tiny_vit.yaml",
    "finetune_cls.yaml",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_every_check(recipe: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"cfg={recipe}", f"data={pictures}", f"eval_data={pictures}", "labels=hard", "--dry-run"]
    assert run_main(train, words) == 0
    assert f"epochs={read_yaml(cfg_dir() / recipe)['epochs']}" in capsys.readouterr().out


def test_the_optimizer_that_results(tmp_path: Path, pictures: Path) -> None:
    """The recipe as AdamW gets it: no learning rate above lr0 in a warm-up, decay as written, no accumulation."""
    from focusdd_det.classify.trainer import FocusDDClassificationTrainer

    seen: list[list[tuple[str, float, float]]] = []

    def look(trainer: FocusDDClassificationTrainer) -> None:
        groups = trainer.optimizer.param_groups
        seen.append([(g["param_group"], g["lr"], g["weight_decay"]) for g in groups])
        assert trainer.accumulate == 1

    overrides = {
        "model": NET, "data": str(pictures), "eval_data": None, "labels": "hard", "imgsz": 32, "batch": 4, "epochs": 3,
        "warmup_epochs": 2, "plots": False, "device": "cpu", "project": str(tmp_path), "name": "run",
    }  # fmt: skip
    trainer = FocusDDClassificationTrainer(overrides=overrides)
    trainer.add_callback("on_train_batch_end", look)
    trainer.train()
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert all(0 <= lr <= 1e-3 for step in seen for _, lr, _ in step)
    assert {name: decay for name, _, decay in seen[0]} == {"weight": 0.01, "bn": 0.0, "bias": 0.0}
    assert seen[-1][0][1] < 0.5e-3  # the cosine has come down


def test_dynamic_fine_tuning_goes_on_from_a_student_and_measures_the_same_way(tmp_path: Path, pictures: Path) -> None:
    first = run(tmp_path, pictures, "first", f"model={NET}", "labels=hard", "epochs=2")
    start = first / "weights" / "last.json"
    words = ["cfg=finetune_cls.yaml", f"model={NET}", f"weights={start}", "labels=hard", "subset_ipc=2", "epochs=2"]
    tuned = run(tmp_path, pictures, "tuned", *words)
    assert "subset_ipc: 2" in (tuned / "focusdd.yaml").read_text()
    before, after = (json.loads((folder / "accuracy.json").read_text())["last"] for folder in (first, tuned))
    assert before["n"] == after["n"] == 12
    still = run(tmp_path, pictures, "still", *words, "lr0=1e-12", "weight_decay=0", "epochs=1")
    old, new = (load_file(folder / "weights" / "last.safetensors") for folder in (first, still))
    weights = [key for key in old if key.endswith("weight")]
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in weights)  # it did start from there


def test_transfer_puts_a_new_head_on_a_pretrained_student(tmp_path: Path, pictures: Path) -> None:
    source = make_teacher(tmp_path)  # four classes
    words = ["cfg=transfer_cls.yaml", f"model={NET}", f"weights={source}", "labels=hard", "epochs=1", "lr0=1e-12"]
    folder = run(tmp_path, pictures, "moved", *words, "weight_decay=0")
    old, new = load_file(source.with_suffix(".safetensors")), load_file(folder / "weights" / "last.safetensors")
    changed = [key for key in old if old[key].shape != new[key].shape]
    assert len(changed) == 2  # weight and bias of the head
    assert all(new[key].shape[0] == 3 for key in changed)
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in set(old) - set(changed) if "weight" in key)


def test_the_tiny_vit_is_trained_by_the_tool_and_then_selects(tmp_path: Path, pictures: Path) -> None:
    folder = run(tmp_path, pictures, "vit", "cfg=tiny_vit.yaml", "epochs=2", "warmup_epochs=0")
    spec = json.loads((folder / "weights" / "last.json").read_text())
    assert spec["classes"] == list(CLASSES)
    state = load_file(folder / "weights" / "last.safetensors")
    assert sum(key.endswith("attn.qkv.weight") for key in state) == 4  # depth
    assert tuple(state["patch_embed.proj.weight"].shape) == (192, 3, 4, 4)  # width, patch
    assert tuple(state["pos_embed"].shape) == (1, 8 * 8 + 1, 192)  # a 32 px view
    result = build(
        load_class_config(
            sources=[str(pictures / "train")], ipc=1, image_size=64, selector=str(folder / "weights" / "last.json"),
            out=str(tmp_path / "set"), near_duplicate=0, workers=1, batch=4, device="cpu",
        )
    )  # fmt: skip
    assert verify(result.folder) == []
    shares = [cell.share for item in read_manifest(result.folder) for cell in item.cells]
    assert all(0.4 < share <= 1 for share in shares)  # a flat map gives (6/8)^2 = 0.56


def test_continual_steps_are_equal_nested_and_seeded() -> None:
    steps = class_steps(10, 5, 0)
    assert [len(step) for step in steps] == [2, 4, 6, 8, 10]
    assert all(set(small) < set(large) for small, large in itertools.pairwise(steps))
    assert steps == class_steps(10, 5, 0) != class_steps(10, 5, 1)
    assert [len(step) for step in class_steps(7, 3, 0)] == [2, 5, 7]


def test_continual_learning_measures_on_the_classes_seen_and_goes_on(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "continual"
    words = [f"data={pictures}", f"eval_data={pictures}", "labels=hard", f"model={NET}", "epochs=1", *SMALL]
    assert run_main(continual_command, [*words, "steps=3", f"out={out}"]) == 0
    content = json.loads((out / "continual.json").read_text())
    assert [row["classes"] for row in content["results"]] == [1, 2, 3]
    assert content["results"][0]["top1"] == 100  # one class
    counted = [json.loads((out / f"step{i}" / "accuracy.json").read_text())["last"]["n"] for i in (1, 2, 3)]
    assert counted == [4, 8, 12]
    assert (out / "continual.png").stat().st_size > 1000
    made = (out / "step2" / "accuracy.json").stat().st_mtime_ns
    assert run_main(continual_command, [*words, "steps=3", f"out={out}"]) == 0
    assert (out / "step2" / "accuracy.json").stat().st_mtime_ns == made  # finished steps are not run again
    capsys.readouterr()
    assert run_main(continual_command, [*words, "steps=3", "lr0=0.5", f"out={out}"]) == 2
    assert "another experiment (arguments differ)" in capsys.readouterr().err
    (out / "experiment.json").write_text("{")
    assert run_main(continual_command, [*words, "steps=3", f"out={out}"]) == 6
    assert "experiment.json cannot be read" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert run_main(continual_command, [*words, "steps=3", f"out={tmp_path / 'file'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert run_main(continual_command, [*words, "steps=3", f"out={pictures / 'x'}"]) == 2
    assert "would lie inside" in capsys.readouterr().err
    assert not (pictures / "x").exists()
    assert run_main(continual_command, [*words, "steps=3", f"out={tmp_path / 'x'}", "--dry-run"]) == 0
    assert not (tmp_path / "x").exists()
    assert run_main(continual_command, [*words, "steps=9", f"out={tmp_path / 'x'}"]) == 2
    assert "expected 1 to 3" in capsys.readouterr().err
    assert run_main(continual_command, [*words, "stps=3", f"out={tmp_path / 'x'}"]) == 2
    assert "steps" in capsys.readouterr().err


def test_continual_learning_refuses_what_it_decides_itself(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={pictures}", "labels=hard", f"out={tmp_path / 'x'}"]
    assert run_main(continual_command, [*words, f"eval_data={pictures}", "name=mine"]) == 2
    assert "name: decided here" in capsys.readouterr().err
    assert run_main(continual_command, [*words, "eval_data=none"]) == 2
    assert "eval_data" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
