"""A ConvMixer written independently of the package, and weights that hide nothing."""

import copy

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return x + self.fn(x)


def plain_convmixer(
    dim, depth, kernel_size, patch_size, n_classes=10, in_channels=3, activation=nn.GELU, padding="same"
):
    """The network of the paper's Figure 3 in plain PyTorch, with the module names of the authors' nn.Sequential."""
    layers = [nn.Conv2d(in_channels, dim, patch_size, patch_size), activation(), nn.BatchNorm2d(dim)]
    for _ in range(depth):
        spatial = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=padding)
        layers.append(
            nn.Sequential(
                Residual(nn.Sequential(spatial, activation(), nn.BatchNorm2d(dim))),
                nn.Conv2d(dim, dim, 1),
                activation(),
                nn.BatchNorm2d(dim),
            )
        )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, n_classes))


def randomize(model, seed=0):
    """Gives every BatchNorm statistics and an affine map like a trained one's, unlike the defaults; sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.5, generator)
            nn.init.uniform_(module.running_var, 0.2, 2, generator)
            nn.init.normal_(module.weight, 1, 0.3, generator)
            nn.init.normal_(module.bias, 0, 0.3, generator)
    return model.eval()


def copy_weights(source, target):
    """Copies all tensors between models that differ in names only; sets eval mode."""
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))
    return target.eval()


def float64_logits(model, x):
    """What the model computes in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())
