"""Makes timm importable beside a CPU build of torch, which the operators in torchvision's wheel do not load into."""

import pytest
import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # timm is not there either: its tests skip
except RuntimeError:  # operator torchvision::nms does not exist: torchvision looks them up while it is imported
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items):
    from convmixer_fast import build_info

    missing = build_info()["cuda_missing"] or ("no GPU is visible" if not torch.cuda.is_available() else None)
    if missing:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=missing))
