"""Selectors beyond timm: the registry, a backbone in a file of the user's own, LV-ViT against arithmetic by hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import draw
from test_selector import spec
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, gelu, layer_norm

from focusdd_det import backbones
from focusdd_det.backbones import BACKBONES, Backbone, lv_vit, register_backbone
from focusdd_det.backbones.lv_vit import LVViT
from focusdd_det.build import build, load_class_config
from focusdd_det.detset import read_manifest
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.plugins import load_plugins
from focusdd_det.selector import load_selector, token_grid
from focusdd_det.stats.features import pooled

# A backbone as a user would write it: attention of its own, other key names in the checkpoint, classes of its own.
MINE = """
import torch
from torch import nn

from focusdd_det.backbones import Backbone, register_backbone


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 6).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.transpose(-2, -1) / 6**0.5).softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Net(nn.Module):
    def __init__(self, grid):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid * grid, 12))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Mine(Backbone):
    view, patch, classes = 48, 8, ("disc", "square", "bar")
    mean = std = (0.5, 0.5, 0.5)

    def build(self, view):
        return Net(self.grid(view))

    def fit(self, state, model):
        state = {key.replace("stem.", "patches."): value for key, value in state.items()}
        return super().fit(state, model)


register_backbone("mine", Mine())
"""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    from focusdd_det import plugins

    kept = [dict(table) for table in (BACKBONES, backbones.ORIGINS, plugins._loaded)]
    yield
    for table, old in zip((BACKBONES, backbones.ORIGINS, plugins._loaded), kept, strict=True):
        table.clear()
        table.update(old)  # type: ignore[arg-type]


def mine(folder: Path, text: str = MINE) -> tuple[Path, Path]:
    """The plugin and a checkpoint of it in which one layer has another name."""
    file, weights = folder / "my_vit.py", folder / "my_vit.pth"
    file.write_text(text)
    space: dict[str, object] = {"__name__": "written_for_the_test"}
    exec(text.replace('register_backbone("mine", Mine())', ""), space)
    torch.manual_seed(3)
    net = space["Mine"]().build(48)  # type: ignore[operator]
    torch.save({key.replace("patches.", "stem."): value for key, value in net.state_dict().items()}, weights)
    return file, weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(4)
    for folder in ("disc", "square"):
        (top / folder).mkdir()
        for i in range(8):
            cv2.imwrite(str(top / folder / f"{i}.png"), cv2.resize(draw(rng, 64)[0], (60 + 4 * i, 80)))
    return top


def test_a_build_selects_with_a_backbone_in_a_file_of_the_users_own(sources: Path, tmp_path: Path) -> None:
    file, weights = mine(tmp_path)
    options = {
        "sources": [str(sources)], "plugins": [str(file)], "selector": "mine", "selector_weights": str(weights),
        "ipc": 2, "image_size": 64, "near_duplicate": 0, "device": "cpu", "threads": 1,
    }  # fmt: skip
    build(load_class_config(**options, out=str(tmp_path / "set")))
    keys = [cell for item in read_manifest(tmp_path / "set") for cell in item.cells if cell.kind == "key"]
    assert len(keys) == 12
    assert all(0 < cell.p < 1 and 0.3 < cell.share < 1 for cell in keys)
    identity = yaml.safe_load((tmp_path / "set" / "build.yaml").read_text())
    assert identity["token_grid"] == 6
    assert (identity["selector"]["name"], identity["selector"]["view"]) == ("mine", 48)
    assert set(identity["plugins"]) == {"my_vit.py"}
    build(load_class_config(**options, method="random", out=str(tmp_path / "random")))  # no ViT, but its grid
    assert yaml.safe_load((tmp_path / "random" / "build.yaml").read_text())["token_grid"] == 6


def test_a_backbone_whose_file_changed_has_another_identity(tmp_path: Path) -> None:
    """So that scores which are kept from build to build are not those of other code."""
    file, weights = mine(tmp_path)
    load_plugins([str(file)])
    before = load_selector("mine", str(weights))
    assert load_selector("mine", str(weights)).spec == before.spec
    file.write_text(MINE.replace("/ 6**0.5", "/ 3"))
    load_plugins([str(file)])
    after = load_selector("mine", str(weights))
    assert after.sha256 == before.sha256
    assert after.spec != before.spec


def test_timm_selectors_keep_the_identity_that_stored_scores_have(tmp_path: Path) -> None:
    found = load_selector(str(spec(tmp_path)), None).spec
    assert found == "06aee8028bdec11e483bc3a3d1200a103ad1544d547c6edf3cd30192ce00f96e"


def test_several_attentions_cost_one_look(tmp_path: Path) -> None:
    selector = load_selector(str(spec(tmp_path)), None)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    probabilities, maps = selector.maps(pixels, ["gca", "last", "mean"])
    for how, attention in zip(["gca", "last", "mean"], maps, strict=True):
        alone = load_selector(str(tmp_path / "vit.json"), None, attention=how)(pixels)
        torch.testing.assert_close(alone, (probabilities, attention))


class Plain(Backbone):
    """A network that says nothing, for the refusals."""

    view = 32

    def build(self, view: int) -> nn.Module:
        return nn.Linear(2, 2)

    def look(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return torch.zeros(len(x), 1000), [torch.full((len(x), 2, 4), 0.25)]


@pytest.mark.parametrize(
    ("name", "backbone", "says"),
    [
        ("lvvit_s", Plain(), r"`lvvit_s` exists already \(LVViT\)"),
        ("deit_tiny_patch16_224", Plain(), "is the name of a model of timm"),
        ("a/b", Plain(), "expected a plain name"),
        ("x.json", Plain(), "expected a plain name"),
        ("plain", Plain, "expected an instance of a subclass of Backbone"),
    ],
)
def test_what_cannot_be_registered(name: str, backbone: Backbone, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        register_backbone(name, backbone)


@pytest.mark.parametrize(
    ("logits", "rows", "says"),
    [
        ((1, 999), [(1, 2, 4)], r"its logits are \[1, 999\], expected \[1, 1000\]"),
        ((1, 1000), [], "gave no attention rows"),
        ((1, 1000), [(1, 2, 5)], r"its attention rows are \[1, 2, 5\], expected \[1, heads, 2 \* 2\]"),
        ((1, 1000), [(1, 4)], r"its attention rows are \[1, 4\]"),
        (None, [], r"cannot be shown a picture \(AttributeError"),
    ],
)
def test_a_backbone_that_breaks_its_word_is_told_what_was_expected(
    tmp_path: Path, logits: tuple[int, ...] | None, rows: list[tuple[int, ...]], says: str
) -> None:
    class Wrong(Plain):
        def look(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return torch.zeros(logits or ()), [torch.rand(row) for row in rows]

    class Unusual(Plain):  # has no blocks, and did not say how to look at it
        look = Backbone.look  # type: ignore[assignment]

    register_backbone("wrong", Unusual() if logits is None else Wrong())
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=says) as caught:
        load_selector("wrong", str(tmp_path / "w.pth"))
    assert "selector=wrong" in str(caught.value)


def test_attention_that_is_no_attention_is_refused(tmp_path: Path) -> None:
    class Negative(Plain):
        def look(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return torch.zeros(len(x), 1000), [torch.full((len(x), 2, 4), -0.25)]

    register_backbone("negative", Negative())
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="negative or not finite; expected it after the softmax"):
        load_selector("negative", str(tmp_path / "w.pth"))


def test_an_unknown_name_is_told_of_the_backbones_there_are() -> None:
    with pytest.raises(WeightsError, match=r"near: .*lvvit_s.*plugins=FILE\.py"):
        load_selector("lvvit", "w.pth")
    with pytest.raises(WeightsError, match=r"lvvit_s has no weights here: give selector_weights=PATH") as caught:
        load_selector("lvvit_s", None, download=True)
    assert "timm" not in str(caught.value)


# --- LV-ViT


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of lvvit_s-26M-224-83.3.pth.tar, as they follow from the authors' description of the network."""
    table: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    for i in (1, 2, 3):
        table[f"patch_embed.conv{i}.weight"] = (64, 3, 7, 7) if i == 1 else (64, 64, 3, 3)
        for key in ("weight", "bias", "running_mean", "running_var"):
            table[f"patch_embed.bn{i}.{key}"] = (64,)
        table[f"patch_embed.bn{i}.num_batches_tracked"] = ()
    table |= {"patch_embed.proj.weight": (384, 64, 8, 8), "patch_embed.proj.bias": (384,)}
    for i in range(16):
        block = {
            "norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384),
            "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
            "mlp.fc1.weight": (1152, 384), "mlp.fc1.bias": (1152,), "mlp.fc2.weight": (384, 1152),
            "mlp.fc2.bias": (384,),
        }  # fmt: skip
        table |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    table |= {"norm.weight": (384,), "norm.bias": (384,)}
    for head in ("head", "aux_head"):
        table |= {f"{head}.weight": (1000, 384), f"{head}.bias": (1000,)}
    return table


