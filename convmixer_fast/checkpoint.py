"""Reads ConvMixer weights: the authors' releases, timm's, our own."""

import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._types import DTYPES, either
from .files import open_regular, printable
from .model import ACTIVATIONS, ALIASES, VARIANTS, ConvMixer, check_activation
from .stored import read_content

MAX_DEPTH = 1024  # layers, which are built one by one; the paper's deepest model has 32
_MAX_NESTING = 4  # levels of dicts and lists in which weights are looked for
_MAX_PREFIX = 200  # characters
_MAX_FOUND = 16
# Where a file has several, as trainers name what they go on with: timm and Lightning, torchvision, and many more.
_ENTRIES = ("state_dict", "state_dict_ema", "model", "model_ema", "model_state_dict", "ema_state_dict")

State = Mapping[str, Tensor]


def load_checkpoint(
    path: str | os.PathLike[str], activation: str | None = None, *, ema: bool | None = None
) -> ConvMixer:
    """The model whose weights are in a file, in eval mode, on the CPU, in the file's dtype.

    The file is ``.safetensors`` or what torch.save wrote. The keys of its weights are those of ConvMixer and timm, or
    of the authors' code (github.com/locuslab/convmixer), one nn.Sequential. They may begin with any prefix, as those of
    DistributedDataParallel, torch.compile, Lightning and AveragedModel do, and be in any entry, such as "state_dict" or
    "model", at most 4 entries deep. Sizes, residuals and norm are taken from the tensors. If their dtypes differ, the
    model gets the widest, which holds the values of all exactly. Files are read with weights_only=True: no code in them
    runs. Beside the weights there may be what torch allows, argparse.Namespace, defaultdict, paths of pathlib, NumPy's
    numbers and arrays; torch.serialization.add_safe_globals allows other classes.

    torch.save writes checksums of the bytes, which are compared. A .safetensors has none, nor has a file of torch.save
    before version 1.6 or without them: there, damage within a tensor goes unnoticed. So that no small file asks for
    much memory or time, these are refused: compressed entries, tensors larger than their bytes in the file or together
    than the file (layers that share weights), more than 1024 layers, in a zip a pickle of more than 64 MiB.

    Args:
        path: the file.
        activation: that of ConvMixer, such as "gelu", which no tensor tells. None: as the file name says, by the name
            of a model of these sizes (see list_models; convmixer_768_32 has ReLU) or by the activation's own.
        ema: which weights to take, where training also kept an average of them (EMA, SWA), as in timm's entry
            "state_dict_ema", torchvision's "model_ema", AveragedModel. True: the averaged ones; False: those that were
            trained; None: the averaged ones if there are any, as timm does, with a warning if there are both.

    Raises:
        OSError: the file cannot be opened, or is not a regular one.
        TypeError: ema is none of these.
        ValueError: the file is damaged, not a checkpoint of a ConvMixer, or has a tensor that does not fit; it has none
            of the weights that ema asks for, or several; or activation is needed.

    Warns:
        UserWarning: ema is None and the file has both.
    """
    path = Path(path)
    if activation is not None:
        check_activation(activation)
    if not (ema is None or isinstance(ema, bool)):
        raise TypeError(f"ema must be True, False or None, got {ema!r}")
    name = printable(path)
    with open_regular(path) as file:
        with _damage_named(name):
            content = read_content(file)
        found = _choose(_find(content, name), ema, name)
        size = os.fstat(file.fileno()).st_size
        state = _named_like_ours(_state(found, size, name), name)
        residual, norm = _ablation(state)
        sizes = _sizes(state, residual, name)
        if activation is None:
            activation = _activation_of_name(path, sizes)
        arguments: dict[str, Any] = dict(sizes, residual=residual, norm=norm)
        with torch.device("meta"):
            model = ConvMixer(**arguments, activation=activation)
        _check_fits(state, model, name)
    tensors = {key: _alone(tensor) for key, tensor in state.items()}
    dtype = reduce(torch.promote_types, (tensor.dtype for key, tensor in tensors.items() if not _is_counter(key)))
    tensors = {key: tensor.to(torch.int64 if _is_counter(key) else dtype) for key, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes make the readers raise nearly every type
        unadvised = error.__context__ if isinstance(error, UnpicklingError) else None  # torch tells to trust the file
        reason = _shown(str(unadvised or error).partition("\n")[0], 400) or type(error).__name__
        raise ValueError(f"{name} is damaged, or not a file of weights: {reason}") from error


class _Found(NamedTuple):
    """Weights of a ConvMixer: those items of a dict whose keys begin with a prefix."""

    items: dict[Any, object]
    prefix: str
    entries: tuple[str, ...]  # that lead to the dict
    averaged: bool

    def __str__(self) -> str:
        return _shown(".".join((*self.entries, self.prefix)).strip(".") or "the file itself", 60)


def _find(content: object, name: str) -> list[_Found]:
    """All weights of ConvMixers in a file, without those that are reached in a second way."""
    found: list[_Found] = []
    seen: set[int] = set()
    coming: deque[tuple[tuple[str, ...], object]] = deque([((), content)])
    while coming:
        entries, value = coming.popleft()
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        items = _items(value)
        for prefix in _prefixes(items):
            found.append(_Found(items, prefix, entries, _is_averaged(content, entries, items, prefix)))
            if len(found) > _MAX_FOUND:
                raise ValueError(f"{name} holds the weights of more than {_MAX_FOUND} ConvMixers")
        if len(entries) < _MAX_NESTING:
            coming.extend(((*entries, key), item) for key, item in items.items() if isinstance(key, str))
    if not found:
        held = [_shown(key) for key in list(content)[:3]] if isinstance(content, dict) else []
        raise ValueError(
            f"{name} holds no weights of a ConvMixer: it has neither a tensor stem.0.weight (ours, timm's) nor "
            f"0.weight (the authors'), but {_describe(content)}{' that begins with ' * bool(held)}{', '.join(held)}"
        )
    return found


def _items(value: dict[Any, object] | list[object] | tuple[object, ...]) -> dict[Any, object]:
    """By keys without what torch.compile inserts where it wraps a module, or some of its children."""
    if not isinstance(value, dict):
        return {str(index): item for index, item in enumerate(value)}
    items = {key.replace("_orig_mod.", "") if isinstance(key, str) else key: item for key, item in value.items()}
    return items if len(items) == len(value) else value


def _prefixes(items: Mapping[Any, object]) -> list[str]:
    """What precedes the keys of a ConvMixer: "module.", "" and the like."""
    keys = [
        key
        for key, value in items.items()
        if isinstance(key, str) and len(key) < _MAX_PREFIX and isinstance(value, Tensor)
    ]
    ours = [key.removesuffix("stem.0.weight") for key in keys if f".{key}".endswith(".stem.0.weight")]
    # Names only may precede a number: 3.0.fn.0.weight is the authors' too.
    firsts = [key.removesuffix("0.weight") for key in keys if re.fullmatch(r"([^\W\d]\w*\.)*0\.weight", key)]
    return ours or [prefix for prefix in firsts if f"{prefix}2.weight" in items]


def _is_averaged(content: object, entries: tuple[str, ...], items: Mapping[Any, object], prefix: str) -> bool:
    beside = content if isinstance(content, dict) else {}
    if entries == ("state_dict",) and "current_model_state" in beside:  # Lightning's WeightAveraging
        return True
    if "message_hub" in beside and "ema_state_dict" in beside:  # mmengine's EMAHook swaps the two
        return entries == ("state_dict",)
    if any(f"{prefix[: match.start()]}n_averaged" in items for match in re.finditer(r"\bmodule\.", prefix)):
        return True  # torch.optim.swa_utils.AveragedModel
    said = ".".join((*(entry[:_MAX_PREFIX] for entry in entries), prefix)).lower()
    return re.search(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])", said) is not None


