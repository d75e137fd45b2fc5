"""The ViT: attention against arithmetic by hand and against timm's own extraction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from focusdd_det.backbones.rows import ClassTokenRows
from focusdd_det.devices import at_once
from focusdd_det.errors import WeightsError
from focusdd_det.selector import combine, load_selector, read_state

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 4}


def tiny_vit(seed: int = 0, **more: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**KWARGS, **more})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)  # timm starts with attention that is nearly flat
    return model.eval()


def spec(folder: Path, **more: object) -> Path:
    model = tiny_vit()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "vit.safetensors")
    kwargs = {key: value for key, value in KWARGS.items() if key != "num_classes"}
    content = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": list("abcd"), "weights": "vit.safetensors"}
    (folder / "vit.json").write_text(json.dumps({**content, **more}))
    return folder / "vit.json"


def by_hand(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Every block's class-token attention, with nothing but matrix products."""
    tokens = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], 1) + model.pos_embed
    rows = []
    for block in model.blocks:
        inner = torch.nn.functional.layer_norm(tokens, (24,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
        qkv = inner @ block.attn.qkv.weight.T + block.attn.qkv.bias
        heads = []
        values = []
        for h in range(3):
            q, k, v = (qkv[..., part * 24 + h * 8 : part * 24 + h * 8 + 8] for part in range(3))
            weights = torch.exp(q @ k.transpose(1, 2) / 8**0.5)
            weights = weights / weights.sum(-1, keepdim=True)
            heads.append(weights[:, 0, 1:])
            values.append(weights @ v)
        rows.append(torch.stack(heads, 1))
        tokens = tokens + torch.cat(values, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        tokens = tokens + block.mlp(block.norm2(tokens))
    return rows


@torch.no_grad()
def test_attention_is_what_the_formulas_say() -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    expected = by_hand(model, x)
    with ClassTokenRows(model) as seen:
        model(x)
    assert len(seen.rows) == 5
    for row, reference in zip(seen.rows, expected, strict=True):
        torch.testing.assert_close(row, reference, rtol=1e-4, atol=1e-6)
        assert row.std() > 0.01  # the map is not flat, so the comparison means something


@torch.no_grad()
def test_attention_agrees_with_timm_and_leaves_the_model_as_it_was() -> None:
    from timm.utils import AttentionExtract

    model, x = tiny_vit(), torch.randn(3, 3, 32, 32)
    before = model(x)
    unfused = tiny_vit()
    for block in unfused.blocks:
        block.attn.fused_attn = False
    reference = AttentionExtract(unfused, method="hook")(x)
    with ClassTokenRows(model) as fast:
        model(x)
    with ClassTokenRows(model, exact=True) as exact:
        model(x)
    assert len(reference) == 5
    for i, whole in enumerate(reference.values()):
        torch.testing.assert_close(fast.rows[i], whole[:, :, 0, 1:], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(exact.rows[i], whole[:, :, 0, 1:], rtol=1e-4, atol=1e-6)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"reg_tokens": 3},
        {"qkv_bias": False, "init_values": 0.3},
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"global_pool": "avg"},  # reads every token: computed whole
        {"global_pool": "map"},
        {"distilled": True},
    ],
)
@torch.no_grad()
def test_what_nobody_reads_of_the_last_block_is_not_computed(more: dict[str, object]) -> None:
    if more.pop("distilled", False):
        kwargs = {key: value for key, value in KWARGS.items() if key != "patch_size"}
        model: Any = timm.create_model("deit_tiny_distilled_patch16_224", **{**kwargs, "img_size": 64}).eval()
    else:
        model = tiny_vit(**more)
    side = 64 if hasattr(model, "head_dist") else 32
    x = torch.randn(2, 3, side, side)
    tokens: list[int] = []
    model.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    with ClassTokenRows(model, whole=True) as whole:
        logits = model(x)
    with ClassTokenRows(model) as fast:
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    for row, reference in zip(fast.rows, whole.rows, strict=True):
        torch.testing.assert_close(row, reference, rtol=1e-4, atol=1e-6)
    everything, prefix = model.pos_embed.shape[1], model.num_prefix_tokens
    assert tokens == [everything, everything if "global_pool" in more else prefix]
    model(x)
    with ClassTokenRows(model.train()):
        model(x)
    assert tokens[2:] == [everything] * 2  # left as it was; and a training has its drop paths


@torch.no_grad()
def test_a_network_that_reads_more_than_the_class_token_is_computed_whole() -> None:
    model: Any = tiny_vit()
    x = torch.randn(2, 3, 32, 32)
    model.forward_head = lambda tokens, pre_logits=False: model.head(tokens[:, 0] + tokens[:, 1:].mean(1))
    logits = model(x)
    with ClassTokenRows(model) as seen:
        torch.testing.assert_close(model(x), logits)
    assert len(seen.rows) == 5


def test_a_cpu_takes_a_batch_in_parts_and_what_is_padding_not_at_all(tmp_path: Path) -> None:
    whole_batch = load_selector(str(spec(tmp_path)), None)
    assert torch.get_num_threads() == 1
    assert whole_batch.needed(1) == at_once(32**2) == 400
    assert [at_once(side**2) for side in (224, 640, 4000)] == [8, 1, 1]
    selector = replace(whole_batch, at_a_time=8)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    seen: list[int] = []
    selector.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))  # type: ignore[operator, union-attr]
    probabilities, attention, features = selector.with_features(pixels)
    assert seen == [8, 8, 4]
    assert [selector.needed(n) for n in (1, 8, 9, 20)] == [8, 8, 16, 24]
    first = selector.with_features(pixels[: selector.needed(3)])
    for part, whole in zip(first, (probabilities, attention, features), strict=True):
        assert torch.equal(part, whole[:8])  # to the last digit: the same shapes
    for whole, parts in zip(whole_batch.with_features(pixels), (probabilities, attention, features), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_register_and_distillation_tokens_are_left_out() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3)
    with ClassTokenRows(model.eval()) as seen:
        model(torch.randn(1, 3, 32, 32))
    assert seen.rows[0].shape == (1, 3, 4)  # 2 x 2 patches, without the class and the distillation token


