"""The whole build on small drawn sources with tiny models: bytes, rules, reports and refusals."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES, draw, save_detector
from safetensors.torch import save_file

from focusdd_det import detset
from focusdd_det.build import build, load_config
from focusdd_det.cli import build_command, main, run_main
from focusdd_det.detset import read_data_yaml, read_manifest, read_soft, verify
from focusdd_det.errors import ConfigError, DataError, DiskError, WeightsError
from focusdd_det.labels import parse_rows
from focusdd_det.plan import make_plan
from focusdd_det.scoring import looking

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of three classes, a class map, a tiny ViT and a tiny teacher."""
    import timm

    top = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(3)
    for folder, count in (("disc", 14), ("square", 14), ("bar_a", 6), ("bar_b", 6)):
        (top / "sources" / folder).mkdir(parents=True)
        for i in range(count):
            picture = cv2.resize(draw(rng, 96)[0], (int(rng.integers(60, 140)), int(rng.integers(60, 140))))
            cv2.imwrite(str(top / "sources" / folder / f"{i}.jpg"), picture)
    folders = {"disc": "disc", "square": "square", "bar_a": "bar", "bar_b": "bar"}
    (top / "map.yaml").write_text(yaml.safe_dump({"names": list(NAMES), "folders": folders}))
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, top / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": ["disc", "square", "bar_a"]}
    (top / "vit.json").write_text(json.dumps({**spec, "weights": "vit.safetensors"}))
    save_detector(top / "teacher.pt", names=("bar", "other", "disc", "square"))
    return top


def options(bench: Path, out: Path, **more: Any) -> dict[str, Any]:
    base = {
        "sources": [str(bench / "sources")],
        "class_map": str(bench / "map.yaml"),
        "selector": str(bench / "vit.json"),
        "teacher": str(bench / "teacher.pt"),
        "out": str(out),
        "method": "focusdd",
        "ipc": 2,
        "image_size": 96,
        "grid": 2,
        "near_duplicate": 0,
        "conf": 0.05,
        "min_side": 1.0,
        "device": "cpu",
        "threads": 1,
    }
    return {**base, **more}


def make(bench: Path, out: Path, **more: Any) -> Path:
    build(load_config(**options(bench, out, **more)))
    return out


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "build.log.json"
    }


@pytest.fixture(scope="module")
def made(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(bench, tmp_path_factory.mktemp("made") / "set")


def test_a_set_is_what_its_records_say(made: Path) -> None:
    assert verify(made) == []
    items = list(read_manifest(made))
    assert [(i.class_name, i.index) for i in items] == [(n, k) for n in NAMES for k in range(2)]
    assert read_data_yaml(made) == list(NAMES)
    assert sorted(p.name for p in made.iterdir()) == sorted(
        ["COMPLETE", "README.md", "build.log.json", "build.yaml", "contact_sheet.jpg", "data.yaml", "gallery.html",
         "images", "labels", "manifest.jsonl", "quarantine.jsonl", "soft"]
    )  # fmt: skip
    for item in items:
        picture = cv2.imread(str(detset.part_path(made, "images", item)))
        assert picture.shape == (96, 96, 3)
        assert sorted(c.kind for c in item.cells) == ["background", "key", "key", "key"]
        soft = read_soft(detset.part_path(made, "soft", item))
        table = parse_rows(detset.part_path(made, "labels", item).read_text(), 3)
        assert len(table) == item.boxes == len(soft["conf"]) == len(soft["scores"])
        own = soft["scores"][np.arange(len(table)), table[:, 0].astype(int)]
        np.testing.assert_array_equal(own, soft["conf"])
        assert (soft["conf"] >= 0.05).all()


def test_no_source_is_used_twice(made: Path) -> None:
    used = [cell.sha256 for item in read_manifest(made) for cell in item.cells]
    assert len(used) == len(set(used)) == 24


def test_a_composite_shows_the_crops_it_names(made: Path, bench: Path) -> None:
    for item in read_manifest(made):
        whole = cv2.imread(str(detset.part_path(made, "images", item))).astype(int)
        for position, cell in enumerate(item.cells):
            source = cv2.imread(str(bench / "sources" / cell.path))
            assert (source.shape[1], source.shape[0]) == (cell.width, cell.height)
            x, y, side = cell.crop or (0, 0, 0)
            how = cv2.INTER_AREA if side >= 48 else cv2.INTER_LANCZOS4
            expected = cv2.resize(source[y : y + side, x : x + side], (48, 48), interpolation=how).astype(int)
            top, left = position // 2 * 48, position % 2 * 48
            assert np.abs(whole[top : top + 48, left : left + 48] - expected).mean() < 12  # JPEG of noise


@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 5}, {}])
def test_the_same_command_gives_the_same_bytes(made: Path, bench: Path, tmp_path: Path, change: dict[str, int]) -> None:
    assert tree(make(bench, tmp_path / "again", **change)) == tree(made)


