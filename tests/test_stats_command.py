"""`focusdd stats`: sets in, a table, stats.json and pictures out; what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cls_support
import cv2
import numpy as np
import pytest
import torch
from class_data import CLASSES, write_class_set, write_teacher
from conftest import NAMES, draw, save_detector, write_coco
from interop_support import rename_classes
from PIL import Image as PILImage
from safetensors.torch import save_file

from focusdd_det import detset, disk
from focusdd_det.cli import main
from focusdd_det.stats.command import short_names
from focusdd_det.stats.curves import read_run
from focusdd_det.types import Detections


def boxed_set(folder: Path, count: int = 6, seed: int = 0, copies: bool = False) -> Path:
    """A detection set with soft targets and cells; with `copies` its last picture repeats the first, sources too."""
    rng = np.random.default_rng(seed)
    for part in detset.PARTS:
        (folder / part / "train").mkdir(parents=True)
    lines = []
    first: tuple[bytes, list[Any]] | None = None
    for i in range(count):
        image, rows = draw(rng, 64)
        jpeg = bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
        first = first or (jpeg, rows)
        again = copies and i == count - 1
        if again:
            jpeg, rows = first
        n = len(rows)
        conf = np.linspace(0.3, 0.9, n).astype(np.float32)
        boxes, classes = np.zeros((n, 4), np.float32), np.zeros(n, np.int64)
        soft = detset.soft_bytes(Detections(boxes, classes, conf, np.zeros((n, 3), np.float32)))
        labels = "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows).encode()
        files = {"images": jpeg, "labels": labels, "soft": soft}
        cells = tuple(
            detset.Cell("key", "r", f"a/{s}.jpg", "a", f"{s:064x}", 64, 64, (0, 0, 32), 0.5, 0.5, True)
            for s in (range(4) if again else range(4 * i, 4 * i + 4))
        )
        name = NAMES[i % 2]  # nothing is made for the third class
        hashes = {part: disk.sha256(data) for part, data in files.items()}
        item = detset.Item(f"{name}-{i:04d}", name, i % 2, name, i, i, i, cells, n, hashes)
        for part, data in files.items():
            detset.part_path(folder, part, item).write_bytes(data)
        lines.append(item.line())
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "data.yaml").write_bytes(detset.data_yaml(NAMES))
    (folder / "build.yaml").write_text("format: focusdd_det set\nconfig: {grid: 2, method: random}\n")
    (folder / "README.md").write_text("a set for tests\n")
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return boxed_set(tmp_path / "one"), boxed_set(tmp_path / "two", count=8, seed=5, copies=True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pictures, which take most of the time, where only numbers are looked at."""
    monkeypatch.setattr("focusdd_det.stats.plots.figures", lambda *_: {})


def told(out: Path) -> Any:
    return json.loads((out / "stats.json").read_text())


