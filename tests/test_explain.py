"""`focusdd explain`: the same window as the build's, overlays where they belong, nothing overwritten but overlays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import draw
from PIL import Image
from safetensors.torch import save_file
from test_backbones import mine

from focusdd_det import plugins
from focusdd_det.backbones import BACKBONES
from focusdd_det.build import build, load_class_config, load_config
from focusdd_det.cli import main
from focusdd_det.detset import read_manifest, verify
from focusdd_det.selector import load_selector
from focusdd_det.showing import command as explain_cli
from focusdd_det.showing.draw import overlay
from focusdd_det.showing.explain import Explained, Finding, explain, outputs_of
from focusdd_det.types import Crop
from focusdd_det.windows import view_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Oblong sources of two classes and a tiny ViT that knows them."""
    top = tmp_path_factory.mktemp("explain")
    rng = np.random.default_rng(7)
    for folder in ("disc", "square"):
        (top / "sources" / folder).mkdir(parents=True)
        for i in range(6):
            size = (int(rng.integers(60, 200)), int(rng.integers(60, 200)))
            cv2.imwrite(str(top / "sources" / folder / f"{i}.jpg"), cv2.resize(draw(rng, 96)[0], size))
    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, top / "vit.safetensors")
    known = {"classes": ["disc", "square", "n02123045"], "weights": "vit.safetensors"}
    (top / "vit.json").write_text(json.dumps({"arch": "vit_tiny_patch16_224", "kwargs": kwargs, **known}))
    return top


def made(bench: Path, out: Path, **more: Any) -> Path:
    options = {
        "sources": [str(bench / "sources")], "selector": str(bench / "vit.json"), "ipc": 1, "image_size": 64,
        "near_duplicate": 0, "device": "cpu", "threads": 1, "out": str(out), **more,
    }  # fmt: skip
    build(load_class_config(**options))
    return out


