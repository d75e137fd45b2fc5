"""Shared by all tests: no network, no user configuration, tiny models and sets made on the spot."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read by Ultralytics and huggingface_hub when they are imported, so set before.
_CONFIG = tempfile.mkdtemp(prefix="focusdd-tests-")
atexit.register(shutil.rmtree, _CONFIG, ignore_errors=True)
os.environ.update(
    YOLO_OFFLINE="true",
    YOLO_AUTOINSTALL="false",
    YOLO_CONFIG_DIR=_CONFIG,
    MPLCONFIGDIR=os.path.join(_CONFIG, "matplotlib"),  # noqa: PTH118
    HF_HUB_OFFLINE="1",
    NO_ALBUMENTATIONS_UPDATE="1",
    MPLBACKEND="Agg",
)
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: more threads only wait for each other
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import focusdd_det  # noqa: E402, F401  (first: repairs torchvision where it has to)

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("disc", "square", "bar")


def _matplotlib_font() -> None:
    from matplotlib import font_manager

    folder = Path(_CONFIG) / "Ultralytics"
    folder.mkdir(exist_ok=True)
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        shutil.copyfile(font_manager.findfont("DejaVu Sans"), folder / name)


_matplotlib_font()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """A test that reaches for the network fails; this machine and Unix sockets are allowed."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if str(host) not in ("127.0.0.1", "::1", "localhost", "None", socket.gethostname()):
            raise AssertionError(f"a test tried to look up {host}")
        return lookup(host, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights and photographs: FOCUSDD_ASSETS, or ../shared/assets beside the repository."""
    folder = Path(os.environ.get("FOCUSDD_ASSETS", REPOSITORY.parent / "shared" / "assets"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"NO ASSETS: {folder} has no weights/; set FOCUSDD_ASSETS to run the tests on real input")
    return folder


def tiny_yaml(folder: Path, family: str = "yolo11", classes: int = len(NAMES)) -> Path:
    """Five strided convolutions under the head of a published family."""
    from ultralytics.utils import ROOT

    published = yaml.safe_load((ROOT / "cfg" / "models" / family.removeprefix("yolo") / f"{family}.yaml").read_text())
    content = {key: published[key] for key in ("end2end", "reg_max") if key in published}
    content["nc"] = classes
    content["backbone"] = [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 8, 16, 16, 16)]
    content["head"] = [[[2, 3, 4], 1, "Detect", ["nc"]]]
    path = folder / f"{family}n-tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def save_detector(path: Path, family: str = "yolo11", names: tuple[str, ...] = NAMES, seed: int = 0) -> Path:
    """A checkpoint of a tiny detector with random weights whose classes fire here and there."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(seed)
    model = DetectionModel(str(tiny_yaml(path.parent, family, len(names))), nc=len(names), verbose=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    head = model.model[-1]
    for branch in (head.cv3, getattr(head, "one2one_cv3", None) or []):
        for layers in branch:
            layers[-1].bias.data.uniform_(-1.5, 0.5)
            layers[-1].weight.data.mul_(20)
    model.names = dict(enumerate(names))
    torch.save({"model": model.half(), "train_args": {}, "epoch": -1}, path)
    return path


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, float, float, float, float]]]:
    """A picture with two to three drawn objects and their rows: class, x, y, w, h in [0, 1]."""
    image = rng.integers(60, 200, (size, size, 3)).astype(np.uint8)
    rows = []
    for _ in range(int(rng.integers(2, 4))):
        kind = int(rng.integers(0, 3))
        w = h = int(rng.integers(size // 5, size // 3))
        if kind == 2:
            h = max(4, h // 3)
        x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
        colour = [int(v) for v in np.eye(3)[kind] * 255]
        if kind == 0:
            cv2.circle(image, (x + w // 2, y + h // 2), w // 2, colour, -1)
        else:
            cv2.rectangle(image, (x, y), (x + w, y + h), colour, -1)
        rows.append((kind, (x + w / 2) / size, (y + h / 2) / size, w / size, h / size))
    return image, rows


def write_set(folder: Path, count: int = 10, size: int = 96, seed: int = 0) -> Path:
    """A small distilled set of drawn pictures, complete as a build would leave it."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        image, rows = draw(rng, size)
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        pictures.append((encoded, "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows)))
    return pack_set(folder, pictures, NAMES)


def pack_set(folder: Path, pictures: Sequence[tuple[bytes, str]], names: Sequence[str]) -> Path:
    """A distilled set of JPEGs and their label rows, complete as a build would leave it."""
    from focusdd_det import detset

    lines = []
    for part in detset.PARTS:
        (folder / part / "train").mkdir(parents=True)
    for i, (encoded, labels) in enumerate(pictures):
        name = names[i % len(names)]
        files = {"images": encoded, "labels": labels.encode(), "soft": b"not read by the training"}
        hashes = {part: hashlib.sha256(data).hexdigest() for part, data in files.items()}
        boxes = labels.count("\n")
        item_id = f"{name.replace(' ', '_')}-{i:04d}"
        item = detset.Item(item_id, name, i % len(names), name, i, i, i, (), boxes, hashes)
        for part, data in files.items():
            detset.part_path(folder, part, item).write_bytes(data)
        lines.append(item.line())
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "data.yaml").write_bytes(detset.data_yaml(names))
    (folder / "build.yaml").write_text("format: focusdd_det set\n")
    (folder / "README.md").write_text("a set for tests\n")
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


def write_coco(folder: Path, count: int = 6, size: int = 96, seed: int = 9) -> Path:
    """A small YOLO data set in COCO's layout with its annotations; category ids are far from 0, 1, 2."""
    rng = np.random.default_rng(seed)
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "labels" / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        image, rows = draw(rng, size)
        cv2.imwrite(str(folder / "images" / "val" / f"scene{i}.jpg"), image)
        (folder / "labels" / "val" / f"scene{i}.txt").write_text(
            "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows)
        )
        images.append({"id": 1000 + i, "file_name": f"scene{i}.jpg", "width": size, "height": size})
        for c, x, y, w, h in rows:
            box = [(x - w / 2) * size, (y - h / 2) * size, w * size, h * size]
            number = len(annotations) + 1
            annotations.append(
                {
                    "id": number,
                    "image_id": 1000 + i,
                    "category_id": 7 + 10 * c,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(number % 5 == 0),
                }
            )
    categories = [{"id": 7 + 10 * c, "name": name} for c, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"path": str(folder), "train": "images/val", "val": "images/val", "names": list(NAMES)})
    )
    return folder / "data.yaml"


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny YOLO11 checkpoint that knows the test classes in another order, and one more."""
    return save_detector(tmp_path_factory.mktemp("teacher") / "teacher.pt", names=("bar", "other", "disc", "square"))


@pytest.fixture(scope="session")
def drawn_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small distilled set."""
    return write_set(tmp_path_factory.mktemp("sets") / "drawn")


@pytest.fixture(scope="session")
def drawn_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.yaml of a small evaluation set with COCO annotations."""
    return write_coco(tmp_path_factory.mktemp("coco") / "drawn")