def _choose(found: list[_Found], ema: bool | None, name: str) -> _Found:
    averaged = [weights for weights in found if weights.averaged]
    trained = [weights for weights in found if not weights.averaged]
    wanted = trained if ema is False or not (averaged or ema) else averaged
    if not wanted:
        kinds = ("averaged (EMA)", "other than averaged (EMA)")
        raise ValueError(f"{name} has no {kinds[not ema]} weights, which ema={ema} asks for, but {found[0]}")

    def rank(weights: _Found) -> int:
        last = weights.entries[-1] if weights.entries else _ENTRIES[0]
        return _ENTRIES.index(last) if last in _ENTRIES else len(_ENTRIES)

    wanted.sort(key=rank)
    if len(wanted) > 1 and rank(wanted[0]) == rank(wanted[1]):
        raise ValueError(f"{name} holds the weights of several ConvMixers: {', '.join(map(str, wanted[:4]))}")
    if ema is None and averaged and trained:
        warnings.warn(
            f"{name} has averaged (EMA) weights beside those that were trained: load_checkpoint takes the averaged "
            f"ones, {wanted[0]}; ema=True says so without this warning, ema=False takes {min(trained, key=rank)}",
            stacklevel=3,
        )
    return wanted[0]


def _state(found: _Found, size: int, name: str) -> dict[str, Tensor]:
    """The state dict, without the prefix, if its tensors need no more memory than the file has bytes."""
    state: dict[str, Tensor] = {}
    for key, value in found.items.items():
        if not isinstance(key, str):
            raise ValueError(f"{name} holds no state dict: {found} has a key that is no text")
        if not key.startswith(found.prefix):
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{name} holds no state dict: its entry {_shown(key)} is {_describe(value)}, accepted: a dense tensor"
            )
        held = value.untyped_storage().nbytes()
        if value.nbytes > held:
            shape = _shown(tuple(value.shape))
            raise ValueError(
                f"{name}: {_shown(key)} of shape {shape} needs {value.nbytes} bytes, its storage has {held}"
            )
        state[key.removeprefix(found.prefix)] = value
    needed = sum(tensor.nbytes for tensor in state.values())
    if needed > size:
        raise ValueError(f"{name} has {size} bytes, but {needed} of tensors: they share memory, accepted: each its own")
    return state


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in contiguous memory that holds nothing else."""
    alone = tensor.detach()
    whole = alone.is_contiguous() and alone.nbytes == alone.untyped_storage().nbytes()
    return alone if whole else alone.clone(memory_format=torch.contiguous_format)


def _named_like_ours(state: State, name: str) -> dict[str, Tensor]:
    """Renames the keys of the authors' nn.Sequential: 0-2 the stem, then the layers, pooling, flatten, classifier."""
    if "stem.0.weight" in state:
        return dict(state)
    numbered = re.compile(r"(0|[1-9][0-9]{0,4})(?=\.)")
    head = max(int(match[0]) for key in state if (match := numbered.match(key)))

    def rename(match: re.Match[str]) -> str:
        number = int(match[0])
        return f"stem.{number}" if number < 3 else "head" if number == head else f"blocks.{number - 3}"

    renamed = {numbered.sub(rename, key, count=1) if numbered.match(key) else key: state[key] for key in state}
    if len(renamed) < len(state):
        raise ValueError(f"{name} has keys of both the authors' code and ours")
    return renamed


