"""Every command of the README, run at a small size on drawn data in the places that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, draw, save_detector
from safetensors.torch import save_file

from focusdd_det.bench.command import bench_command
from focusdd_det.classify.continual import continual_command
from focusdd_det.classify.export import export_command
from focusdd_det.classify.nets import make_net
from focusdd_det.classify.relabel import relabel_command
from focusdd_det.classify.train_cli import train as train_cls
from focusdd_det.classmap import find_map, read_class_map
from focusdd_det.cli import build_cls_command, build_command, main, run_main
from focusdd_det.config import cfg_dir
from focusdd_det.detset import read_manifest, verify
from focusdd_det.training.command import train, val_coco
from focusdd_det.training.store_targets import store_command

TOOLS: dict[str, Callable[[Sequence[str]], int]] = {
    "tools/build_det_set.py": build_command,
    "tools/train_det.py": train,
    "tools/store_targets.py": store_command,
    "tools/val_coco.py": val_coco,
    "tools/build_cls_set.py": build_cls_command,
    "tools/relabel_cls.py": relabel_command,
    "tools/train_cls.py": train_cls,
    "tools/continual_cls.py": continual_command,
    "tools/export_cls.py": export_command,
    "tools/bench.py": bench_command,
}
# What makes a command of the README small enough for a test; appended, and the last value of a key wins.
SMALL = {
    "tools/build_det_set.py": "image_size=64 conf=0.01 min_side=1 near_duplicate=0 threads=1 device=cpu "
    "selector=vit.json download=false",
    "tools/train_det.py": "epochs=1 imgsz=64 batch=4 workers=0 device=cpu plots=False exist_ok=True",
    "tools/store_targets.py": "imgsz=64 pool=1 batch=4 workers=0 device=cpu",
    "tools/val_coco.py": "imgsz=64 device=cpu subset=True",
    "tools/build_cls_set.py": "ipc=2 image_size=64 near_duplicate=0 threads=1 device=cpu selector=vit.json",
    "tools/relabel_cls.py": "size=32 epochs=1 batch=4 workers=1 device=cpu",
    "tools/train_cls.py": "epochs=1 imgsz=32 batch=4 workers=0 device=cpu plots=False exist_ok=True",
    "tools/continual_cls.py": "steps=2 model=test_resnet epochs=1 imgsz=32 batch=4 device=cpu plots=False",
    "tools/export_cls.py": "",
    "tools/bench.py": "parts=train rounds=1 imgsz=64 batch=2 device=cpu precision=fp32",
    "focusdd explain": "selector=vit.json selector_weights=vit.safetensors batch=1",
    "focusdd gallery": "selector=vit.json selector_weights=vit.safetensors",
    "focusdd map": "device=cpu per_synset=1",
    "focusdd experiment": "selector=vit.safetensors --dry-run",
}


def commands() -> list[str]:
    """The lines of the README's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def own_commands() -> list[str]:
    """Those of this package: scripts and `focusdd`."""
    return [line for line in commands() if line.startswith(("python tools/", "focusdd "))]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert commands()[:2] == ["make demo", "make test"]


def test_make_targets_and_pip_lines_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M), line
        elif line.startswith("pip install") and "-c " in line:
            assert (REPOSITORY / line.split("-c ")[1].split()[0]).is_file()
        else:
            assert line.startswith(("pip install", "python tools/", "focusdd ")), f"nothing checks `{line}`"


def test_every_file_the_readme_links_is_there() -> None:
    for name in ("README.md", "datasets/README.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#][^)]*)\)", text):
            if "://" not in target:
                assert (REPOSITORY / name).parent.joinpath(target).exists(), f"{name} links {target}"