def test_other_seeds_and_methods_give_other_sets(made: Path, bench: Path, tmp_path: Path) -> None:
    seeded = make(bench, tmp_path / "seed", seed=1)
    random = make(bench, tmp_path / "random", method="random")
    assert tree(seeded)["manifest.jsonl"] != tree(made)["manifest.jsonl"]
    kinds = {c.kind for item in read_manifest(random) for c in item.cells}
    assert kinds == {"key"}
    assert "selector: null" in (random / "build.yaml").read_text()


def test_the_best_scored_sources_become_key_patches(made: Path, bench: Path) -> None:
    """Recompute S for every source with the ViT by itself and compare with the manifest."""
    from focusdd_det.scoring.decode import decode
    from focusdd_det.scoring.glance import view_pixels
    from focusdd_det.selector import load_selector
    from focusdd_det.windows import best_windows, realism

    selector = load_selector(str(bench / "vit.json"), None)
    files = sorted((bench / "sources" / "disc").iterdir())
    views = [view_pixels(decode(f.read_bytes(), 32)[0], 32, "squash") for f in files]
    p, attention = selector(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2))
    share, _ = best_windows(attention, 3)
    score = realism(p[:, 0].numpy(), share.numpy(), 30.0)
    first = next(item for item in read_manifest(made) if item.class_name == "disc")
    keys = {Path(c.path).name for c in first.cells if c.kind == "key"}
    by_rank = [files[i].name for i in np.argsort(-score, kind="stable")]
    assert keys == set(by_rank[:3])


def test_a_class_of_two_folders_takes_from_both(made: Path) -> None:
    folders = [
        c.folder for item in read_manifest(made) if item.class_name == "bar" for c in item.cells if c.kind == "key"
    ]
    assert folders.count("bar_a") == folders.count("bar_b") == 3


def test_it_opens_in_stock_ultralytics(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils import LOGGER

    copy = shutil.copytree(made, tmp_path / "copy")  # Ultralytics writes a cache file into it
    data = check_det_dataset(str(copy / "data.yaml"))
    LOGGER.addHandler(caplog.handler)
    try:
        dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 96}), data["train"], 2, data)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert len(dataset) == 6
    assert [r.message for r in caplog.records if r.levelname != "INFO" or "removed" in r.message] == []
    assert sum(len(label["cls"]) for label in dataset.labels) == sum(i.boxes for i in read_manifest(made))


def test_a_larger_ipc_begins_like_a_smaller_one_and_can_grow_from_it(made: Path, bench: Path, tmp_path: Path) -> None:
    larger = make(bench, tmp_path / "larger", ipc=3)
    grown = make(bench, tmp_path / "grown", ipc=3, grow_from=str(made))
    assert tree(grown) == tree(larger)
    small, large = tree(made), tree(larger)
    parts = [name for name in small if name.split("/")[0] in detset.PARTS]
    assert len(parts) == 18
    assert all(large[name] == small[name] for name in parts)
    with pytest.raises(ConfigError, match=r"config\.seed"):
        make(bench, tmp_path / "other", ipc=3, seed=5, grow_from=str(made))
    with pytest.raises(ConfigError, match="no distilled set there"):
        make(bench, tmp_path / "other", ipc=3, grow_from=str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("other*"))  # nothing was begun that would stand in the way of the next command
    with pytest.raises(ConfigError, match="with grow_from="):
        make(bench, made, ipc=3)


