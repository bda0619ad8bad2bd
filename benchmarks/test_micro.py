"""Time of one call of each operator on a ConvMixer's map, with pytest-benchmark: `pytest benchmarks/test_micro.py`.

For work on a kernel: `--benchmark-autosave`, change it, `--benchmark-compare`. throughput.py and depthwise.py are what
is published.
"""

import pytest
import torch

import convmixer_fast

BATCH, CHANNELS, SIDE, KERNEL = 4, 256, 32, 9
DEVICES = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.float16)]


@pytest.fixture(params=DEVICES, ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}")
def layer(request) -> dict[str, torch.Tensor]:
    device, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    torch.manual_seed(0)
    vectors = torch.rand(3, CHANNELS, device=device)
    return dict(
        x=torch.randn(BATCH, CHANNELS, SIDE, SIDE, device=device, dtype=dtype).contiguous(
            memory_format=torch.contiguous_format if device == "cuda" else torch.channels_last
        ),
        weight=torch.randn(CHANNELS, 1, KERNEL, KERNEL, device=device, dtype=dtype),
        bias=vectors[0],
        scale=vectors[1],
        shift=vectors[2],
    )


def finished(operator, *arguments):
    """Calls it and waits for its result."""
    result = operator(*arguments)
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def test_depthwise_conv2d(benchmark, layer):
    benchmark(finished, convmixer_fast.depthwise_conv2d, layer["x"], layer["weight"])


def test_fused_depthwise(benchmark, layer):
    prologue = layer["bias"], layer["scale"], layer["shift"]
    benchmark(finished, convmixer_fast.fused_depthwise, *layer.values(), "gelu", True, prologue)


def test_activate_pool(benchmark, layer):
    benchmark(finished, convmixer_fast.activate_pool, layer["x"], layer["bias"], layer["scale"], layer["shift"])