def checkpoint(path: Path, leave_out: str = "", **shapes: tuple[int, ...]) -> Path:
    torch.manual_seed(0)
    table = {**published(), **shapes}
    state = {
        key: torch.tensor(1) if shape == () else torch.rand(shape) * 0.05
        for key, shape in table.items()
        if not leave_out or not key.startswith(leave_out)
    }
    torch.save(state, path)
    return path


def test_lv_vit_s_has_as_many_parameters_as_published() -> None:
    """26.15 M in the authors' table at 224 px; 25.77 M without the head for patch tokens, 26.30 M at 384 px."""
    count = {
        view: sum(p.numel() for p in LVViT(aux=aux).build(abs(view)).parameters())
        for view, aux in ((224, True), (-224, False), (384, True))
    }
    assert count == {224: 26_151_824, -224: 25_766_824, 384: 26_297_744}


def test_the_published_names_and_shapes_fit_key_by_key(tmp_path: Path) -> None:
    """A checkpoint made up for the test: the real one is not at hand."""
    own = {key: tuple(value.shape) for key, value in LVViT().build(224).state_dict().items()}
    assert own == published()
    path = checkpoint(tmp_path / "lvvit_s-26M-224-83.3.pth.tar")
    selector = load_selector("lvvit_s", str(path))
    state = torch.load(path, weights_only=True)
    for key, value in selector.model.state_dict().items():
        torch.testing.assert_close(value, state[key], check_dtype=False)
    assert (selector.view, selector.grid, len(selector.classes)) == (224, 14, 1000)
    assert (selector.classes[0], selector.mean[0], selector.std[2]) == ("n01440764", 0.485, 0.225)
    probabilities, attention = selector(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8))
    assert probabilities.shape == (1, 1000)
    assert attention.shape == (1, 14, 14)
    assert 0 < float(attention.sum()) <= 1 - 0.99**12 + 1e-6  # 12 of the 16 blocks, each row at most 1
    features = pooled(selector, np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))
    assert features.shape == (2, 384) and features.dtype == np.float32


