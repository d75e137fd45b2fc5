"""The ViT that looks at every picture: class probabilities and the class token's attention. Tensors in, tensors out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from focusdd_det.classmap import imagenet_synsets
from focusdd_det.errors import WeightsError

BETA = 0.99  # LF-ViT's decay of the running attention

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

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a batch.

        Args:
            pixels: [B, 3, view, view] uint8 RGB.

        Returns:
            probabilities [B, classes] float32 (softmax) and attention [B, g, g] float32, at least 0, both on the CPU.
        """
        x = pixels.to(self.device, non_blocking=True).float().div_(255)
        mean = torch.tensor(self.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, 3, 1, 1)
        x = (x - mean) / std
        x = x.to(next(self.model.parameters()).dtype)
        if x.device.type == "cpu" and self.precision == "bf16":
            x = x.contiguous(memory_format=torch.channels_last)
        with ClassTokenRows(self.model) as rows:
            logits = self.model(x)
        attention = combine(rows.rows, self.attention)
        probabilities = logits.float().softmax(dim=1)
        return probabilities.cpu(), attention.reshape(len(x), self.grid, self.grid).float().cpu()


class ClassTokenRows:
    """Collects, while the ViT runs, each block's attention row of the class token over the patch tokens.

    Only q of the class token and k of all tokens are needed, so the fused attention kernel stays in use. Blocks whose
    attention is not timm's standard one are run unfused and read at the input of `attn_drop`.
    """

    def __init__(self, model: nn.Module, exact: bool = False) -> None:
        """`exact` reads every block at `attn_drop` without fused attention: the reference for tests."""
        self.model = model
        self.exact = exact
        self.rows: list[Tensor] = []  # a [B, heads, g*g] float32 tensor per block
        self._undo: list[Any] = []

    def __enter__(self) -> ClassTokenRows:
        prefix = int(self.model.num_prefix_tokens)  # type: ignore[arg-type]
        for block in self.model.blocks:  # type: ignore[union-attr]
            attention = block.attn
            if self.exact or not _is_standard(attention):
                fused = getattr(attention, "fused_attn", False)
                attention.fused_attn = False
                self._undo.append(lambda a=attention, f=fused: setattr(a, "fused_attn", f))

                def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                    self.rows.append(inputs[0][:, :, 0, prefix:].float())

                self._undo.append(attention.attn_drop.register_forward_pre_hook(read).remove)
            else:

                def compute(module: nn.Module, _: Any, qkv: Tensor, a: Any = attention) -> None:
                    batch, tokens, _width = qkv.shape
                    q, k, _v = qkv.view(batch, tokens, 3, a.num_heads, a.head_dim).unbind(2)
                    q = a.q_norm(q[:, :1].transpose(1, 2)).float() * a.scale  # [B, heads, 1, d]
                    k = a.k_norm(k.transpose(1, 2)).float()  # [B, heads, tokens, d]
                    row = (q @ k.transpose(-2, -1)).softmax(dim=-1)
                    self.rows.append(row[:, :, 0, prefix:])

                self._undo.append(attention.qkv.register_forward_hook(compute).remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()


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
    """A ViT by its timm name (or by a .json: `{"arch", "kwargs", "classes", "weights", "mean", "std"}`).

    Args:
        name: timm's model name, or path of a .json beside its weights.
        weights: checkpoint path; .safetensors, or .pth read without running code. LF-ViT checkpoints are renamed.
        view: px, or auto: 112 for LF-ViT checkpoints, the model's own size otherwise.
        download: let timm fetch its own weights when `weights` is None.

    Raises:
        WeightsError: no such model, no or wrong weights, no class token, classes that do not fit.
    """
    kwargs: dict[str, Any] = {}
    classes: tuple[str, ...] | None = None
    mean = std = None
    if name.endswith(".json"):
        spec = _read_spec(Path(name))
        kwargs, classes = dict(spec.get("kwargs", {})), tuple(map(str, spec["classes"]))
        kwargs["num_classes"] = len(classes)
        mean, std = spec.get("mean"), spec.get("std")
        if weights is None and spec.get("weights"):
            weights = str(Path(name).parent / spec["weights"])
        name = spec["arch"]
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        raise WeightsError(f"selector={name}: timm has no such model; near: {', '.join(near) or 'timm.list_models()'}")
    if weights is None and not download:
        raise WeightsError(
            f"selector={name} has no weights here: give selector_weights=PATH (.safetensors or .pth), "
            "or download=true to let timm fetch them"
        )
    state, lf_vit = (None, False) if weights is None else read_state(Path(weights))
    if view == "auto":
        view = 112 if lf_vit else int(kwargs.get("img_size", _native_size(name)))
    kwargs["img_size"] = int(view)
    try:
        model = timm.create_model(name, pretrained=weights is None, **kwargs)
    except Exception as error:
        raise WeightsError(f"selector={name}: timm cannot build it at view={view} ({error}); choose a ViT") from error
    _check_vit(name, model)
    if state is not None:
        _load_state(model, state, Path(str(weights)))
    grid_size = model.patch_embed.grid_size
    if grid_size[0] != grid_size[1]:
        raise WeightsError(f"selector={name}: its token grid is {grid_size}, expected a square one")
    if classes is None:
        if model.num_classes != len(imagenet_synsets()):
            raise WeightsError(
                f"selector={name} has {model.num_classes} classes, expected ImageNet-1K's 1000; "
                "give a .json with `classes`"
            )
        classes = imagenet_synsets()
    model.eval().requires_grad_(False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    target = torch.device(device)
    config = timm.data.resolve_model_data_config(model)
    digest = sha256_file(Path(weights)) if weights else _state_digest(model)
    mean, std = tuple(mean or config["mean"]), tuple(std or config["std"])
    spec_content = json.dumps([name, sorted(kwargs.items()), classes, mean, std], default=str)
    return Selector(
        model=model.to(target, dtype),
        classes=classes,
        view=int(view),
        grid=int(grid_size[0]),
        mean=mean,
        std=std,
        sha256=digest,
        spec=hashlib.sha256(spec_content.encode()).hexdigest(),
        attention=attention,
        precision=precision,
        device=target,
    )


def precision_of(precision: str, device: str) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on this machine: fp16 on a GPU, bf16 on a processor that multiplies it in hardware, else fp32.

    The precision is part of what decides the scores: a set records the one that was used, never `auto`.
    """
    if precision != "auto":
        return precision  # type: ignore[return-value]
    if torch.device(device).type == "cuda":
        return "fp16"
    told = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(ask is not None and ask() for ask in told) else "fp32"


def token_grid(name: str, weights: str | None, view: int | str) -> int:
    """Side of the token grid that a selector would have, without its weights: methods that use no ViT cut as large as
    it would. 14, that of the usual ViTs at their own size, when it cannot be told."""
    try:
        spec: dict[str, Any] = _read_spec(Path(name)) if name.endswith(".json") else {"arch": name}
        kwargs = dict(spec.get("kwargs", {}))
        if view == "auto":
            lf_vit = weights is not None and read_state(Path(weights))[1]
            view = 112 if lf_vit else kwargs.get("img_size", _native_size(spec["arch"]))
        kwargs["img_size"] = int(view)
        with torch.device("meta"):
            model = timm.create_model(spec["arch"], pretrained=False, **kwargs)
        return int(model.patch_embed.grid_size[0])
    except Exception:
        return 14


def read_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint with timm's key names, and whether it was an LF-ViT (or CF-ViT) one.

    LF-ViT keeps two position embeddings (`pos_embed_list.0` for the coarse 112 px stage) and a `reuse_block` for its
    second stage: the first becomes `pos_embed`, the rest is left out.

    Raises:
        WeightsError: missing, damaged, not tensors, or a pickle that would run code.
    """
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}; expected the selector's weights (.safetensors or .pth)")
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


def sha256_file(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_standard(attention: nn.Module) -> bool:
    from timm.layers import Attention

    return type(attention) is Attention and attention.qkv is not None


def _native_size(name: str) -> int:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(config.input_size[-1]) if config is not None else 224


def _check_vit(name: str, model: nn.Module) -> None:
    problems = []
    if not hasattr(model, "blocks") or not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        problems.append("it is not a ViT (no blocks or patch grid)")
    elif getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 0) < 1:
        problems.append("it has no class token, whose attention the selection is made of")
    elif not all(hasattr(getattr(block, "attn", None), "attn_drop") for block in model.blocks):  # type: ignore[union-attr]
        problems.append("its blocks have no attention that can be read")
    if problems:
        raise WeightsError(
            f"selector={name}: {problems[0]}; choose e.g. deit_small_patch16_224 or vit_small_patch16_224"
        )


def _load_state(model: Any, state: dict[str, Tensor], path: Path) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        state = checkpoint_filter_fn(state, model)  # resamples the position embedding to the view
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise WeightsError(f"{path} does not fit the selector: {str(error)[:400]}") from error
    unexpected = [key for key in unexpected if not key.startswith("head_dist")]
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit the selector: missing {missing[:4]}{'...' if len(missing) > 4 else ''}, "
            f"unexpected {unexpected[:4]}{'...' if len(unexpected) > 4 else ''}"
        )
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise WeightsError(f"{path} holds values that are not finite; the file is damaged")


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
