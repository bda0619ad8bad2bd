"""Trains a ConvMixer with a one-layer head to segment shapes, on its dense features, and draws what it predicts.

    python examples/segment.py [--steps N] [--output segmentation.png]

The images are generated: discs, crosses and triangles of random colours before noise. The network looks at patches of
4x4 pixels; the head, a 1x1 convolution, turns each patch's features into the classes of its 16 pixels. The picture
shows new images, larger than those of the training, with the optimized network's predictions.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor, nn
from tqdm import trange

from convmixer_fast import ConvMixer, optimize

CLASSES = {"background": "#e6e6e6", "disc": "#d1495b", "cross": "#3d6fb6", "triangle": "#edae49"}
PATCH = 4
TRAINED_SIZE, SHOWN_SIZE = 64, 96
N_TRAINING, BATCH_SIZE = 1024, 16
LEARNING_RATE = 1e-2


def shapes(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n images (n, 3, size, size) with two kinds of shapes each, and the class of every pixel (n, size, size)."""

    def uniform(*shape: int, low: float = 0, high: float = 1) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = uniform(n, 3, 1, 1) + 0.2 * torch.randn(n, 3, size, size, generator=generator)
    labels = torch.zeros(n, size, size, dtype=torch.int64)
    for image, label in zip(images, labels):
        for kind in (1 + torch.randperm(len(CLASSES) - 1, generator=generator)[:2]).tolist():
            radius = uniform(1, low=8, high=15)
            dy, dx = (grid - uniform(1, low=8, high=size - 8) for grid in (y, x))
            inside = {
                1: dy**2 + dx**2 < radius**2,
                2: (torch.maximum(dy.abs(), dx.abs()) < radius) & (torch.minimum(dy.abs(), dx.abs()) < radius / 3),
                3: (dy < radius / 2) & (dy > 1.7 * dx.abs() - radius),
            }[kind]
            label[inside] = kind
            image[:, inside] = uniform(3, 1) + 0.1 * torch.randn(3, int(inside.sum()), generator=generator)
    return images, labels


def segment(network: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    """The logits (N, classes, H, W) of images whose sides are multiples of PATCH."""
    return F.pixel_shuffle(head(network.forward_features(images)), PATCH)


def train(network: nn.Module, head: nn.Module, steps: int, generator: torch.Generator) -> None:
    images, labels = shapes(N_TRAINING, TRAINED_SIZE, generator)
    images = images.to(memory_format=torch.channels_last)  # the faster layout for training on a CPU
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in trange(steps, desc="training", unit="step", leave=False, disable=None):
        batch = torch.randint(N_TRAINING, (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(segment(network, head, images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def intersection_over_union(predicted: Tensor, labels: Tensor) -> list[float]:
    """Of each class: pixels that are predicted and are of it, over those that are either."""
    pairs = [(predicted == index, labels == index) for index in range(len(CLASSES))]
    return [((ours & theirs).sum() / (ours | theirs).sum()).item() for ours, theirs in pairs]


def draw(path: Path, images: Tensor, labels: Tensor, predicted: Tensor) -> None:
    """A row of inputs, one of truths and one of predictions."""
    colours = ListedColormap(list(CLASSES.values()))
    figure, rows = pyplot.subplots(3, len(images), figsize=(2 * len(images) + 0.4, 6.6), layout="constrained")
    for column, (image, label, ours) in enumerate(zip(images, labels, predicted)):
        rows[0, column].imshow(image.clamp(0, 1).permute(1, 2, 0))
        for axes, classes in ((rows[1, column], label), (rows[2, column], ours)):
            axes.imshow(classes, cmap=colours, vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
    for axes, name in zip(rows[:, 0], ("input", "truth", "prediction")):
        axes.set_ylabel(name, fontsize=12)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    handles = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in CLASSES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="batches to train on (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("segmentation.png"), help="the picture (%(default)s)")
    args = parser.parse_args()
    matplotlib.use("Agg")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = ConvMixer(dim=64, depth=4, kernel_size=7, patch_size=PATCH).to(memory_format=torch.channels_last)
    head = nn.Conv2d(network.dim, len(CLASSES) * PATCH**2, 1)
    train(network, head, args.steps, generator)

    images, labels = shapes(64, SHOWN_SIZE, generator)
    with torch.inference_mode():
        predicted = segment(network, head, images).argmax(1)
        optimized = segment(optimize(network), head, images).argmax(1)
    print(f"trained         {args.steps} batches of {BATCH_SIZE} images of {TRAINED_SIZE}x{TRAINED_SIZE}")
    for name, value in zip(CLASSES, intersection_over_union(optimized, labels)):
        print(f"{name:15} intersection over union {value:.3f} on new images of {SHOWN_SIZE}x{SHOWN_SIZE}")
    print(f"optimizing      changes the class of {(optimized != predicted).double().mean():.4%} of the pixels")
    draw(args.output, images[:5], labels[:5], optimized[:5])
    print(f"picture         {args.output}")


if __name__ == "__main__":
    main()