def _ablation(state: State) -> tuple[tuple[str, ...], str]:
    """The arguments residual and norm of ConvMixer, by the keys of the first layer and of BatchNorm's statistics."""
    halves = {"spatial": "blocks.0.0.fn.", "channel": "blocks.0.1.fn."}
    residual = tuple(half for half, prefix in halves.items() if any(key.startswith(prefix) for key in state))
    return residual, "batch" if any(".running_" in key for key in state) else "layer"


def _sizes(state: State, residual: tuple[str, ...], name: str) -> dict[str, int]:
    """The arguments of ConvMixer that its tensors tell, each of which has as many elements as they say."""
    spatial = "blocks.0.0.fn.0.weight" if "spatial" in residual else "blocks.0.0.0.weight"
    channel = "blocks.0.1.fn.0.weight" if "channel" in residual else "blocks.0.1.weight"
    layouts: dict[str, tuple[str | int, ...]] = {
        "stem.0.weight": ("dim", "in_channels", "patch_size", "patch_size"),
        spatial: ("dim", 1, "kernel_size", "kernel_size"),
        channel: ("dim", "dim", 1, 1),
        "head.weight": ("n_classes", "dim"),
    }
    sizes: dict[str | int, int] = {1: 1}
    for key, layout in layouts.items():
        if key not in state:
            raise ValueError(f"{name} lacks {key}")
        shape = state[key].shape
        if 0 in shape:
            raise ValueError(f"{name}: {key} has shape {_shown(tuple(shape))}, accepted: sizes from 1 up")
        if len(shape) != len(layout) or any(sizes.setdefault(what, size) != size for what, size in zip(layout, shape)):
            expected = ", ".join(
                str(sizes.get(what, what)) if len(shape) == len(layout) else str(what) for what in layout
            )
            raise ValueError(f"{name}: {key} has shape {_shown(tuple(shape))}, expected ({expected})")
    found = {str(what): size for what, size in sizes.items() if what != 1}
    found["depth"] = sum(re.fullmatch(r"blocks\.[0-9]+\.1\.(fn\.0\.)?weight", key) is not None for key in state)
    if found["depth"] > MAX_DEPTH:
        raise ValueError(f"{name} has {found['depth']} layers, accepted: {MAX_DEPTH}")
    return found


