"""Classifiers by name, normalisation, and the files that rebuild them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from focusdd_det.classify.nets import (
    TORCHVISION,
    Classifier,
    Net,
    head_keys,
    load_weights,
    make_net,
    net_of_spec,
    read_spec,
    save_spec,
)
from focusdd_det.errors import WeightsError
from focusdd_det.selector import load_selector

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_name_gives_the_stock_model(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        stock = models.get_model(name, num_classes=7)
        net = make_net(name, 7)
    assert net.library == "torchvision" and type(net.module) is type(stock)
    assert {k: v.shape for k, v in net.module.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    assert net.mean == (0.485, 0.456, 0.406) and net.std == (0.229, 0.224, 0.225)
    heads = {k for k in net.module.state_dict() if k.startswith(head_keys(net))}
    assert {len(net.module.state_dict()[k]) for k in heads} == {7} and len(heads) == 2


def test_timm_is_forced_by_its_prefix() -> None:
    with torch.device("meta"):
        net = make_net("timm:resnet18", 7)
    assert net.library == "timm" and type(net.module).__module__.startswith("timm.")


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(WeightsError, match=r"resnet81.*did you mean.*resnet18"):
        make_net("resnet81", 3)


def test_options_that_the_library_does_not_take_are_named() -> None:
    with pytest.raises(WeightsError, match=r"test_resnet.*no_such_option"):
        make_net("test_resnet", 3, kwargs={"no_such_option": 1})


def test_a_vit_is_built_for_the_size_of_the_pictures() -> None:
    net = make_net("test_vit", 3, size=32)
    assert net.kwargs == {"img_size": 32}
    assert Classifier(net, list("abc"))(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_pixels_are_normalised_inside() -> None:
    # mean 0.5, std 0.25: the pixel 1.0 arrives as (1 - 0.5) / 0.25 = 2
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean(dim=(2, 3))

    model = Classifier(Net(Spy(), (0.5,) * 3, (0.25,) * 3, "timm", "spy"), list("abc"))
    model(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 2, 2), 2.0))
    assert list(model.state_dict()) == []  # the normalisation is no weight


def test_a_batch_gives_its_loss() -> None:
    model = Classifier(make_net("test_resnet", 3), list("abc")).eval()
    model.criterion = lambda preds, batch: (preds.sum() + batch["plus"], "items")
    x = torch.rand(2, 3, 32, 32)
    loss, items = model({"img": x, "plus": 5})
    torch.testing.assert_close(loss, model(x).sum() + 5)
    assert items == "items" and model.names == {0: "a", 1: "b", 2: "c"} and model.nc == 3


def test_a_copy_is_whole() -> None:
    model = Classifier(make_net("test_resnet", 3), list("abc")).eval()
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_saved_weights_are_those_of_the_stock_model(tmp_path: Path) -> None:
    net = make_net("test_resnet", 3)
    save_spec(tmp_path / "student", net, list("abc"), 32)
    stock = timm.create_model("test_resnet", num_classes=3)
    stock.load_state_dict(load_file(tmp_path / "student.safetensors"))
    spec = read_spec(tmp_path / "student.json")
    assert spec.classes == ("a", "b", "c") and spec.size == 32 and spec.weights == tmp_path / "student.safetensors"
    again = net_of_spec(spec)
    load_weights(again, spec.weights)
    x = torch.rand(2, 3, 32, 32)
    first, second = (Classifier(n, list("abc")).eval()(x) for n in (net, again))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert again.mean == net.mean and again.std == net.std


def test_a_saved_vit_can_be_the_selector(tmp_path: Path) -> None:
    net = make_net("vit_tiny_patch16_224", 3, 32, VIT)
    save_spec(tmp_path / "vit.json", net, list("abc"), 32)
    selector = load_selector(str(tmp_path / "vit.json"), None)
    assert selector.classes == ("a", "b", "c") and selector.view == 32 and selector.grid == 4
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = Classifier(net, list("abc")).eval()(pixels.float() / 255).softmax(dim=1)
    torch.testing.assert_close(selector(pixels)[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_another_number_of_classes_keeps_all_but_the_head(tmp_path: Path) -> None:
    net = make_net("test_resnet", 3)
    save_spec(tmp_path / "a.json", net, list("abc"), 32)
    other = make_net("test_resnet", 5)
    head = {k: v.clone() for k, v in other.module.state_dict().items() if k.startswith(head_keys(other))}
    load_weights(other, tmp_path / "a.safetensors", head=False)
    for key, value in other.module.state_dict().items():
        torch.testing.assert_close(value, head[key] if key in head else net.module.state_dict()[key])
    with pytest.raises(WeightsError, match=r"a\.safetensors does not fit"):
        load_weights(other, tmp_path / "a.safetensors")


def test_a_vit_of_another_size_takes_the_weights(tmp_path: Path) -> None:
    save_spec(tmp_path / "a.json", make_net("test_vit", 3, 64), list("abc"), 64)
    spec = read_spec(tmp_path / "a.json")
    net = net_of_spec(spec, size=32)
    load_weights(net, spec.weights)
    assert Classifier(net, list("abc"))(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = make_net("test_resnet", 3)
    state = {k: v.clone() for k, v in net.module.state_dict().items()}
    state["fc.bias"][1] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=r"not finite \(fc\.bias\)"):
        load_weights(net, tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["a", "a"]}, "one twice"),
        ({"classes": [1, 2]}, "list of names"),
        ({"classes": [], "weights": "x.safetensors"}, "outputs of its weights stand for"),
        ({"weights": "../elsewhere.safetensors"}, "beside the JSON"),
        ({"library": "other"}, "torchvision or timm"),
        ({"size": "32"}, "number of px"),
        ({"mean": [1, 2]}, "three numbers"),
        ({"run": "os.system"}, "expected an object"),
    ],
)
def test_a_spec_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"arch": "test_resnet", "classes": ["a", "b"], **change}))
    with pytest.raises(WeightsError, match=words):
        read_spec(tmp_path / "x.json")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"cache_dir": "x"}, {"img_size": {"a": 1}}, {"norm_layer": "../x"}, {"num_classes": 4},
    ],
)  # fmt: skip
def test_a_spec_says_how_to_build_and_never_what_to_read(kwargs: dict[str, object], tmp_path: Path) -> None:
    """timm's own loader would unpickle what `checkpoint_path` names."""
    path = tmp_path / "spec.json"
    content = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": ["a", "b"], "weights": "w.safetensors"}
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="kwargs"):
        read_spec(path)
    with pytest.raises(WeightsError, match="kwargs"):
        load_selector(str(path), None)
