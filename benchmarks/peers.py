"""Networks of other families in the paper's tables that timm has the parts of, but no name for."""

import functools
from collections.abc import Callable

from torch import nn


def _deit(size: str) -> nn.Module:
    import timm

    return timm.create_model(f"deit_{size}_patch16_224", patch_size=7)


def _resmlp(patch_size: int, **sizes: int) -> nn.Module:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    model = MlpMixer(patch_size=patch_size, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine, **sizes)
    model.default_cfg = dict(input_size=(3, 224, 224))  # as timm's models by name
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"deit_{size}_patch7_224": functools.partial(_deit, size) for size in ("base", "small", "tiny")},
    "resmlp_12_patch8_224": functools.partial(_resmlp, 8, num_blocks=12, embed_dim=384),
    "resmlp_big_24_patch16_224": functools.partial(_resmlp, 16, num_blocks=24, embed_dim=768),
}

# Rows of the paper's tables that stay empty here, and why.
_ISOTROPIC = "not in timm and not built here; the paper gives no throughput of it either"
EMPTY = {f"isotropic_mobilenetv3_patch{patch}": _ISOTROPIC for patch in (8, 16)}