def test_a_wrong_grow_from_leaves_a_begun_and_a_damaged_set_as_they_are(
    made: Path, bench: Path, tmp_path: Path
) -> None:
    work = tmp_path / "set.incomplete"
    shutil.copytree(made, work)
    (work / "COMPLETE").unlink()
    before = tree(work)
    wrong = {"ipc": 3, "seed": 5, "grow_from": str(made)}
    with pytest.raises(ConfigError, match=r"only a larger ipc may differ"):
        make(bench, tmp_path / "set", overwrite=True, **wrong)
    assert tree(work) == before
    damaged = make(bench, tmp_path / "damaged", **{**wrong, "grow_from": None})
    next((damaged / "images" / "train").iterdir()).unlink()
    before = tree(damaged)
    with pytest.raises(ConfigError, match=r"only a larger ipc may differ"):
        build(load_config(**options(bench, damaged, **wrong)), resume=True)
    assert tree(damaged) == before


def test_pictures_that_came_later_are_named(bench: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = shutil.copytree(bench / "sources", tmp_path / "sources")
    folder = make(bench, tmp_path / "set", sources=[str(sources)])
    before = tree(folder)
    some = next(path for path in sorted(sources.rglob("*")) if path.is_file())
    shutil.copy(some, some.with_name("later" + some.suffix))
    some.with_name("phone.HEIC").write_bytes(b"x")
    with caplog.at_level(logging.INFO, logger="focusdd"):
        make(bench, folder, sources=[str(sources)])
    assert "that are there now were not looked at" in caplog.text
    assert "1 files of formats that are not read are left out (.heic)" in caplog.text
    assert tree(folder) == before


def test_a_path_may_begin_at_home(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make(bench, Path("~/set"))
    assert verify(tmp_path / "set") == []
    assert not (tmp_path / "~").exists()


def test_scores_are_kept_for_the_next_build(
    made: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focusdd_det.selector import Selector

    calls = []
    forward = Selector.__call__
    monkeypatch.setattr(Selector, "__call__", lambda self, x: calls.append(len(x)) or forward(self, x))
    monkeypatch.setattr("focusdd_det.selector.at_once", lambda _: 8)
    store = str(tmp_path / "scores.sqlite")
    first = make(bench, tmp_path / "a", scores=store)
    assert sum(calls) == 40  # 40 sources: one batch of 64, without the parts that are padding alone
    calls.clear()
    again = make(bench, tmp_path / "b", scores=store, ipc=1, alpha=2.0)
    assert calls == []
    assert tree(first) == tree(made)
    assert len(list(read_manifest(again))) == 3


@pytest.mark.parametrize("loader", ["threads", "processes"])
def test_moved_pictures_and_another_map_cost_no_pass_of_the_vit(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    """And give what a build gives that looks at all of them anew."""
    from focusdd_det.selector import Selector

    store = str(tmp_path / "scores.sqlite")
    make(bench, tmp_path / "first", scores=store)
    moved = tmp_path / "moved"
    for folder in ("disc", "square", "bar_a", "bar_b"):
        for path in (bench / "sources" / folder).iterdir():
            (moved / f"my {folder}").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, moved / f"my {folder}" / f"x{path.name}")
    folders = {"my disc": "disc", "my square": "square", "my bar_a": "square", "my bar_b": "bar"}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({"names": list(NAMES), "folders": folders}))
    changed = {"sources": [str(moved)], "class_map": str(tmp_path / "map.yaml"), "loader": loader}
    expected = make(bench, tmp_path / "a" / "set", **changed)

    def no_pass(*_: object) -> None:
        raise AssertionError("the ViT was asked again")

    monkeypatch.setattr(Selector, "__call__", no_pass)
    assert tree(make(bench, tmp_path / "b" / "set", scores=store, **changed)) == tree(expected)
    make(bench, tmp_path / "c", scores=store, confidence="max", **changed)
    make(bench, tmp_path / "d", scores=store, class_map=str(bench / "map.yaml"), confidence="max", loader=loader)
    with pytest.raises(AssertionError):  # another way of looking is another score
        make(bench, tmp_path / "e", scores=store, geometry="crop", **changed)


@pytest.mark.parametrize("loader", ["threads", "processes"])
def test_batches_are_full_across_classes(
    bench: Path, tmp_path: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 + 14 + 12 sources in batches of 16."""
    seen: list[list[str]] = []
    real = looking.Looker.__call__

    def noted(self: Any, batch: Any, pixels: Any) -> Any:
        assert len(pixels) == 16
        seen.append([located.source.group for located, _ in batch])
        return real(self, batch, pixels)

    monkeypatch.setattr(looking.Looker, "__call__", noted)
    make(bench, tmp_path / "set", batch=16, loader=loader, screen="off")
    assert [len(groups) for groups in seen] == [16, 16, 8]
    assert [len(set(groups)) for groups in seen] == [2, 2, 1]


def test_a_set_records_the_precision_that_was_used(bench: Path, tmp_path: Path, made: Path) -> None:
    from focusdd_det.selector import precision_of

    assert precision_of("bf16", "cuda") == "bf16"
    assert precision_of("auto", "cuda") == "fp16"
    precision = precision_of("auto", "cpu")
    assert precision in ("fp32", "bf16")
    folder = make(bench, tmp_path / "set", precision="auto")
    assert yaml.safe_load((folder / "build.yaml").read_text())["config"]["precision"] == precision
    assert tree(folder) == tree(make(bench, tmp_path / "again" / "set", precision=precision))


def test_labels_carried_from_sources(bench: Path, tmp_path: Path) -> None:
    folder = make(bench, tmp_path / "carried", label_on="source")
    assert verify(folder) == []
    assert sum(item.boxes for item in read_manifest(folder)) > 0


@pytest.mark.parametrize(("grid", "n_key", "size"), [(1, 1, 96), (3, 7, 96), (2, 0, 96), (3, 5, 100)])
def test_other_grids(bench: Path, tmp_path: Path, grid: int, n_key: int, size: int) -> None:
    folder = make(bench, tmp_path / "g", grid=grid, n_key=n_key, image_size=size, ipc=1, classes=["disc"])
    items = list(read_manifest(folder))
    assert [sum(c.kind == "key" for c in i.cells) for i in items] == [n_key]
    assert [len(i.cells) for i in items] == [grid**2]
    assert cv2.imread(str(detset.part_path(folder, "images", items[0]))).shape == (size, size, 3)


def test_composites_of_several_grids_can_be_grown(bench: Path, tmp_path: Path) -> None:
    small = make(bench, tmp_path / "small", grids=[1, 2], ipc=2)
    large = make(bench, tmp_path / "large", grids=[1, 2], ipc=4, grow_from=str(small))
    assert verify(large) == []
    items = list(read_manifest(large))
    assert {item.grid for item in items} == {1, 2}
    assert [sum(c.kind == "key" for c in i.cells) for i in items] == [{1: 1, 2: 3}[i.grid] for i in items]
    assert {i.line() for i in read_manifest(small)} < {i.line() for i in items}
    card = (large / "README.md").read_text()
    assert "composites of 1 x 1 or 2 x 2 cells" in card


def test_labels_guided_by_the_known_class(bench: Path, made: Path, tmp_path: Path) -> None:
    guided = make(bench, tmp_path / "guided", own_conf=0.02, contradiction="correct")
    assert verify(guided) == []
    plain = {(i.group, i.proposal): i for i in read_manifest(made)}
    own = other = 0
    for item in read_manifest(guided):
        before = plain.get((item.group, item.proposal))
        if before is None:
            continue
        tables = [
            parse_rows(detset.part_path(folder, "labels", i).read_text(), 3)
            for folder, i in ((guided, item), (made, before))
        ]
        mine, theirs = (int((table[:, 0] == item.class_index).sum()) for table in tables)
        assert mine >= theirs
        own += mine - theirs
        other += len(tables[1]) - theirs - (len(tables[0]) - mine)
        soft = read_soft(detset.part_path(guided, "soft", item))
        np.testing.assert_allclose(
            soft["conf"], soft["scores"][np.arange(len(tables[0])), tables[0][:, 0].astype(int)], atol=1e-3
        )
    assert own > 0
    assert other >= 0


def test_letterboxed_backgrounds_and_the_papers_order(bench: Path, tmp_path: Path) -> None:
    folder = make(bench, tmp_path / "l", background="letterbox", selection="paper", label_on="source")
    assert [c.crop for i in read_manifest(folder) for c in i.cells if c.kind == "background"] == [None] * 6
    assert verify(folder) == []


def test_imagenet_ipc_counts_folders(bench: Path, tmp_path: Path) -> None:
    folder = make(bench, tmp_path / "i", ipc_unit="imagenet", ipc=1)
    assert [(i.group, i.class_name) for i in read_manifest(folder)] == [
        ("disc", "disc"), ("square", "square"), ("bar_a", "bar"), ("bar_b", "bar")
    ]  # fmt: skip


def test_archives_give_the_same_pictures_as_folders(made: Path, bench: Path, tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    for folder in (bench / "sources").iterdir():
        with tarfile.open(tmp_path / "sources" / f"{folder.name}.tar", "w") as archive:
            for file in folder.iterdir():
                archive.add(file, file.name)
    packed = make(bench, tmp_path / "packed", sources=[str(tmp_path / "sources")])
    images = lambda where: {k: v for k, v in tree(where).items() if k.startswith("images")}  # noqa: E731
    assert images(packed) == images(made)


def test_a_teacher_that_finds_nothing(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing in any"):
        make(bench, tmp_path / "none", conf=0.9999)
    kept = make(bench, tmp_path / "kept", conf=0.9999, empty="keep")
    assert [item.boxes for item in read_manifest(kept)] == [0] * 6
    assert all(detset.part_path(kept, "labels", i).read_bytes() == b"" for i in read_manifest(kept))
    assert verify(kept) == []


def test_what_a_plan_says_before_anything_is_done(bench: Path, tmp_path: Path) -> None:
    plan = make_plan(load_config(**options(bench, tmp_path / "x", ipc=3)))
    assert (plan.sources, plan.composites, plan.covered) == (40, 9, NAMES)
    short = make_plan(load_config(**options(bench, tmp_path / "x", ipc=4)))
    assert short.short == {"disc": (3, 4), "square": (3, 4), "bar": (3, 4)}
    assert short.composites == 9
    assert make_plan(load_config(**options(bench, tmp_path / "x", ipc=4, short_class="reuse"))).composites == 12
    with pytest.raises(DataError, match="bar \\(3 of 4\\), disc \\(3 of 4\\)"):
        make_plan(load_config(**options(bench, tmp_path / "x", ipc=4, short_class="error")))
    with pytest.raises(DataError, match="no class has the 4 sources"):
        make_plan(load_config(**options(bench, tmp_path / "x", ipc=4, short_class="skip")))


def test_a_dry_run_writes_nothing(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"{k}={v if not isinstance(v, list) else v[0]}" for k, v in options(bench, tmp_path / "dry").items()]
    assert run_main(build_command, [*argv, "--dry-run"]) == 0
    assert "3 classes, 40 sources, 6 composites planned" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"sources": []}, 2, "no sources"),
        ({"method": "rnadom"}, 2, "did you mean random"),
        ({"classes": ["disk"]}, 2, "did you mean disc"),
        ({"class_map": "absent.yaml"}, 3, "no class map"),
        ({"teacher": "absent.pt"}, 4, "absent.pt"),
        ({"selector": "resnet18"}, 4, "resnet18"),
        ({"ipc": 0}, 2, "ipc=0"),
    ],
)
def test_wrong_commands_end_with_their_exit_code(
    bench: Path, tmp_path: Path, change: dict[str, Any], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        f"{k}={json.dumps(v) if isinstance(v, list) else v}"
        for k, v in options(bench, tmp_path / "o", **change).items()
    ]
    assert main(["build", *argv]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_ours_are_left_alone(bench: Path, tmp_path: Path) -> None:
    for name in ("set", "other.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "holiday.jpg").write_bytes(b"mine")
    for out in ("set", "other"):
        for overwrite in (False, True):
            with pytest.raises(DiskError, match=r"not a (set|build) of this program"):
                make(bench, tmp_path / out, overwrite=overwrite)
    assert (tmp_path / "set" / "holiday.jpg").read_bytes() == b"mine"
    assert (tmp_path / "other.incomplete" / "holiday.jpg").read_bytes() == b"mine"


def test_a_set_is_replaced_only_when_asked_and_only_by_a_whole_one(bench: Path, tmp_path: Path) -> None:
    first = make(bench, tmp_path / "set", ipc=1)
    before = tree(first)
    make(bench, tmp_path / "set", ipc=1)  # the same: nothing to do
    with pytest.raises(ConfigError, match=r"config\.ipc: 1 there, 2 asked for"):
        make(bench, tmp_path / "set", ipc=2)
    with pytest.raises(WeightsError):
        make(bench, tmp_path / "set", ipc=2, overwrite=True, teacher=str(bench / "map.yaml"))
    assert tree(first) == before
    assert len(list(read_manifest(make(bench, tmp_path / "set", ipc=2, overwrite=True)))) == 6


def test_a_teacher_that_lacks_a_class_is_refused_with_both_lists(bench: Path, tmp_path: Path) -> None:
    save_detector(tmp_path / "small.pt", names=("disc", "square"))
    with pytest.raises(WeightsError) as caught:
        make(bench, tmp_path / "set", teacher=str(tmp_path / "small.pt"))
    assert "bar" in str(caught.value)
    assert "disc, square" in str(caught.value)


def test_the_card_tells_what_happened(made: Path) -> None:
    card = (made / "README.md").read_text()
    items = list(read_manifest(made))
    assert f"boxes: {sum(i.boxes for i in items)}," in card
    assert "40 usable, 0 quarantined" in card
    keys = [c for i in items for c in i.cells if c.kind == "key"]
    assert f"{sum(c.confirmed for c in keys)} of {len(keys)}" in card


def test_the_commands_of_a_set(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made)]) == 0
    assert "6 composites, intact" in capsys.readouterr().out
    assert main(["sheet", str(made), f"out={tmp_path / 's.jpg'}", "count=4", "columns=2"]) == 0
    assert cv2.imread(str(tmp_path / "s.jpg")).shape == (640, 640, 3)
    assert main(["biuld"]) == 2
    assert "did you mean build" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["build", "--help"]) == 0
    assert "composites per class" in capsys.readouterr().out


def test_a_real_set(assets: Path, tmp_path: Path) -> None:
    """Photographs, DeiT-Tiny and YOLO11n: the teacher confirms most key patches of four classes."""
    folder = tmp_path / "real"
    build(
        load_config(
            sources=[str(assets / "data" / "imagenet_mini" / "images")],
            method="focusdd",
            classes=["bird", "cat", "zebra", "banana"],
            ipc=1,
            out=str(folder),
            selector="deit_tiny_patch16_224",
            selector_weights=str(assets / "weights" / "deit_tiny_patch16_224.in1k.safetensors"),
            teacher=str(assets / "weights" / "yolo11n.pt"),
            view=112,
            device="cpu",
        )
    )
    assert verify(folder) == []
    keys = [c for i in read_manifest(folder) for c in i.cells if c.kind == "key"]
    assert len(keys) == 12
    assert sum(c.confirmed for c in keys) >= 8


def test_carried_boxes_by_hand() -> None:
    """label_on=source: a key patch in the upper left cell and a letterboxed background in the lower right one."""
    from focusdd_det.detset import Cell
    from focusdd_det.labelling import Look, TeacherBoxes
    from focusdd_det.types import Detections

    def cell(kind: str, crop: tuple[int, int, int] | None) -> Cell:
        return Cell(kind, "r", "p", "f", "0" * 64, 200, 100, crop, 0.5, 0.5, False)

    def seen(*box: float) -> Detections:
        return Detections(
            np.array([box], np.float32), np.zeros(1, np.int64), np.ones(1, np.float32), np.ones((1, 3), np.float32)
        )

    cells = (cell("key", (100, 0, 50)), cell("key", (0, 0, 100)), cell("key", (0, 0, 100)), cell("background", None))
    # 200 x 100 px shown to the teacher in 100 x 100: half size, 25 px of border above
    look = Look(np.zeros((100, 100, 3), np.uint8), 0.5, 0, 25)
    nothing = Detections.none(3)
    # On the source both boxes are 110..140 x 10..30.
    found = [seen(55, 30, 70, 40), nothing, nothing, seen(55, 30, 70, 40)]
    squares = [(0.0, 0.0, 100.0), (100.0, 0.0, 100.0), (0.0, 100.0, 100.0), (100.0, 100.0, 100.0)]
    config = load_config(label_on="source", image_size=200, sources=["x"])
    joined = TeacherBoxes(config, None, 3)._carried([look] * 4, cells, found, squares)
    # Key: (110 - 100) * 2 = 20 .. 80, 20 .. 60. Background: scale 0.5, border 25: 100 + 55 .. 170, 100 + 25 + 5 .. 140.
    np.testing.assert_allclose(joined.boxes, [[20, 20, 80, 60], [155, 130, 170, 140]], atol=1e-4)


def test_random_crops_are_as_large_as_key_patches(made: Path, bench: Path, tmp_path: Path) -> None:
    random = make(bench, tmp_path / "random", method="random", ipc=3)

    def by_size(folder: Path) -> dict[tuple[int, int], set[int]]:
        sides: dict[tuple[int, int], set[int]] = {}
        for item in read_manifest(folder):
            for c in item.cells:
                if c.kind == "key" and c.crop:
                    sides.setdefault((c.width, c.height), set()).add(c.crop[2])
                    assert c.crop[0] + c.crop[2] <= c.width
                    assert c.crop[1] + c.crop[2] <= c.height
        return sides

    ours, theirs = by_size(made), by_size(random)
    both = set(ours) & set(theirs)
    assert len(both) >= 5
    assert all(ours[size] == theirs[size] for size in both)


def test_the_contact_sheet_reaches_the_end_of_the_set(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from focusdd_det import report

    drawn: list[str] = []
    monkeypatch.setattr(
        report, "draw_item", lambda folder, item, names, side: drawn.append(item.id) or np.zeros((4, 4, 3), np.uint8)
    )
    items = list(read_manifest(made))
    report.contact_sheet(made, items, NAMES, count=4)
    assert drawn == [items[i].id for i in (0, 2, 3, 5)]


@pytest.mark.parametrize("options", [["count=abc"], ["count=0"], ["columns=-1"], ["counts=3"]])
def test_a_sheet_that_cannot_be(made: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sheet", str(made), *options]) == 2
    assert "sheet" in capsys.readouterr().err


def test_a_set_from_another_place_is_named(bench: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging
    import shutil

    make(bench, tmp_path / "set", ipc=1)
    moved = shutil.copytree(bench / "sources", tmp_path / "elsewhere" / "sources")
    logger = logging.getLogger("focusdd")
    logger.addHandler(caplog.handler)
    try:
        make(bench, tmp_path / "set", ipc=1, sources=[str(moved)])
    finally:
        logger.removeHandler(caplog.handler)
    assert f"not from {{'sources': '{moved}'}}" in caplog.text


def test_one_folder_of_two_classes_with_imagenet_ipc(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("disc: bar\n")
    sources = [str(bench / "sources"), f"{bench / 'sources'}::{tmp_path / 'own.yaml'}"]
    with pytest.raises(DataError, match="the folder disc stands for two classes"):
        make(bench, tmp_path / "set", sources=sources, ipc_unit="imagenet", ipc=1)
