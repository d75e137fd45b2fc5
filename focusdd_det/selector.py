"""The ViT that looks at every picture: class probabilities and the class token's attention. Tensors in, tensors out."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from focusdd_det.backbones import (
    BACKBONES,
    Backbone,
    check_look,
    lv_vit,  # noqa: F401  (enters itself)
)
from focusdd_det.backbones.timm_vit import TimmViT, problems_of
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.devices import at_once, has_bfloat16, whole_float32
from focusdd_det.disk import file_sha256
from focusdd_det.errors import WeightsError

BETA = 0.99  # LF-ViT's decay of the running attention
ATTENTIONS = ("gca", "last", "mean")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_NOT_ARCHITECTURE = (
    "pretrained", "checkpoint", "cache_dir", "weights", "scriptable", "exportable", "no_jit", "features_only",
    "num_classes", "kwargs_filter", "model_kwargs", "progress",
)  # fmt: skip


@dataclass(frozen=True)
class Selector:
    """A frozen ViT with a class token.

    Attributes:
        model: the network, in eval mode.
        classes: the folder (WordNet id) that each output stands for.
        view: side of the square it sees, px.
        grid: side of its token grid, g.
        mean, std: normalisation of the pixels in [0, 1], RGB.
        sha256: of the checkpoint file.
        spec: hash of everything else that decides what it says: architecture, classes, view, mean and std.
        attention: gca, last or mean.
        precision: fp32, bf16 or fp16.
        backbone: knows how the network is asked.
        at_a_time: pictures of a batch that a CPU takes through the network at once; 0: as `devices.at_once` has it.
    """

    model: nn.Module
    classes: tuple[str, ...]
    view: int
    grid: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    spec: str
    attention: str
    precision: str
    device: torch.device
    backbone: Backbone
    at_a_time: int = 0

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a batch.

        Args:
            pixels: [B, 3, view, view] uint8 RGB.

        Returns:
            probabilities [B, classes] float32 (softmax) and attention [B, g, g] float32, at least 0, both on the CPU.
        """
        probabilities, maps = self.maps(pixels, [self.attention])
        return probabilities, maps[0]

    @torch.inference_mode()
    def maps(self, pixels: Tensor, attentions: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """The same for several ways to make a map of the blocks' attention, at the price of one look.

        Args:
            pixels: [B, 3, view, view] uint8 RGB.
            attentions: some of ATTENTIONS.

        Returns:
            probabilities [B, classes] and for each attention a map [B, g, g].
        """
        parts = torch.split(pixels, self._part_size) if self.device.type == "cpu" else [pixels]
        probabilities, maps = zip(*(self._part(part, attentions) for part in parts), strict=True)
        return torch.cat(probabilities), [torch.cat(each) for each in zip(*maps, strict=True)]

    def needed(self, count: int) -> int:
        """How many pictures of a padded batch must be shown for its first `count` to be seen as in the whole batch."""
        return -(-count // self._part_size) * self._part_size if self.device.type == "cpu" else sys.maxsize

    @property
    def _part_size(self) -> int:
        return self.at_a_time or at_once(self.view**2)

    def _part(self, pixels: Tensor, attentions: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        x = pixels.to(self.device, non_blocking=True).float().div_(255)
        mean = torch.tensor(self.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, 3, 1, 1)
        x = (x - mean) / std
        x = x.to(next(self.model.parameters()).dtype)
        if x.device.type == "cpu" and self.precision == "bf16":
            x = x.contiguous(memory_format=torch.channels_last)
        with whole_float32(x):
            logits, rows = self.backbone.look(self.model, x)
        probabilities = logits.float().softmax(dim=1)
        maps = [combine(rows, how).reshape(len(x), self.grid, self.grid).float().cpu() for how in attentions]
        return probabilities.cpu(), maps

    def with_features(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and what the classifier's head is shown: timm's forward_head(pre_logits=True), at length 1.

        Returns:
            probabilities, attention, and features [B, d] float32 on the CPU.
        """
        with shown_to_head(self.model) as shown:
            probabilities, attention = self(pixels)
        return probabilities, attention, nn.functional.normalize(_vectors(shown, len(pixels)), dim=1)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The same features as they are, [B, d] float32 on the CPU."""
        with shown_to_head(self.model) as shown:
            self(pixels)
        return _vectors(shown, len(pixels))


@contextlib.contextmanager
def shown_to_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the network's classifier (of two, the first) is given, call by call.

    Raises:
        WeightsError: the network does not say which of its layers that is.
    """
    shown: list[Tensor] = []
    if not hasattr(model, "get_classifier"):
        raise WeightsError(
            "the selector's features cannot be read: its network has no get_classifier(); add one, or do without "
            "features"
        )
    heads = model.get_classifier()  # type: ignore[operator]
    head = heads[0] if isinstance(heads, (tuple, list)) else heads  # a distilled ViT has two
    hook = head.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    try:
        yield shown
    finally:
        hook.remove()


def _vectors(shown: Sequence[Tensor], count: int) -> Tensor:
    """What a head was shown, part after part of a batch, as [count, d] float32 on the CPU."""
    if any(each.ndim != 2 for each in shown) or sum(map(len, shown)) != count:
        raise WeightsError("the selector's features cannot be read: its head does not see one vector a picture")
    return torch.cat([each.float().cpu() for each in shown])


def combine(rows: Sequence[Tensor], how: str) -> Tensor:
    """Per-block attention rows -> one map.

    `gca` (LF-ViT): over the blocks from a quarter of the depth on, A <- 0.99 A + 0.01 row, from 0. `last`: the last
    block. `mean`: the mean of all blocks. All: mean over heads.

    Args:
        rows: for each block [B, heads, N] float, at least 0.

    Returns:
        [B, N] float.
    """
    if how == "last":
        return rows[-1].mean(dim=1)
    if how == "mean":
        return torch.stack([row.mean(dim=1) for row in rows]).mean(dim=0)
    if how != "gca":
        raise ValueError(f"attention: expected gca, last or mean, got {how}")
    first = len(rows) // 4
    total = torch.zeros_like(rows[0].mean(dim=1))
    for row in rows[first:]:
        total = BETA * total + (1 - BETA) * row.mean(dim=1)
    return total


def load_selector(
    name: str,
    weights: str | None,
    view: int | str = "auto",
    attention: str = "gca",
    precision: str = "fp32",
    device: str = "cpu",
    download: bool = False,
) -> Selector:
    """A ViT by its timm name (or by a .json: `{"arch", "kwargs", "classes", "weights", "mean", "std"}`), or a backbone
    by the name under which it was registered.

    Args:
        name: timm's model name, a registered backbone's, or path of a .json beside its weights.
        weights: checkpoint path; .safetensors, or .pth (.pth.tar) read without running code. LF-ViT checkpoints are
            renamed.
        view: px, or auto: 112 for LF-ViT checkpoints, the model's own size otherwise.
        download: let timm fetch its own weights when `weights` is None and they are not in its cache.

    Raises:
        WeightsError: no such model, no or wrong weights, no class token, classes that do not fit.
    """
    spec = _read_spec(Path(name)) if name.endswith(".json") else {"arch": name}
    if weights is None and spec.get("weights"):
        weights = str(Path(name).parent / spec["weights"])
    name = spec["arch"]
    backbone = _backbone(spec, pretrained=weights is None)
    of_timm = isinstance(backbone, TimmViT)
    here = isinstance(backbone, TimmViT) and (download or backbone.cached)
    if weights is None and not here:
        raise WeightsError(
            f"selector={name} has no weights here: give selector_weights=PATH (.safetensors or .pth)"
            + (", or download=true to let timm fetch them" if of_timm else "")
        )
    state, lf_vit = (None, False) if weights is None else read_state(Path(weights))
    view = (112 if lf_vit else backbone.view) if view == "auto" else int(view)
    try:
        model = backbone.build(view)
    except Exception as error:  # timm and a user's own code may raise anything
        if isinstance(backbone, TimmViT) and weights is None and not backbone.cached and _has_grid(backbone, view):
            raise WeightsError(
                f"selector={name}: its weights could not be fetched ({str(error)[:300]}); try again, or give the file "
                "with selector_weights=PATH"
            ) from error
        who, choose = ("timm cannot build it", "; choose a ViT") if of_timm else ("it cannot be built", "")
        raise WeightsError(f"selector={name}: {who} at view={view} ({error}){choose}") from error
    if of_timm and (problems := problems_of(model)):
        raise WeightsError(
            f"selector={name}: {problems[0]}; choose e.g. deit_small_patch16_224 or vit_small_patch16_224"
        )
    if state is not None:
        _load_state(backbone, model, state, Path(str(weights)))
    classes = _classes(name, spec, backbone, model)
    model.eval().requires_grad_(False)
    if not of_timm and (problems := check_look(backbone, model, view, len(classes))):
        raise WeightsError(f"selector={name}: {'; '.join(problems)}. See Backbone in focusdd_det/backbones")
    dtype = DTYPES[precision]
    target = torch.device(device)
    digest = file_sha256(Path(weights)) if weights else state_digest(model)
    mean, std = tuple(spec.get("mean") or backbone.mean), tuple(spec.get("std") or backbone.std)
    spec_content = json.dumps([*backbone.identity(name, view), classes, mean, std], default=str)
    return Selector(
        model=model.to(target, dtype),
        classes=classes,
        view=view,
        grid=int(model.patch_embed.grid_size[0]) if of_timm else backbone.grid(view),  # type: ignore[union-attr, index, arg-type]
        mean=mean,
        std=std,
        sha256=digest,
        spec=hashlib.sha256(spec_content.encode()).hexdigest(),
        attention=attention,
        precision=precision,
        device=target,
        backbone=backbone,
    )


def in_precision(selector: Selector, precision: str) -> Selector:
    """The same ViT in another precision, beside the first."""
    model = copy.deepcopy(selector.model).to(DTYPES[precision])
    return replace(selector, model=model, precision=precision)


def precision_of(precision: str, device: str) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on this machine: fp16 on a GPU, bf16 on a processor that multiplies it in hardware, else fp32.

    The precision is part of what decides the scores: a set records the one that was used, never `auto`.
    """
    if precision != "auto":
        return precision  # type: ignore[return-value]
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if has_bfloat16() else "fp32"


def token_grid(name: str, weights: str | None, view: int | str) -> int:
    """Side of the token grid that a selector would have, without its weights: methods that use no ViT cut as large as
    it would. 14, that of the usual ViTs at their own size, when it cannot be told."""
    try:
        backbone = _backbone(_read_spec(Path(name)) if name.endswith(".json") else {"arch": name})
        if view == "auto":
            lf_vit = weights is not None and read_state(Path(weights))[1]
            view = 112 if lf_vit else backbone.view
        return backbone.grid(int(view))
    except Exception:
        return 14


def _has_grid(backbone: Backbone, view: int) -> bool:
    """Whether the network can be built at this view, asked without its weights."""
    try:
        return backbone.grid(view) > 0
    except Exception:  # timm and a user's own code may raise anything
        return False


def read_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint with timm's key names, and whether it was an LF-ViT (or CF-ViT) one.

    LF-ViT keeps two position embeddings (`pos_embed_list.0` for the coarse 112 px stage) and a `reuse_block` for its
    second stage: the first becomes `pos_embed`, the rest is left out.

    Raises:
        WeightsError: missing, damaged, not tensors, or a pickle that would run code.
    """
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}; expected weights (.safetensors or .pth)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {str(error)[:200]}); "
            "expected .safetensors, or a .pth of tensors only"
        ) from error
    for key in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path} holds no table of tensors; expected a state dict")
    state = {str(key).removeprefix("module."): value.float() for key, value in content.items()}
    lf_vit = "pos_embed_list.0" in state
    if lf_vit:
        state["pos_embed"] = state["pos_embed_list.0"]
        dropped = ("pos_embed_list.", "reuse_block.")
        state = {key: value for key, value in state.items() if not key.startswith(dropped)}
    return state, lf_vit


def unsafe_kwargs(kwargs: Any) -> list[str]:
    """What is wrong with the `kwargs` of a spec file, which go to timm or torchvision as they are.

    A file from outside may say how an architecture is built, never what is read or fetched: timm's `checkpoint_path`
    would unpickle any file there is.
    """
    if not isinstance(kwargs, dict):
        return ["kwargs must be an object"]
    problems = []
    for key, value in kwargs.items():
        if str(key).startswith(_NOT_ARCHITECTURE):
            problems.append(f"kwargs may not have `{str(key)[:40]}`: it does not describe an architecture")
        flat = value if isinstance(value, list) else [value]
        if not all(v is None or isinstance(v, (bool, int, float, str)) for v in flat) or any(
            isinstance(v, str) and ("/" in v or "\\" in v or ":" in v) for v in flat
        ):
            problems.append(f"kwargs: `{str(key)[:40]}` must be a number, a plain name, or a list of such")
    return problems


def _backbone(spec: dict[str, Any], pretrained: bool = False) -> Backbone:
    """What a selector's name stands for: a registered backbone, else a model of timm.

    Raises:
        WeightsError: neither has that name.
    """
    name = spec["arch"]
    if name in BACKBONES:
        if "classes" in spec:
            raise WeightsError(f"a .json describes a model of timm; say the classes of `{name}` where it is registered")
        return BACKBONES[name]
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        near += difflib.get_close_matches(name, list(BACKBONES), cutoff=0.6)
        raise WeightsError(
            f"selector={name}: timm has no such model; near: {', '.join(near) or 'timm.list_models()'}. "
            f"Beyond timm: {', '.join(BACKBONES)}; plugins=FILE.py adds one of yours"
        )
    kwargs = dict(spec.get("kwargs", {}))
    if "classes" in spec:
        kwargs["num_classes"] = len(spec["classes"])
    return TimmViT(name, kwargs, pretrained)


def _classes(name: str, spec: dict[str, Any], backbone: Backbone, model: nn.Module) -> tuple[str, ...]:
    """The folder that each output of the network stands for."""
    if "classes" in spec:
        return tuple(map(str, spec["classes"]))
    if backbone.classes is not None:
        return tuple(map(str, backbone.classes))
    if isinstance(backbone, TimmViT) and model.num_classes != len(imagenet_synsets()):
        raise WeightsError(
            f"selector={name} has {model.num_classes} classes, expected ImageNet-1K's 1000; give a .json with `classes`"
        )
    return imagenet_synsets()


def _load_state(backbone: Backbone, model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        state = backbone.fit(state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise WeightsError(f"{path} does not fit the selector: {str(error)[:400]}") from error
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit the selector: missing {missing[:4]}{'...' if len(missing) > 4 else ''}, "
            f"unexpected {unexpected[:4]}{'...' if len(unexpected) > 4 else ''}"
        )
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise WeightsError(f"{path} holds values that are not finite; the file is damaged")


def state_digest(module: nn.Module) -> str:
    """sha256 over the names and bytes of all weights: what stands for weights that lie in no file."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"selector={path}: not a readable JSON ({error}); expected arch, kwargs, classes") from error
    if not isinstance(spec, dict) or not {"arch", "classes"} <= set(spec):
        raise WeightsError(f"selector={path}: expected a JSON object with arch and classes (and kwargs, weights)")
    if problems := unsafe_kwargs(spec.get("kwargs", {})):
        raise WeightsError(f"selector={path}: {'; '.join(problems)}")
    return spec
