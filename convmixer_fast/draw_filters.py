"""Pictures of what a ConvMixer has learned, as in the paper's appendix C: its patch embedding and depthwise kernels."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .files import replacing
from .model import ConvMixer

WIDTH, LARGEST_FILTER = 2000, 240  # pixels at most: of a picture, unless its filters are many; of a filter's side
MAX_PIXELS = 1 << 25  # a picture's, each at least a weight: colours take up to 60 bytes per weight while computed
GAP, MARGIN, FONT_SIZE = 3, 16, 20
GREY = 80  # between filters, since white is a weight of 0
SIGNS = "blue negative, red positive"
POSITIVE, NEGATIVE = np.array([178, 24, 43]), np.array([33, 102, 172])  # the ends of a red and blue colour map


def draw_weights(model: ConvMixer, folder: Path) -> list[Path]:
    """Writes a PNG of the patch embedding and one of the depthwise kernels of each layer, and returns their paths.

    Filters are in the order of the channels, row by row. Patches of three channels are shown as RGB, each filter
    stretched from its smallest to its largest weight; whatever else is blue below 0, white at 0 and red above, each
    kernel scaled to its largest weight. A picture is written as a whole or not at all.

    Raises:
        OSError: the folder cannot be made, or a picture not be written.
        ValueError: weights are not finite, or too many for a picture; no picture is drawn.
    """
    patches, layers = model.get_parameter("stem.0.weight").detach(), depthwise_weights(model)
    _check(patches.flatten(0, 1) if model.in_channels != 3 else patches[:, 0], patches, "the patch embedding")
    for number, kernels in enumerate(layers, 1):
        _check(kernels, kernels, f"layer {number}")
    folder.mkdir(parents=True, exist_ok=True)
    size = f"{model.patch_size}x{model.patch_size}"
    if model.in_channels == 3:
        colours, how = _rgb(patches), "as RGB"
    else:
        colours, how = _diverging(patches.flatten(0, 1)), SIGNS
        if model.in_channels > 1:
            how = f"{model.in_channels} channels of each in turn, {SIGNS}"
    what = f"Patch embedding: {_count(model.dim, 'filter')} of {size}, {how}"
    paths = [_save(folder / "patch_embedding.png", colours, what)]
    digits = len(str(model.depth))
    size = f"{model.kernel_size}x{model.kernel_size}"
    for number, kernels in enumerate(layers, 1):
        what = f"Layer {number} of {model.depth}: {_count(model.dim, 'depthwise kernel')} of {size}, {SIGNS}"
        paths.append(_save(folder / f"layer_{number:0{digits}}.png", _diverging(kernels), what))
    return paths


def depthwise_weights(model: ConvMixer) -> list[Tensor]:
    """The kernels (dim, k, k) of each layer."""
    convolutions = [module for module in model.blocks.modules() if isinstance(module, nn.Conv2d)]
    return [depthwise.weight.detach().squeeze(1) for depthwise in convolutions[::2]]  # pointwise are between


def _check(shown: Tensor, weights: Tensor, where: str) -> None:
    """Raises ValueError where there is no picture of the weights, shown as filters (N, height, width)."""
    n, height, width = shown.shape
    _, _, grid_height, grid_width = _grid(n, height, width)
    if grid_height * grid_width > MAX_PIXELS:
        raise ValueError(
            f"{where} has {n} filters of {height} x {width}, a picture of {grid_width} x {grid_height} pixels, "
            f"accepted: at most {MAX_PIXELS}"
        )
    if not weights.isfinite().all():
        raise ValueError(f"{where} has weights that are not finite (nan or inf)")


def _grid(n: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Of n filters near to square in number: columns, our pixels to one of a filter, height and width in pixels."""
    columns = math.ceil(math.sqrt(1.5 * n)) if n > 1 else 1
    scale = max(1, min((WIDTH - 2 * MARGIN) // columns - GAP, LARGEST_FILTER) // width)
    rows = math.ceil(n / columns)
    return columns, scale, rows * (height * scale + GAP) + GAP, columns * (width * scale + GAP) + GAP


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _rgb(filters: Tensor) -> np.ndarray:
    """(N, 3, k, k) to colours (N, k, k, 3), uint8."""
    low, high = filters.double().flatten(1).aminmax(dim=1)
    low, span = low.view(-1, 1, 1, 1), (high - low).clamp(min=1e-30).view(-1, 1, 1, 1)
    return ((filters.double() - low) / span * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _diverging(kernels: Tensor) -> np.ndarray:
    """(N, k, k) to colours (N, k, k, 3), uint8."""
    values = kernels.double().numpy()[..., None]
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    values = values / np.where(largest == 0, 1, largest)
    colours = 255 + np.abs(values) * (np.where(values > 0, POSITIVE, NEGATIVE) - 255)
    return np.round(colours).astype(np.uint8)


def _save(path: Path, colours: np.ndarray, caption: str) -> Path:
    """The filters as a grid with a caption."""
    n, height, width, _ = colours.shape
    columns, scale, grid_height, grid_width = _grid(n, height, width)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    grid = np.full((grid_height, grid_width, 3), 255, np.uint8)
    for index, colour in enumerate(colours.repeat(scale, axis=1).repeat(scale, axis=2)):
        y, x = index // columns * step_y, index % columns * step_x
        grid[y : y + step_y + GAP, x : x + step_x + GAP] = GREY
        grid[y + GAP : y + step_y, x + GAP : x + step_x] = colour

    font = ImageFont.load_default(FONT_SIZE)
    left, _, right, bottom = font.getbbox(caption)
    top = 2 * MARGIN + math.ceil(bottom)
    size = (2 * MARGIN + max(grid.shape[1], math.ceil(right - left)), top + grid.shape[0] + MARGIN)
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((MARGIN, MARGIN), caption, "black", font)
    picture.paste(Image.fromarray(grid), (MARGIN, top))
    with replacing(path) as partial:
        picture.save(partial, "PNG")
    return path
