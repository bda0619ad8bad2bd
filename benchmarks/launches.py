"""The kernels of a layer of ConvMixer-1536/20 and of its gradients, each launched once: for a profiler or for
compute-sanitizer (counters.py, gpu.py). Only what lies between cudaProfilerStart and cudaProfilerStop is of interest;
the same launches before that load the kernels."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import positive
from torch import Tensor

import convmixer_fast

MAP = 32  # height and width: 224 / 7


@dataclass(frozen=True)
class Inputs:
    """Everything the launches take: maps in both memory formats, weights by kernel size, and six vectors."""

    x: Tensor
    channels_last: Tensor
    weights: dict[int, Tensor]
    vectors: list[Tensor]

    @staticmethod
    def make(batch: int, channels: int, device: str) -> "Inputs":
        torch.manual_seed(0)
        x = torch.randn(batch, channels, MAP, MAP, device=device, dtype=torch.float16)
        return Inputs(
            x=x,
            channels_last=x.to(memory_format=torch.channels_last),
            weights={k: torch.randn(channels, 1, k, k, device=device, dtype=torch.float16) / k for k in (3, 9)},
            vectors=[torch.rand(channels, device=device) + 0.5 for _ in range(6)],
        )

    def fused(self, x: Tensor) -> Tensor:
        """What stands between two matrix products: prologue, convolution, GELU, BatchNorm, residual."""
        bias, scale, shift, *prologue = self.vectors
        return convmixer_fast.fused_depthwise(x, self.weights[9], bias, scale, shift, prologue=tuple(prologue))


@dataclass(frozen=True)
class Launch:
    """One operator.

    Attributes:
        name: of its row in a table.
        kernel: a part of the name of the kernel that counts; an operator may launch smaller ones beside it.
        maps: tensors of the size of x that it has to read or write, each once.
        run: launches it.
    """

    name: str
    kernel: str
    maps: int
    run: Callable[[Inputs], object]


LAUNCHES = (
    Launch("fused k=9", "depthwise_mma_kernel", 2, lambda inputs: inputs.fused(inputs.x)),
    Launch(
        "conv k=9",
        "depthwise_mma_kernel",
        2,
        lambda inputs: convmixer_fast.depthwise_conv2d(inputs.x, inputs.weights[9]),
    ),
    Launch(
        "conv k=3",
        "depthwise_mma_kernel",
        2,
        lambda inputs: convmixer_fast.depthwise_conv2d(inputs.x, inputs.weights[3]),
    ),
    Launch(
        "fused k=9 channels_last",
        "depthwise_mma_kernel",
        2,
        lambda inputs: inputs.fused(inputs.channels_last),
    ),
    Launch(
        "wgrad k=9",
        "depthwise_wgrad_mma_kernel",
        2,
        lambda inputs: torch.ops.convmixer_fast.depthwise_conv2d_wgrad(inputs.x, inputs.x, 9, 9, True),
    ),
    Launch(
        "pool",
        "activate_pool_kernel",
        1,
        lambda inputs: convmixer_fast.activate_pool(inputs.x, *inputs.vectors[:3]),
    ),
)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that this script shares with counters.py."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="images (%(default)s)")
    parser.add_argument("--channels", type=positive, default=1536, help="(%(default)s)")


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    args = parser.parse_args(argv)
    inputs = Inputs.make(args.batch, args.channels, args.device)
    for launch in LAUNCHES:
        launch.run(inputs)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        for launch in LAUNCHES:
            launch.run(inputs)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    print(f"launched {len(LAUNCHES)} operators on {args.batch} x {args.channels} maps of {MAP} x {MAP}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