def test_two_sets_beside_each_other(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "both"
    assert main(["stats", str(sets[0]), str(sets[1]), f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "| | one | two | COCO (177 pictures) |" in printed
    assert "our reading" in printed and "177 pictures of COCO val2017" in printed
    expected = {"stats.json", "stats.md", "overview.png", "box_sizes.png", "boxes_per_image.png"}
    assert expected | {"class_counts.png", "confidence.png", "snr.png"} == {path.name for path in out.iterdir()}
    for path in out.glob("*.png"):
        with PILImage.open(path) as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 20, path
    one, two = told(out)["sets"]
    assert (one["images"], one["classes"], one["classes_with_images"], one["method"]) == (6, 3, 2, "random")
    assert one["images_per_class"] == {"disc": 3, "square": 3}
    rows = [line for path in (sets[0] / "labels" / "train").iterdir() for line in path.read_text().splitlines()]
    assert one["boxes"]["count"] == len(rows) == sum(one["boxes"]["per_class"].values())
    sizes = [float(np.sqrt(float(row.split()[3]) * float(row.split()[4]))) for row in rows]
    assert one["boxes"]["relative_size"]["percentiles"][2] == pytest.approx(np.median(sizes), abs=1e-3)
    assert one["boxes"]["small_medium_large"][2] == 0  # boxes of 64 px pictures are small or medium
    assert one["boxes"]["confidence"]["mean"] == pytest.approx(0.6, abs=1e-3)
    assert one["near_duplicates"]["pairs"] == 0 and one["cells_repeating_a_source"] == 0 and one["cells"] == 24
    assert two["near_duplicates"]["nearest"] == [["disc-0000", "square-0007", 0]]
    assert (two["cells_repeating_a_source"], two["cells"]) == (4, 32)
    assert one["diversity"] is None and told(out)["reference"]["pictures"] == 177


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_gives_the_same_numbers(sets: tuple[Path, Path], tmp_path: Path) -> None:
    for workers in (1, 3):
        assert main(["stats", str(sets[0]), f"out={tmp_path / str(workers)}", f"workers={workers}"]) == 0
    assert (tmp_path / "1" / "stats.json").read_bytes() == (tmp_path / "3" / "stats.json").read_bytes()
    assert detset.verify(sets[0]) == []  # nothing was left in the set


@pytest.mark.usefixtures("undrawn")
def test_a_reference_of_one_s_own_and_none(sets: tuple[Path, Path], tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    reference = tmp_path / "coco" / "annotations" / "instances_val.json"
    assert main(["stats", str(sets[0]), f"out={tmp_path / 'a'}", f"reference={reference}"]) == 0
    assert told(tmp_path / "a")["reference"]["name"] == "instances_val"
    assert 0 < told(tmp_path / "a")["sets"][0]["boxes"]["sizes_in_common_with_reference"] <= 1
    assert main(["stats", str(sets[0]), f"out={tmp_path / 'b'}", "reference=none"]) == 0
    assert told(tmp_path / "b")["reference"] is None


def test_a_classification_set_has_no_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_class_set(tmp_path / "cls", count=7)
    assert main(["stats", str(folder), f"out={tmp_path / 'out'}"]) == 0
    found = told(tmp_path / "out")["sets"][0]
    assert found["boxes"] is None and found["images_per_class"] == {"n03": 3, "n01": 2, "n02": 2}
    assert found["snr_db"]["mean"] > 0
    printed = capsys.readouterr().out
    assert "COCO" not in printed and "boxes" not in printed
    assert not (tmp_path / "out" / "box_sizes.png").exists() and (tmp_path / "out" / "class_counts.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_detection_and_classification_sets_share_a_table(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "cls")
    assert main(["stats", str(sets[0]), str(folder), f"out={tmp_path / 'out'}"]) == 0
    table = (tmp_path / "out" / "stats.md").read_text()
    assert "| boxes | " in table and "| task, method | detect, random | classify, unknown | - |" in table


@pytest.mark.usefixtures("undrawn")
def test_diversity_by_a_vit(sets: tuple[Path, Path], tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": list("abc"), "weights": "vit.safetensors"}
    (tmp_path / "vit.json").write_text(json.dumps(spec))
    out = tmp_path / "out"
    assert main(["stats", str(sets[1]), f"out={out}", f"features={tmp_path / 'vit.json'}"]) == 0
    found = told(out)["sets"][0]["diversity"]
    assert found["pairs"] == 28 and found["euclidean"] > 0 and 0 < found["cosine_in_class"] <= 2

    # the same by hand: pooled features of the composites, shrunk to the view
    features = []
    for path in sorted((sets[1] / "images" / "train").iterdir(), key=lambda p: p.stem.split("-")[1]):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        x = torch.from_numpy(cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)).permute(2, 0, 1) / 255
        x = (x - 0.5) / 0.5
        with torch.inference_mode():
            features.append(model.eval().forward_head(model.forward_features(x[None]), pre_logits=True)[0])
    distances = torch.pdist(torch.stack(features))
    assert found["euclidean"] == pytest.approx(float(distances.mean()), rel=1e-3)
    assert found["squared"] == pytest.approx(float(distances.square().mean()), rel=1e-3)


# --- curves


def write_run(folder: Path, head: str, *rows: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


DETECT = "epoch,time,train/box_loss,train/cls_loss,metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss"
CLASSIFY = "epoch,time,train/ce,metrics/accuracy_top1,metrics/accuracy_top5,val/ce"


def test_curves_of_both_kinds_of_runs(tmp_path: Path) -> None:
    detect = read_run(write_run(tmp_path / "d", DETECT, "1,3,2.0,1.5,0,0,0", "2,6,1.0,0.5,0.4,0.25,2"), "d")
    assert detect.total == ((1, 3.5), (2, 1.5)) and set(detect.losses) == {"box_loss", "cls_loss"}
    assert detect.score == ((2, 0.25),) and detect.score_name == "mAP50-95"  # epoch 1 was not validated
    classify = read_run(write_run(tmp_path / "c", CLASSIFY, "1,3,2.0,nan,nan,nan", "2,6,1.0,0.5,1,1.2"), "c")
    assert classify.total == ((1, 2.0), (2, 1.0)) and classify.score == ((2, 0.5),)


def test_an_epoch_that_a_resumed_run_wrote_twice_counts_once(tmp_path: Path) -> None:
    rows = ("1,3,2.0,1.0,0,0,0", "2,6,1.5,1.2,0,0,0", "2,7,1.5,1.0,0.4,0.2,1", "3,9,1.0,1.0,0,0,0")
    found = read_run(write_run(tmp_path / "d", DETECT, *rows), "d")
    assert (found.total, found.score) == (((1, 3.0), (2, 2.5), (3, 2.0)), ((2, 0.2),))


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    """Not as formulas, which may not even be one; and a legend leaves out what begins with _."""
    folder = rename_classes(write_class_set(tmp_path / "_set", names=("a", "b")), ("a $_$ b", "$5 and $10"))
    (tmp_path / "_set$x^$").mkdir()
    other = write_class_set(tmp_path / "_set$x^$" / "in", names=("a", "b"))
    out = tmp_path / "out"
    assert main(["stats", str(folder), str(other), "reference=none", f"out={out}"]) == 0
    assert (out / "class_counts.png").is_file()


def test_a_table_of_somebody_else_s_is_not_replaced(sets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stats.md").write_text("my notes")
    assert main(["stats", str(sets[0]), f"out={tmp_path / 'mine'}"]) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["stats.md"]


def test_a_reference_without_sizes_of_pictures_is_told(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [row],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "min.json").write_text(json.dumps(content))
    assert main(["stats", str(sets[0]), f"reference={tmp_path / 'min.json'}", f"out={tmp_path / 'out'}"]) == 3
    assert "image 5 has no width and height" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_curves_are_drawn_beside_the_statistics(sets: tuple[Path, Path], tmp_path: Path) -> None:
    a = write_run(tmp_path / "runs" / "a", DETECT, "1,3,2.0,1.5,0,0,0", "2,6,1.0,0.5,0.4,0.25,2")
    b = write_run(tmp_path / "runs" / "b", CLASSIFY, "1,3,2.0,nan,nan,nan", "2,6,1.0,0.5,1,1.2")
    out = tmp_path / "out"
    assert main(["stats", str(sets[0]), f"out={out}", "--curves", f"run={a}", f"run={b}"]) == 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [run["name"] for run in told(out)["curves"]] == ["a", "b"]


def test_a_real_run_s_table_can_be_read(tmp_path: Path) -> None:
    data = cls_support.make_pictures(tmp_path / "data")
    cls_support.train(tmp_path, data, epochs=2)
    found = read_run(tmp_path / "runs" / "run", "run")
    assert [epoch for epoch, _ in found.total] == [1, 2] and found.score_name == "Accuracy (top-1)"
    assert 0 <= found.score[-1][1] <= 1


# --- Hessian


@pytest.mark.usefixtures("undrawn")
def test_the_hessian_of_a_classifier_on_its_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_class_set(tmp_path / "cls", count=5)
    weights = write_teacher(tmp_path / "last")
    command = ["stats", str(folder), "--hessian", f"weights={weights}", "probes=3"]
    assert main([*command, f"out={tmp_path / 'a'}", "batch=2"]) == 0
    assert "Hessian trace" in capsys.readouterr().out
    assert main([*command, f"out={tmp_path / 'b'}", "batch=5"]) == 0
    a, b = (told(tmp_path / name)["hessian"][0] for name in "ab")
    assert len(a["probes"]) == 3 and a["standard_error"] > 0 and a["pictures"] == 5 and a["size"] == 32
    assert np.allclose(a["probes"], b["probes"], rtol=0.01, atol=1e-2 * max(map(abs, a["probes"])))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_the_order_of_a_checkpoint_s_classes_does_not_matter(tmp_path: Path) -> None:
    from class_data import tiny_net, write_shuffled_teacher

    folder = write_class_set(tmp_path / "cls", count=5)
    plain = write_teacher(tmp_path / "plain")
    shuffled = write_shuffled_teacher(tmp_path / "shuffled", tiny_net(len(CLASSES)), CLASSES, [2, 0, 1])
    found = []
    for weights in (plain, shuffled):
        out = tmp_path / weights.stem
        out.mkdir()
        assert main(["stats", str(folder), "--hessian", f"weights={weights}", "probes=1", f"out={out}"]) == 0
        found.append(told(out)["hessian"][0])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["accuracy_on_the_set"] == found[1]["accuracy_on_the_set"]


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_class_set(tmp_path / "cls", count=4)
    weights = write_teacher(tmp_path / "last", names=("n01", "n02", "n99"))
    assert main(["stats", str(folder), "--hessian", f"weights={weights}", f"out={tmp_path / 'out'}"]) == 4
    assert "lacking: n03" in capsys.readouterr().err
    assert main(["stats", str(folder), "--hessian", "weights=last.pt", f"out={tmp_path / 'out'}"]) == 2
    assert "nothing goes with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def detector(path: Path, names: tuple[str, ...] = NAMES, **train_args: Any) -> Path:
    """A tiny detector, untrained, as a run at 64 px would have saved it."""
    save_detector(path, names=names)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["train_args"] = {"imgsz": 64, "box": 7.5, "cls": 0.5, "dfl": 1.5, **train_args}
    torch.save(checkpoint, path)
    return path


@pytest.mark.usefixtures("undrawn")
def test_the_hessian_of_a_detector_on_its_set(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = detector(tmp_path / "last.pt")
    command = ["stats", str(sets[0]), "--hessian", f"weights={weights}", "probes=2"]
    assert main([*command, f"out={tmp_path / 'a'}"]) == 0
    assert "detection loss on the set's boxes" in capsys.readouterr().out
    (found,) = told(tmp_path / "a")["hessian"]
    assert found["size"] == 64 and found["pictures"] == 6 and "accuracy_on_the_set" not in found
    assert len(set(found["probes"])) == 2 and found["standard_error"] > 0


@pytest.mark.usefixtures("undrawn")
def test_the_hessian_of_a_detector_is_that_of_its_gradient(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Against the gradient a small step to either side, with the assignment held. Without the box term, whose weight
    alpha moves with the boxes."""
    from ultralytics.utils.tal import TaskAlignedAssigner

    from focusdd_det.stats import curvature_det, hessian

    weights = detector(tmp_path / "last.pt", box=0.0)
    found = curvature_det.of_detector(weights, sets[0], probes=1, seed=0, device="cpu")
    model, size = curvature_det._load(weights)
    model.double().model[-1].training = True
    criterion = model.init_criterion()
    held: list[Any] = []
    assigner = TaskAlignedAssigner.forward
    items = list(detset.read_manifest(sets[0]))
    batches = [batch for batch, _ in curvature_det._pictures(sets[0], items, range(3), size, "cpu")]
    parameters = [p.requires_grad_(".dfl." not in name) for name, p in model.named_parameters() if ".dfl." not in name]

    def gradient() -> list[torch.Tensor]:
        at = iter(held)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(held) < len(batches):
                held.append(assigner(self, *args, **kwargs))
                return held[-1]
            return next(at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskAlignedAssigner, "forward", forward)
            losses = [criterion(model(batch["img"].double()), batch)[0].sum() for batch in batches]
        mean = torch.stack(losses).mean()
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, torch.autograd.grad(mean, parameters, allow_unused=True), strict=True)
        ]

    gradient()  # holds the assignment
    signs = hessian._signs(parameters, 0, 0)
    step = 1e-5
    sides = []
    for way in (step, -2 * step):
        with torch.no_grad():
            for p, v in zip(parameters, signs, strict=True):
                p += way * v
        sides.append(gradient())
    estimate = sum(float((v * (a - b)).sum()) for v, a, b in zip(signs, *sides, strict=True)) / (2 * step)
    assert found.trace.probes[0] == pytest.approx(estimate, rel=0.01)


@pytest.mark.usefixtures("undrawn")
def test_sets_and_weights_of_both_kinds_are_paired(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "cls", count=4)
    both = [f"weights={detector(tmp_path / 'last.pt')}", f"weights={write_teacher(tmp_path / 'last')}"]
    out = tmp_path / "out"
    assert main(["stats", str(sets[0]), str(folder), "--hessian", *both, "probes=1", f"out={out}"]) == 0
    assert [row["set"] for row in told(out)["hessian"]] == ["one", "cls"]
    assert main(["stats", str(sets[0]), str(folder), "--hessian", both[0], "probes=1", f"out={out}"]) == 2


def test_a_detector_of_other_classes_is_refused(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights, message in (
        (detector(tmp_path / "other.pt", ("disc", "square", "pear")), "lacks 1 of the 3 of"),
        (detector(tmp_path / "odd.pt", imgsz=50), "imgsz=50; expected a multiple of 32"),
        (detector(tmp_path / "text.pt", cls="much"), "cls are no numbers"),
    ):
        assert main(["stats", str(sets[0]), "--hessian", f"weights={weights}", f"out={tmp_path / 'out'}"]) == 4
        assert message in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["one", "outt=x"], 2, "unknown option `outt`, did you mean out"),
        (["out=x"], 2, "no set: give the folders"),
        (["one", "--curves"], 2, "--curves needs run=FOLDER"),
        (["one", "--hessian"], 2, "--hessian needs weights=last.pt"),
        (["one", "weights=x.json"], 2, "weights= goes with --hessian"),
        (["one", "probes=0"], 2, "probes=0: expected a whole number from 1 on"),
        (["one", "selector_weights=x"], 2, "goes with features=NAME"),
        (["one", "one"], 2, "given twice"),
        (["nowhere"], 3, "no such folder"),
        (["."], 3, "is no distilled set"),
        (["one", "out=one/stats"], 2, "lies in the set"),
        (["one", "out=one"], 2, "lies in the set"),
        (["one", "run=nowhere"], 3, "results.csv"),
        (["one", "reference=nowhere.json"], 3, "annotations not found"),
        (["one", "features=no_such_vit", "selector_weights=x"], 4, "timm has no such model"),
    ],
)
def test_bad_commands_name_the_way_out(
    tokens: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    boxed_set(tmp_path / "one", count=2)
    monkeypatch.chdir(tmp_path)
    assert main(["stats", *tokens]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "stats").exists() and detset.verify(tmp_path / "one") == []


@pytest.mark.parametrize("part", ["images", "labels", "soft"])
def test_a_damaged_set_is_named_by_its_file(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = boxed_set(tmp_path / "one", count=3)
    path = sorted((folder / part / "train").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-2] + b"00")
    assert main(["stats", str(folder), f"out={tmp_path / 'out'}"]) == 6
    assert path.name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_set_that_is_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = boxed_set(tmp_path / "one", count=3)
    (folder / "COMPLETE").unlink()
    assert main(["stats", str(folder), f"out={tmp_path / 'out'}"]) == 6
    assert "is not finished" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_a_disk_error(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["stats", str(sets[0]), f"out={tmp_path / 'file'}"]) == 2
    assert main(["stats", str(sets[0]), f"out={tmp_path / 'file' / 'deeper'}"]) == 5
    assert (tmp_path / "file").read_text() == "mine"


def test_help_has_examples_and_says_whose_formula_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--help"]) == 0
    text = capsys.readouterr().out
    assert "focusdd stats datasets/focusdd --curves" in text and "our reading" in text


def test_sets_of_one_name_are_told_apart() -> None:
    assert short_names([Path("a/focusdd"), Path("b/focusdd")]) == ["a/focusdd", "b/focusdd"]
    assert short_names([Path("a/x"), Path("b/y")]) == ["x", "y"]


def test_pictures_are_not_kept(sets: tuple[Path, Path]) -> None:
    from focusdd_det.stats.collect import read_set

    facts = read_set(sets[0], "one")
    arrays = [getattr(facts, field.name) for field in dataclasses.fields(facts)]
    assert (
        sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) < 6 * 64 * 64
    )  # less than the pixels of one colour
