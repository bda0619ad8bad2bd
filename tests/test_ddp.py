"""Training on two processes: the gradients are those of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from convmixer_fast import DepthwiseConv2d

IMAGES = torch.randn(6, 3, 9, 8, generator=torch.Generator().manual_seed(1)).double()


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, stride=2), DepthwiseConv2d(8, 5), nn.GELU(), nn.Conv2d(8, 8, 1), DepthwiseConv2d(8, (2, 3))
    ).double()


def loss(model, images):
    return (model(images) ** 2).mean()


def train(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(build())
    loss(model, IMAGES[rank::2]).backward()
    torch.save([parameter.grad for parameter in model.parameters()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path):
    mp.spawn(train, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    model = build()
    loss(model, IMAGES).backward()
    alone = build()
    loss(alone, IMAGES[::2]).backward()
    assert not torch.allclose(model[1].weight.grad, alone[1].weight.grad), "the processes see different images"
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-12)
