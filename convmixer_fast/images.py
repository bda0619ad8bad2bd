"""Image files as the input of a ConvMixer: found, read whatever their kind, prepared as timm does, classified."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

# What is decoded: image formats and the extensions looked for in folders. Other decoders of Pillow stay shut, some of
# them start programs.
FORMATS = {
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "JPEG": {".jpg", ".jpeg"},
    "PNG": {".png"},
    "PPM": {".pgm", ".ppm"},
    "TIFF": {".tif", ".tiff"},
    "WEBP": {".webp"},
}
EXTENSIONS = set().union(*FORMATS.values())

# How timm prepares images for its ConvMixers: default_cfgs in timm/models/convmixer.py.
CROP_FRACTION = 0.96
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def preprocess(image: Image.Image, size: int) -> Tensor:
    """An RGB image as the float32 (3, size, size) input of a ConvMixer, bit for bit as timm's evaluation transform.

    The short side is resized (bicubic) to floor(size / 0.96), the centre cropped, the result normalised by ImageNet's
    mean and standard deviation. Raises ValueError where the image is so long that resizing it would exhaust memory.
    """
    short = math.floor(size / CROP_FRACTION)
    width, height = (int(short * side / min(image.size)) for side in image.size)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too elongated: resized, {width} x {height}")
    # round() sends halves to the even neighbour, as torchvision's centre crop
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size))))
    return pixels.permute(2, 0, 1).float().div(255).sub(MEAN).div(STD)


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright by its EXIF data, 16-bit grey scaled to 8 bits.

    Transparency is dropped, as timm does; an animation gives its first frame. Raises ValueError for 32-bit grey, whose
    range of values is unknown, and whatever Pillow raises for a damaged file.
    """
    image: Image.Image
    with Image.open(path, formats=list(FORMATS)) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"32-bit grey (mode {image.mode}) has no known range of values: convert it to 8 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # which convert() would clip to 255
            image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        return image.convert("RGB")


def load_input(path: Path, size: int) -> Tensor | Exception:
    """The network's input from one file, or what went wrong: decoders raise nearly every type for a damaged file."""
    try:
        return preprocess(read_image(path), size)
    except Exception as error:
        return error


def find_images(paths: list[Path]) -> list[Path]:
    """The files as given, and in place of a folder the image files anywhere below it, sorted.

    Raises ValueError where a folder has none.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            if not inside:
                raise ValueError(f"no {', '.join(sorted(EXTENSIONS))} file in the folder {path}")
            found += inside
        else:
            found.append(path)
    return found


def predict(
    network: nn.Module, paths: list[Path], size: int, batch_size: int, device: str, dtype: torch.dtype
) -> Iterator[tuple[Path, Tensor | Exception]]:
    """For each image in turn its probabilities (n_classes,), float32 on the CPU, or why there are none."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            outcomes = list(pool.map(load_input, batch, repeat(size)))
            readable = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Tensor)}
            if readable:
                inputs = torch.stack(list(readable.values())).to(device, dtype)
                with torch.inference_mode():
                    probabilities = network(inputs).float().softmax(1).cpu()
                for index, row in zip(readable, probabilities):
                    finite = row.isfinite().all()
                    outcomes[index] = row if finite else OverflowError(f"the outputs are not finite in {dtype}")
            yield from zip(batch, outcomes)