def run(*argv: object) -> int:
    return main(["explain", *map(str, argv)])


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": "squash", "attention": "gca"},
        {"geometry": "squash", "attention": "gca", "decode": "full"},
        {"geometry": "crop", "attention": "last", "crop": "cover"},
        {"geometry": "squash", "attention": "mean", "side_ratio": 0.4, "crop": "fixed"},
    ],
)
def test_the_window_is_the_one_that_the_build_cuts(bench: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = made(bench, tmp_path / "set", **change)
    selector = load_selector(str(bench / "vit.json"), None)
    config = load_config(image_size=64, **change)
    keys = [cell for item in read_manifest(folder) for cell in item.cells if cell.kind == "key"]
    assert len(keys) == 6
    for cell in keys:
        data = (bench / "sources" / cell.path).read_bytes()
        own = (selector.classes.index(cell.folder),)
        found = explain([data], [own], selector, [change["attention"]], config)[0]
        assert isinstance(found, Explained)
        finding = found.findings[0]
        assert (finding.crop.x, finding.crop.y, finding.crop.side) == cell.crop
        assert (found.p, round(finding.share, 4)) == (cell.p, cell.share)
        assert (found.view.width, found.view.height) == (cell.width, cell.height)
        row, column = finding.corner
        window = finding.heat[row : row + finding.k, column : column + finding.k]
        assert window.sum() / finding.heat.sum() == pytest.approx(finding.share, abs=1e-4)
        assert finding.score == pytest.approx(found.p + 30 * 0.08648 * finding.share, abs=2e-4)
    assert len({cell.crop for cell in keys}) > 1


def test_the_sources_of_a_composite(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(bench, tmp_path / "set", geometry="crop", alpha=7.0)
    item = next(iter(read_manifest(folder)))
    out = tmp_path / "out"
    assert run(folder, f"id={item.id}", f"selector={bench / 'vit.json'}", f"out={out}", "batch=4") == 0
    text = capsys.readouterr().out
    assert text.count("as in the set") == 3
    assert "the set has" not in text
    for i, cell in enumerate(item.cells):
        assert (out / f"{item.id}_{i}_{cell.kind}_{Path(cell.path).stem}.png").is_file()
        assert f"p {cell.p:.4f} ({cell.folder})" in text
    assert verify(folder) == []
    assert run(folder, "id=000_disk_00000", f"selector={bench / 'vit.json'}", f"out={out}") == 2
    assert f"did you mean {item.id}" in capsys.readouterr().err
    moved = (f"id={item.id}", f"selector={bench / 'vit.json'}", f"out={out}", f"sources={tmp_path}")
    assert run(folder, *moved) == 3
    assert "give the folder that the set was built from with sources=" in capsys.readouterr().err


def test_what_another_method_cut_is_outlined(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(bench, tmp_path / "set", method="random", seed=3)
    item = next(iter(read_manifest(folder)))
    out, selector = tmp_path / "out", f"selector={bench / 'vit.json'}"
    assert run(folder, f"id={item.id}", selector, f"out={out}", "batch=4") == 0
    assert capsys.readouterr().out.count("the set has ") == len(item.cells)
    for i, cell in enumerate(item.cells):
        assert cell.crop is not None
        picture = bench / "sources" / cell.path
        alone = tmp_path / f"alone{i}"
        assert run(picture, selector, f"out={alone}", "batch=4") == 0
        counts = []
        for png in (out / f"{item.id}_{i}_{cell.kind}_{picture.stem}.png", alone / f"{picture.stem}.png"):
            pixels = np.array(Image.open(png).convert("RGB")).astype(int)
            counts.append(int((np.abs(pixels - (0xFF, 0x8A, 0)).max(axis=2) < 8).sum()))
        assert counts[0] > 2 * cell.crop[2]  # four sides of it; a panel is 4 inches wide at 110 dots, the picture less
        assert counts[1] < 20


def test_the_heat_lies_where_the_attention_is() -> None:
    """One hot token of a 4 x 4 grid, in a picture of which the ViT saw the middle square."""
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 1
    view = view_of(300, 100, "crop")
    finding = Finding("gca", heat, (0, 0), 3, 1.0, 1.0, Crop(0, 0, 10))
    found = Explained(view, 1.0, (), ((0, 1.0),), (finding,))
    drawn = overlay(np.full((100, 300, 3), 90, np.uint8), heat, found, (300, 100)).astype(int)
    colour = np.ptp(drawn, axis=2)
    assert (colour[:, :100] == 0).all()  # not seen: grey
    assert (colour[:, 200:] == 0).all()
    y, x = np.unravel_index(drawn.sum(axis=2).argmax(), drawn.shape[:2])
    assert abs(x - (100 + 62.5)) < 6
    assert abs(y - 37.5) < 6


def test_a_png_for_each_picture_and_only_overlays_are_overwritten(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b=1").mkdir()
    Image.fromarray(draw(rng, 64)[0]).resize((9, 400)).save(tmp_path / "a" / "x.png")
    Image.fromarray(rng.integers(0, 65535, (40, 50)).astype(np.uint16)).save(tmp_path / "a" / "deep.tif")
    Image.new("RGBA", (1, 1), (9, 9, 9, 0)).save(tmp_path / "b=1" / "x.webp")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    selector = f"selector={bench / 'vit.json'}"
    assert run("a", "b=1/x.webp", selector, "batch=2") == 0
    names = {"a_x.png", "b=1_x.png", "deep.png"}
    assert {path.name for path in (tmp_path / "explain").iterdir()} == names
    text = capsys.readouterr().out
    assert "crop 1 px at (0, 0)" in text
    assert all(path.read_bytes() == data for path, data in before.items())
    size = Image.open(tmp_path / "explain" / "deep.png").size
    assert run("a/deep.tif", "--selector", bench / "vit.json", "--attention", "all", "--class", "disc", "batch=1") == 0
    wide = Image.open(tmp_path / "explain" / "deep.png").size
    assert (wide[0], wide[1]) == (2 * size[0], size[1])
    assert "(disc); gca share" in capsys.readouterr().out
    (tmp_path / "explain" / "deep.png").write_bytes((tmp_path / "a" / "x.png").read_bytes())
    assert run("a/deep.tif", selector, "batch=1") == 5
    assert "is no overlay of this program" in capsys.readouterr().err
    assert run("a/x.png", selector, "batch=1", "out=a") == 5
    assert "is one of the pictures" in capsys.readouterr().err
    assert (tmp_path / "a" / "x.png").read_bytes() == before[tmp_path / "a" / "x.png"]


def test_a_bad_picture_is_named_and_the_others_are_done(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = bench / "sources" / "disc" / "1.jpg"
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    where = (f"selector={bench / 'vit.json'}", f"out={tmp_path / 'out'}", "batch=2")
    assert run(tmp_path / "cut.jpg", tmp_path / "empty.png", good, *where) == 3
    error = capsys.readouterr().err
    assert "2 of 3 pictures cannot be used" in error
    assert "empty.png: empty file" in error
    assert "cut.jpg: " in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["gone.jpg"], 3, "no picture at gone.jpg"),
        (["bare"], 3, "bare holds no picture"),
        ([], 2, "no picture was named"),
        (["disc", "geometri=crop"], 2, "unknown key `geometri`, did you mean geometry?"),
        (["disc", "ipc=3"], 2, "unknown key `ipc`"),
        (["disc", "attention=lust"], 2, "expected gca, last, mean or all, did you mean last?"),
        (["disc", "geometry=squish"], 2, "did you mean squash?"),
        (["disc", "class=disk"], 2, "class=disk: the selector knows no such class, did you mean disc"),
        (["disc", "count=-1"], 2, "count=-1: expected a whole number"),
        (["disc", "out=disc/overlays"], 2, "lie in each other"),
        (["disc", "out=file"], 5, "out=file is not a folder"),
        (["disc", "out=set/explain"], 2, "is sealed"),
        (["disc", "id=a"], 2, "disc is not a distilled set"),
        (["disc", "class=007"], 2, "class=007: the selector knows no such class"),
        (["disc", "plugins=gone.py"], 2, "plugins: cannot read gone.py"),
    ],
)
def test_refusals(
    bench: Path, tmp_path: Path, drawn_set: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disc").symlink_to(bench / "sources" / "disc")
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "build.yaml").write_text("format: focusdd_det set\n")
    held = sorted(tmp_path.rglob("*"))
    assert run(*argv, f"selector={bench / 'vit.json'}") == code
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == held


def test_count_spreads_over_a_folder_and_names_do_not_clash(tmp_path: Path) -> None:
    for name in ("a/0.jpg", "a/1.jpg", "a/2.jpg", "a/b/3.jpg", "c/0.png", "d/a/0.gif", "e/a/0.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in explain_cli._pictures([tmp_path / "a"], 2)] == ["0.jpg", "2.jpg"]
    files = explain_cli._pictures([tmp_path / "c" / "0.png", tmp_path], 0)
    targets = explain_cli._targets(files, Path("out"))
    assert len(set(targets)) == len(files) == 8
    assert {t.name for t in targets} >= {"1.png", "2.png", "3.png", "c_0.png", "a_0.png", "a_0-2.png"}
    assert len(explain_cli._safe("é" * 200).encode()) <= 150


def test_a_class_of_the_class_map_is_all_its_folders(bench: Path) -> None:
    selector = load_selector(str(bench / "vit.json"), None)
    assert outputs_of("cat", selector, load_config()) == (2,)  # n02123045 is a tabby
    assert outputs_of("square", selector, load_config()) == (1,)


def test_a_backbone_of_the_users_own_is_explained(tmp_path: Path, bench: Path) -> None:
    file, weights = mine(tmp_path)
    picture = bench / "sources" / "disc" / "2.jpg"
    try:
        where = (f"plugins={file}", "selector=mine", f"selector_weights={weights}", f"out={tmp_path / 'out'}")
        assert run(picture, *where, "batch=1") == 0
    finally:
        BACKBONES.pop("mine", None)
        plugins._loaded.clear()
    assert (tmp_path / "out" / "2.png").is_file()


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for key in explain_cli.KEYS:
        assert f"\n{key}: " in text, key
    assert "id, sources" in text


def test_a_real_dog_is_where_the_attention_is(assets: Path, tmp_path: Path) -> None:
    """DeiT-Tiny on a photograph of a beagle: the class is right and the overlay a picture of some size."""
    weights = assets / "weights" / "deit_tiny_patch16_224.in1k.safetensors"
    picture = next((assets / "data" / "imagenet_mini" / "images" / "n02088364").iterdir())
    where = ("selector=deit_tiny_patch16_224", f"selector_weights={weights}", f"out={tmp_path}", "batch=1")
    assert run(picture, *where, "attention=all") == 0
    drawn = next(tmp_path.glob("*.png"))
    assert min(Image.open(drawn).size) > 500
    selector = load_selector("deit_tiny_patch16_224", str(weights))
    found = explain([picture.read_bytes()], [()], selector, ["gca"], load_config(batch=1))[0]
    assert isinstance(found, Explained)
    assert selector.classes[found.top[0][0]] == "n02088364"


def test_p_of_a_pooled_class_is_rounded_as_in_a_build() -> None:
    """118 outputs of a thousand, such as dog: what a build sums are whole multiples of 1/65535."""
    from focusdd_det.scoring.contents import STEPS, confidence, steps

    table = steps(np.full((1, 1000), 0.001) + 0.2 / STEPS)
    own = list(range(118))
    assert confidence(table, own, "true")[0] == 118 * 66 / STEPS  # 65.535 + 0.2, rounded one by one
    assert confidence(table, own, "max")[0] == confidence(table, [], "true")[0] == 66 / STEPS
