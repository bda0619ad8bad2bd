"""What depthwise_conv2d does under torch.autocast: it casts its arguments, as torch.conv2d does."""

import torch
from torch import Tensor

_ops = torch.ops.convmixer_fast
_library = torch.library.Library("convmixer_fast", "FRAGMENT")
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def _register_autocast(device_type: str) -> None:
    def cast(tensor: Tensor | None) -> Tensor | None:
        """As torch.conv2d's: float64 and what is on another device stay as they are."""
        if tensor is None or tensor.device.type != device_type or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type)) if tensor.is_floating_point() else tensor

    def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST[device_type])):
            return _ops.depthwise_conv2d.default(cast(x), cast(weight), cast(bias))

    _library.impl("depthwise_conv2d", depthwise_conv2d, _AUTOCAST[device_type].name)


for _device_type in _AUTOCAST:
    _register_autocast(_device_type)