def test_lv_vit_at_another_view_and_from_another_size(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "s384.pth.tar", pos_embed=(1, 577, 384))
    selector = load_selector("lvvit_s", str(path), view=144)
    assert (selector.grid, token_grid("lvvit_s", None, 144), token_grid("lvvit_s", None, "auto")) == (9, 9, 14)
    assert selector.model.pos_embed.shape == (1, 82, 384)
    first = torch.load(path, weights_only=True)["pos_embed"][:, 0]
    torch.testing.assert_close(selector.model.pos_embed[:, 0], first)  # the class token's is no part of the grid
    with pytest.raises(WeightsError, match=r"cannot be built at view=150 \(expected a multiple of 16 px\)"):
        load_selector("lvvit_s", str(path), view=150)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit the selector: missing \['aux_head.weight'"):
        load_selector("lvvit_s", str(checkpoint(tmp_path / "a.pth.tar", leave_out="aux_head")))
    with pytest.raises(WeightsError, match=r"unexpected \['blocks.16.norm1.weight'\]"):
        load_selector("lvvit_s", str(checkpoint(tmp_path / "b.pth.tar", **{"blocks.16.norm1.weight": (384,)})))


SMALL = LVViT(view=32, dim=24, depth=3, heads=3, ratio=2.0, skip=1.5, classes=("a", "b", "c", "d"))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = SMALL.build(32).eval()
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.add_(torch.randn_like(value) * 0.2)
    return net


@torch.no_grad()
def test_lv_vit_is_what_its_description_says() -> None:
    """Logits and attention against a forward pass of matrix products."""
    net, x = small(), torch.randn(2, 3, 32, 32)
    w = net.state_dict()
    t = x
    for i in (1, 2, 3):
        conv = conv2d(t, w[f"patch_embed.conv{i}.weight"], stride=2 if i == 1 else 1, padding=3 if i == 1 else 1)
        bn = [w[f"patch_embed.bn{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        t = batch_norm(conv, *bn).clamp_min(0)
    t = conv2d(t, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    t = torch.cat([w["cls_token"].expand(2, -1, -1), t], 1) + w["pos_embed"]
    rows = []
    for i in range(3):
        b = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        q, k, v = (
            (layer_norm(t, (24,), b["norm1.weight"], b["norm1.bias"], 1e-5) @ b["attn.qkv.weight"].T)
            .reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
        )  # fmt: skip
        attention = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
        rows.append(attention[:, :, 0, 1:])
        joined = (attention @ v).transpose(1, 2).reshape(2, 5, 24)
        t = t + (joined @ b["attn.proj.weight"].T + b["attn.proj.bias"]) / 1.5
        inner = layer_norm(t, (24,), b["norm2.weight"], b["norm2.bias"], 1e-5)
        inner = gelu(inner @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        t = t + (inner @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]) / 1.5
    t = layer_norm(t, (24,), w["norm.weight"], w["norm.bias"], 1e-5)
    patches = t[:, 1:] @ w["aux_head.weight"].T + w["aux_head.bias"]
    expected = t[:, 0] @ w["head.weight"].T + w["head.bias"] + 0.5 * patches.max(1).values
    logits, seen = SMALL.look(net, x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3
    for row, reference in zip(seen, rows, strict=True):
        torch.testing.assert_close(row, reference, rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_lv_vit_file_is_a_plugin(tmp_path: Path) -> None:
    """As its docstring promises."""
    text = Path(lv_vit.__file__).read_text()
    assert text.count('register_backbone("lvvit_s", LVViT())') == 1
    copy = 'LVViT(view=32, dim=24, depth=3, heads=3, ratio=2.0, skip=1.5, classes=("a", "b", "c", "d"))'
    (tmp_path / "my_vit.py").write_text(text.replace('"lvvit_s", LVViT()', f'"my_name", {copy}'))
    load_plugins([str(tmp_path / "my_vit.py")])
    torch.save({"state_dict": small().state_dict()}, tmp_path / "w.pth")
    register_backbone("shipped", SMALL)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own, ours = (load_selector(name, str(tmp_path / "w.pth"))(pixels) for name in ("my_name", "shipped"))
    torch.testing.assert_close(own, ours)


def test_the_same_class_under_the_same_name_is_no_clash(tmp_path: Path) -> None:
    shutil.copyfile(lv_vit.__file__, tmp_path / "same.py")
    load_plugins([str(tmp_path / "same.py")])
    assert BACKBONES["lvvit_s"].view == 224