def _activation_of_name(path: Path, sizes: dict[str, int]) -> str:
    names = {name: name for name in VARIANTS} | ALIASES
    known = (VARIANTS[name] for alias, name in names.items() if alias in path.name)
    compared = ("dim", "depth", "kernel_size", "patch_size")
    said = {variant.activation for variant in known if all(getattr(variant, size) == sizes[size] for size in compared)}
    said |= {activation for activation in ACTIVATIONS if activation in path.name.lower()}
    if len(said) != 1:
        raise ValueError(
            f"activation must be given, {either(map(repr, ACTIVATIONS))}: the file name {printable(path.name)} "
            + ("says both" if said else f"is not that of a known model of these sizes, {sizes}")
        )
    return said.pop()


def _check_fits(state: State, model: ConvMixer, name: str) -> None:
    """Raises ValueError with the first tensor that is missing, superfluous, or of another shape or kind of dtype."""
    expected = model.state_dict()
    for key, like in expected.items():
        if key not in state:
            if _is_counter(key):
                continue
            raise ValueError(f"{name} lacks {key}, which a ConvMixer of depth {model.depth} has")
        if state[key].shape != like.shape:
            raise ValueError(f"{name}: {key} has shape {_shown(tuple(state[key].shape))}, expected {tuple(like.shape)}")
        accepted = (torch.int64, *DTYPES) if _is_counter(key) else tuple(DTYPES)
        if state[key].dtype not in accepted:
            raise ValueError(f"{name}: {key} is {state[key].dtype}, accepted: {', '.join(map(str, accepted))}")
    for key in state:
        if key not in expected:
            raise ValueError(f"{name} has {_shown(key)}, which a ConvMixer of depth {model.depth} has not")


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")  # which BatchNorm does not need


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor ({str(value.layout).removeprefix('torch.')}, {value.device.type})"
    return "nothing" if isinstance(value, dict) and not value else type(value).__name__


def _shown(text: object, limit: int = 60) -> str:
    """Text from the file, for an error message."""
    return printable(text, limit)
