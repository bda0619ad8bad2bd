"""Reads ConvMixer weights: the authors' releases, timm's, our own."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .model import ACTIVATIONS, ALIASES, VARIANTS, ConvMixer, check_activation


def load_checkpoint(path: str | os.PathLike[str], activation: str | None = None) -> ConvMixer:
    """The model whose weights are in a file, in eval mode, on the CPU, in the file's dtype.

    The file is ``.safetensors``, or else what torch.save wrote: a state dict, alone or as the entry "state_dict", whose
    keys may all begin with "module.". The keys are those of ConvMixer and timm, or of the authors' code
    (github.com/locuslab/convmixer), one nn.Sequential. Sizes, residuals and norm are taken from the tensors. Files
    are read with weights_only=True: no code in them runs.

    Args:
        path: the file.
        activation: "gelu" or "relu", which no tensor tells. None: as the file name says, by the name of a model of
            these sizes (see list_models; convmixer_768_32 has ReLU) or by the word "gelu" or "relu".

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, not a checkpoint of a ConvMixer, or has a tensor that does not fit; or activation
            is needed.
    """
    path = Path(path)
    if activation is not None:
        check_activation(activation)
    state = _named_like_ours(_state_dict(_read(path), path), path)
    residual, norm = _ablation(state)
    sizes = _sizes(state, residual, path)
    if activation is None:
        activation = _activation_of_name(path, sizes)
    arguments: dict[str, Any] = dict(sizes, residual=residual, norm=norm)
    with torch.device("meta"):
        model = ConvMixer(**arguments, activation=activation)
    _check_fits(state, model, path)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(path: Path) -> object:
    with path.open("rb") as file:
        try:
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its options
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make the readers raise nearly every type
            reason = re.split(r"\. |\n", str(error).rpartition("WeightsUnpickler error:")[2].strip())[0]
            raise ValueError(
                f"{path} is damaged, or not a file of weights alone: {reason or type(error).__name__}"
            ) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content, without the prefix of DistributedDataParallel."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict, but {_describe(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state dict: its entry {key!r} is {_describe(value)}")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): tensor for key, tensor in content.items()}
    return dict(content)


def _named_like_ours(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Renames the keys of the authors' nn.Sequential: 0-2 the stem, then the layers, pooling, flatten, classifier."""
    if "stem.0.weight" in state:
        return state
    if "0.weight" not in state:
        raise ValueError(
            f"{path} is not of a ConvMixer: it has neither stem.0.weight (ours, timm's) nor 0.weight (the authors'); "
            f"it begins with {', '.join(list(state)[:3])}"
        )
    head = max(int(number) for key in state if (number := key.partition(".")[0]).isdecimal())

    def rename(match: re.Match[str]) -> str:
        number = int(match[0])
        return f"stem.{number}" if number < 3 else "head" if number == head else f"blocks.{number - 3}"

    return {re.sub(r"^[0-9]+", rename, key): tensor for key, tensor in state.items()}


def _ablation(state: dict[str, Tensor]) -> tuple[tuple[str, ...], str]:
    """The arguments residual and norm of ConvMixer, by the keys of the first layer and of BatchNorm's statistics."""
    halves = {"spatial": "blocks.0.0.fn.", "channel": "blocks.0.1.fn."}
    residual = tuple(half for half, prefix in halves.items() if any(key.startswith(prefix) for key in state))
    return residual, "batch" if any(".running_" in key for key in state) else "layer"


def _sizes(state: dict[str, Tensor], residual: tuple[str, ...], path: Path) -> dict[str, int]:
    """The arguments of ConvMixer that its tensors tell."""

    def shape(key: str, layout: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"{path} lacks {key}")
        if state[key].dim() != layout.count(",") + 1:
            raise ValueError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected ({layout})")
        return state[key].shape

    depthwise = "blocks.0.0.fn.0.weight" if "spatial" in residual else "blocks.0.0.0.weight"
    dim, in_channels, patch_size, _ = shape("stem.0.weight", "dim, in_channels, patch_size, patch_size")
    sizes = dict(
        dim=dim,
        depth=sum(re.fullmatch(r"blocks\.[0-9]+\.1\.(fn\.0\.)?weight", key) is not None for key in state),
        kernel_size=shape(depthwise, "dim, 1, kernel_size, kernel_size")[2],
        patch_size=patch_size,
        n_classes=shape("head.weight", "n_classes, dim")[0],
        in_channels=in_channels,
    )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{path} is not of a ConvMixer: by its tensors, {name} is {size}")
    return sizes


def _activation_of_name(path: Path, sizes: dict[str, int]) -> str:
    names = {name: name for name in VARIANTS} | ALIASES
    known = (VARIANTS[name] for alias, name in names.items() if alias in path.name)
    compared = ("dim", "depth", "kernel_size", "patch_size")
    said = {variant.activation for variant in known if all(getattr(variant, size) == sizes[size] for size in compared)}
    said |= {activation for activation in ACTIVATIONS if activation in path.name.lower()}
    if len(said) != 1:
        raise ValueError(
            f"activation must be given, 'gelu' or 'relu': the file name {path.name} "
            + ("says both" if said else f"is not that of a known model of these sizes, {sizes}")
        )
    return said.pop()


def _check_fits(state: dict[str, Tensor], model: ConvMixer, path: Path) -> None:
    """Raises ValueError with the first tensor that is missing, superfluous, or of another shape or dtype."""
    dtype = state["stem.0.weight"].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{path}: stem.0.weight is {dtype}, expected a floating dtype")
    expected = model.state_dict()
    for key, like in expected.items():
        counter = key.endswith("num_batches_tracked")  # which BatchNorm does not need
        if key not in state:
            if counter:
                continue
            raise ValueError(f"{path} lacks {key}, which a ConvMixer of depth {model.depth} has")
        if state[key].shape != like.shape:
            raise ValueError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(like.shape)}")
        if not counter and state[key].dtype != dtype:
            raise ValueError(f"{path}: {key} is {state[key].dtype}, expected {dtype} as stem.0.weight")
    for key in state:
        if key not in expected:
            raise ValueError(f"{path} has {key}, which a ConvMixer of depth {model.depth} has not")


def _describe(value: object) -> str:
    return "nothing" if isinstance(value, dict) and not value else type(value).__name__