def test_global_class_attention_by_hand() -> None:
    rows = [torch.tensor([[[float(i)], [float(i + 2)]]]) for i in range(4)]  # 4 blocks, 2 heads, 1 token; means 1 2 3 4
    # from block 4 // 4 = 1 on: 0.01*2 = 0.02; 0.99*0.02 + 0.03 = 0.0498; 0.99*0.0498 + 0.04 = 0.089302
    assert combine(rows, "gca").item() == pytest.approx(0.089302, abs=1e-7)
    assert combine(rows, "last").item() == pytest.approx(4.0)
    assert combine(rows, "mean").item() == pytest.approx(2.5)
    with pytest.raises(ValueError, match="gca, last or mean"):
        combine(rows, "rollout")


def test_twelve_blocks_of_equal_attention_sum_to_the_constant() -> None:
    rows = [torch.full((1, 2, 4), 0.25)] * 12
    assert combine(rows, "gca").sum().item() == pytest.approx(1 - 0.99**9, abs=1e-6)


def test_a_selector_of_ones_own(tmp_path: Path) -> None:
    selector = load_selector(str(spec(tmp_path)), None)
    assert (selector.view, selector.grid, selector.classes) == (32, 4, tuple("abcd"))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    probabilities, attention = selector(pixels)
    assert probabilities.shape == (3, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    assert attention.shape == (3, 4, 4)
    assert (attention >= 0).all()


def test_precision_changes_little(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    path = str(spec(tmp_path))
    full, _ = load_selector(path, None)(pixels)
    half, _ = load_selector(path, None, precision="bf16")(pixels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0)


def test_an_lf_vit_checkpoint_is_renamed(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in tiny_vit().state_dict().items()}
    state["module.pos_embed_list.0"] = state.pop("module.pos_embed")
    state["module.pos_embed_list.1"] = torch.zeros(1, 65, 24)
    state["module.reuse_block.0.weight"] = torch.zeros(24)
    torch.save({"model": state, "flops": [1.0, 2.0]}, tmp_path / "lf.pth")
    renamed, lf_vit = read_state(tmp_path / "lf.pth")
    assert lf_vit
    assert set(renamed) == set(tiny_vit().state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "choose a ViT"),
        ("swin_tiny_patch4_window7_224", "not a ViT"),
        ("deit_smal_patch16_224", "no such model"),
    ],
)
def test_models_that_cannot_select_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        load_selector(name, str(tmp_path / "a.safetensors"))
    assert name in str(caught.value)


def test_a_vit_without_a_class_token_is_refused_by_name(tmp_path: Path) -> None:
    path = spec(tmp_path, kwargs={"img_size": 32, "class_token": False, "global_pool": "avg", "depth": 1})
    with pytest.raises(WeightsError, match="vit_tiny_patch16_224: it has no class token"):
        load_selector(str(path), None)


def test_no_weights_and_no_download_says_how(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="download=true"):
        load_selector("deit_tiny_patch16_224", None)
    with pytest.raises(WeightsError, match="no checkpoint at"):
        load_selector("deit_tiny_patch16_224", str(tmp_path / "absent.safetensors"))


def test_weights_that_timm_fetched_before_need_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(name, depth=12)
    snapshot = tmp_path / f"models--timm--{name}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (tmp_path / f"models--timm--{name}" / "refs").mkdir()
    (tmp_path / f"models--timm--{name}" / "refs" / "main").write_text("0")
    with pytest.raises(WeightsError, match="download=true"):
        load_selector(name, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    selector = load_selector(name, None)  # and no network is there: conftest.py
    assert torch.equal(selector.model.head.weight, model.head.weight)


def test_deit_tiny_on_photographs(assets: Path) -> None:
    """The real checkpoint calls most of 40 Imagenette pictures by their right name."""
    from focusdd_det.scoring.decode import decode
    from focusdd_det.scoring.glance import view_pixels

    weights = assets / "weights" / "deit_tiny_patch16_224.in1k.safetensors"
    selector = load_selector("deit_tiny_patch16_224", str(weights), precision="bf16")
    assert (selector.view, selector.grid) == (224, 14)
    files = [
        p for d in sorted((assets / "data" / "imagenette_mini" / "val").iterdir()) for p in sorted(d.iterdir())[:4]
    ]
    views = torch.stack(
        [torch.from_numpy(view_pixels(decode(p.read_bytes())[0], 224, "crop")).permute(2, 0, 1) for p in files]
    )
    probabilities, _ = selector(views)
    right = sum(selector.classes[int(i)] == p.parent.name for i, p in zip(probabilities.argmax(1), files, strict=True))
    assert right >= 0.6 * len(files)


def test_a_distilled_vit_takes_its_own_checkpoint(tmp_path: Path) -> None:
    """With both heads; the same ViT without the second takes it, too."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    own = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **kwargs).eval()
    save_file({k: v.contiguous() for k, v in own.state_dict().items()}, tmp_path / "w.safetensors")
    content = {"arch": "deit_tiny_distilled_patch16_224", "kwargs": kwargs, "classes": ["a", "b", "c"]}
    (tmp_path / "v.json").write_text(json.dumps(content | {"weights": "w.safetensors"}))
    vit = load_selector(str(tmp_path / "v.json"), None)
    assert torch.equal(vit.model.head_dist.weight, own.head_dist.weight)