def test_every_tool_is_in_the_readme_or_the_demo() -> None:
    text = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "Makefile").read_text()
    tools = list((REPOSITORY / "tools").glob("*.py"))
    assert len(tools) > 5
    for tool in tools:
        assert f"tools/{tool.name}" in text, tool.name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the paths of the README exist: drawn pictures under ImageNet's and COCO's names."""
    import timm

    top = tmp_path_factory.mktemp("readme")
    names = read_class_map(find_map("coco_imagenet.yaml"), ["exact"]).names
    rng = np.random.default_rng(0)
    for folder in ("imagenet/train/n02123045", "imagenet/train/n02085620", "my_pictures/giraffes_2019"):
        (top / folder).mkdir(parents=True)
        for i in range(9):
            cv2.imwrite(str(top / folder / f"{i}.jpg"), draw(rng, 64)[0])
    for source, target in (("train", "val"), ("train", "../downloads/food-101/images")):
        shutil.copytree(top / "imagenet" / source, top / "imagenet" / target)
    (top / "downloads" / "food-101" / "meta").mkdir()
    pictures = sorted((top / "downloads" / "food-101" / "images").rglob("*.jpg"))
    table: dict[str, list[str]] = {}
    for picture in pictures:
        table.setdefault(picture.parent.name, []).append(f"{picture.parent.name}/{picture.stem}")
    for split in ("train", "test"):
        (top / "downloads" / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(table))
    (top / "weights").mkdir()
    torch.save(make_net("resnet18", 1000).module.state_dict(), top / "weights" / "resnet18.pth")
    shutil.copy(top / "imagenet/train/n02123045/0.jpg", top / "picture.jpg")
    (top / "my_map.yaml").write_text("giraffes_2019: giraffe\n")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **kwargs)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, top / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": ["n02123045", "n02085620"]}
    (top / "vit.json").write_text(json.dumps({**spec, "weights": "vit.safetensors"}))
    save_detector(top / "yolo11x.pt", names=names)
    for part in ("images/train2017", "images/val2017", "labels/train2017", "labels/val2017", "annotations"):
        (top / "datasets" / "coco" / part).mkdir(parents=True)
    annotations = []
    for i in range(2):
        picture, rows = draw(rng, 64)
        cv2.imwrite(str(top / "datasets/coco/images/val2017" / f"{i:012d}.jpg"), picture)
        text = "".join(f"{c} {x:.5f} {y:.5f} {w:.5f} {h:.5f}\n" for c, x, y, w, h in rows)
        (top / "datasets/coco/labels/val2017" / f"{i:012d}.txt").write_text(text)
        for c, x, y, w, h in rows:
            box = [(x - w / 2) * 64, (y - h / 2) * 64, w * 64, h * 64]
            where = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": c + 1, **where})
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 64, "height": 64} for i in range(2)]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (top / "datasets/coco/annotations/instances_val2017.json").write_text(content)
    (top / "coco").symlink_to("datasets/coco")
    (top / "datasets/coco.yaml").write_text((REPOSITORY / "datasets" / "coco.yaml").read_text())
    return top


def test_every_command_of_the_readme_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the README, each on what the ones before it made."""
    monkeypatch.chdir(place)
    for line in own_commands():
        if line.startswith("focusdd "):
            argv = [*shlex.split(line)[1:], *SMALL.get(" ".join(line.split()[:2]), "").split()]
            code = main(argv)
            assert code == 0, f"`{line}` ended with {code}: {capsys.readouterr().err[-2000:]}"
            continue
        tool, *argv = shlex.split(line)[1:]
        small = SMALL[tool].split()
        if "resume=" in line:  # the run of the first training command has finished: what is asked is a clear answer
            assert run_main(TOOLS[tool], argv) == 4, line
            assert "finished" in capsys.readouterr().err
            continue
        argv = [word for word in argv if word not in ("--download", "download=True")]
        argv = [word.replace("weights=imagenet", "weights=weights/resnet18.pth") for word in argv]
        if tool in ("tools/train_det.py", "tools/train_cls.py"):
            task = "detect" if tool == "tools/train_det.py" else "classify"
            small.append(f"project={place / 'runs' / task}")  # under pytest Ultralytics' default lies elsewhere
        code = run_main(TOOLS[tool], [*argv, *small])
        assert code == 0, f"`{line}` ended with {code}: {capsys.readouterr().err[-2000:]}"
    for folder in ("focusdd", "focusdd100", "random", "focusdd_cls", "food101_cls"):
        assert verify(Path("datasets") / folder) == []
    assert len(list(read_manifest(Path("datasets/focusdd")))) == 4
    assert main(["verify", "datasets/focusdd"]) == 0
    assert json.loads(Path("runs/classify/finetuned/accuracy.json").read_text())["last"]["n"] == 18


def test_every_shipped_config_is_read_by_its_tool() -> None:
    from focusdd_det.build import load_class_config, load_config
    from focusdd_det.training.command import train_overrides
    from focusdd_det.training.store_targets import load_config as load_targets_config

    assert {p.name for p in cfg_dir().glob("*.yaml")} == {
        "build_det.yaml", "train_det.yaml", "coco_imagenet.yaml", "caltech101_coco.yaml", "imagenet_more_coco.yaml",
        "build_cls.yaml", "relabel_cls.yaml", "train_cls.yaml", "train_cls_tiny_imagenet.yaml", "train_cls_1000.yaml",
        "finetune_cls.yaml", "transfer_cls.yaml", "tiny_vit.yaml", "store_targets.yaml", "map_audit.yaml", "bench.yaml",
    }  # fmt: skip
    assert load_config().ipc == 50
    assert load_class_config().ipc == 10
    assert train_overrides({})["optimizer"] == "SGD"
    assert load_targets_config(data="datasets/focusdd", teacher="yolo11x.pt").floor == 0.01
