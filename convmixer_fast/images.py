"""Image files as the input of a ConvMixer: found, read whatever their kind, prepared as timm does, classified."""

import ctypes
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from .files import open_regular

# What is decoded, with the bytes a pixel that decoding and turning upright take at most, as measured with Pillow 13:
# progressive JPEGs are held as coefficients, libtiff and the last three hold the whole image several times. Other
# decoders of Pillow stay shut: some start programs, ICO decodes before its size can be asked, TGA has no signature.
FORMATS = {
    "BMP": 12,
    "GIF": 12,
    "JPEG": 12,
    "MPO": 12,  # what Pillow calls a JPEG file with more than one picture, as phones write
    "PNG": 12,
    "PPM": 12,
    "TIFF": 12,
    "AVIF": 16,
    "WEBP": 17,
    "JPEG2000": 26,
}
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}
DECODERS = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow, or one built without it, has no AVIF

# A small file may hold a huge image. So the images that threads decode at a time share these bytes, and one that needs
# more is refused: from 178,956,970 pixels on (12 bytes each), where Pillow takes an image for a decompression bomb.
MEMORY = 2 << 30
MAX_FILE_BYTES = MEMORY >> 2  # since of what is no pixels, such as EXIF data, Pillow may hold four copies

# How timm prepares images for its ConvMixers: default_cfgs in timm/models/convmixer.py.
CROP_FRACTION = 0.96
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

MAX_SIZE = 8192  # side of a network's input: its float32 values, with a copy, are 1.5 of the 2 GiB
MAX_RESIZED = 2**30 // 12  # pixels of an image once its short side has its new size


class Memory:
    """Bytes that threads share: each waits until what it takes is free."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = capacity
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, n_bytes: int) -> Iterator[None]:
        """Whoever needs more than there is waits to have all of it."""
        n_bytes = min(n_bytes, self.capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= n_bytes)
            self._free -= n_bytes
        try:
            yield
        finally:
            if n_bytes > self.capacity // 32 and _malloc_trim:
                _malloc_trim(0)
            with self._changed:
                self._free += n_bytes
                self._changed.notify_all()


# glibc keeps what a thread has freed for that thread, which adds up to an image of each one.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_memory = Memory(MEMORY)


def preprocess(image: Image.Image, size: int) -> Tensor:
    """An RGB image as the float32 (3, size, size) input of a ConvMixer, bit for bit as timm's evaluation transform.

    The short side is resized (bicubic) to floor(size / 0.96), the centre cropped, the result normalised by ImageNet's
    mean and standard deviation. Raises ValueError where the image is so long that resizing it would exhaust memory.
    """
    width, height = _resized(image, size)
    # round() sends halves to the even neighbour, as torchvision's centre crop
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size))))
    return pixels.permute(2, 0, 1).float().div_(255).sub_(MEAN).div_(STD)


def _resized(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of an image once it is resized. Raises ValueError where these are too large."""
    short = math.floor(size / CROP_FRACTION)
    width, height = (int(short * side / min(image.size)) for side in image.size)
    if width * height > MAX_RESIZED:
        raise ValueError(f"{image.width} x {image.height} pixels are too elongated: resized, {width} x {height}")
    return width, height


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header alone has been read.

    Raises:
        OSError: the file cannot be opened, is not a regular one, or not an image of FORMATS.
        ValueError: it is empty, or larger than MAX_FILE_BYTES, or its pixels take more than MEMORY.
    """
    with open_regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if not n_bytes:
            raise ValueError("the file is empty")
        if n_bytes > MAX_FILE_BYTES:
            raise ValueError(f"the file has {n_bytes} bytes, accepted: at most {MAX_FILE_BYTES}")
        try:
            image = Image.open(file, formats=DECODERS)
        except UnidentifiedImageError:  # it names the Python object of the file
            raise UnidentifiedImageError(f"not an image, or of another kind than {', '.join(DECODERS)}") from None
        with image:
            if _decoding_bytes(image) > MEMORY:
                most = MEMORY // FORMATS[str(image.format)]
                raise ValueError(
                    f"{image.width} x {image.height} pixels of {image.format} are too many, accepted: at most {most}"
                )
            yield image


def _decoding_bytes(image: Image.Image) -> int:
    pixels = image.width * image.height
    if image.format == "TIFF":  # a tile is decoded as a whole, even one that reaches far beyond the image
        width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))  # type: ignore[attr-defined]
        pixels = max(pixels, width * height)
    return pixels * FORMATS[str(image.format)]


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright by its EXIF data, 16-bit grey scaled to 8 bits.

    Transparency is dropped, as timm does; an animation gives its first frame. Raises as opened does, ValueError for
    32-bit grey, whose range of values is unknown, and whatever Pillow raises for a damaged file.
    """
    with opened(path) as image:
        white = _white(image)
        ImageOps.exif_transpose(image, in_place=True)
        if white:
            return _eight_bits(image, white).convert("RGB")
        if image.mode == "La":
            return image.convert("LA").convert("RGB")
        return image.convert("RGB") if image.mode != "RGB" else image


def _white(image: Image.Image) -> int | None:
    """The largest value of grey of more than 8 bits, which convert() would clip to 255; None for other images."""
    if image.format == "TIFF" and image.mode == "I;16" and image.tag_v2.get(258) == (12,):  # type: ignore[attr-defined]
        return 4095
    # Pillow before 11.3 has 16-bit PNG in mode I, and any has such PGM so; neither format has grey of 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey (mode {image.mode}) has no known range of values: convert it to 8 bits")
    return None


def _eight_bits(image: Image.Image, white: int) -> Image.Image:
    """Grey of values up to white, rounded to 8 bits, in integers and in place for float64 takes four times as much."""
    values = np.asarray(image).astype(np.uint32)
    values *= 2 * 255
    values += white
    values //= 2 * white
    return Image.fromarray(values.astype(np.uint8))


def load_input(path: Path, size: int) -> Tensor | Exception:
    """The network's input from one file, or what went wrong: decoders raise nearly every type for a damaged file.

    Waits for its part of MEMORY: first for what reading the header may take, then for what the pixels do.
    """
    try:
        for_metadata = 4 * path.stat().st_size
        with _memory.taken(for_metadata), opened(path) as image:
            width, height = _resized(image, size)
            needed = for_metadata + _decoding_bytes(image) + 4 * width * height + 24 * size * size
        with _memory.taken(needed):
            return preprocess(read_image(path), size)
    except Exception as error:
        # What it refers to, its traceback's frames above all, would keep the image in memory.
        error.__cause__ = error.__context__ = error.__traceback__ = None
        return error


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keeps from stderr what Pillow and its libtiff write there, which does not say of which file it is.

    What makes a file unreadable is in its exception, too; the rest is about metadata that is passed over, and about
    sizes for which there is a limit here.
    """
    silent = logging.NullHandler()
    logging.getLogger("PIL").addHandler(silent)
    handlers = [(setter, setter(None)) for setter in _error_handler_setters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        for setter, handler in handlers:
            setter(handler)
        logging.getLogger("PIL").removeHandler(silent)


def _error_handler_setters() -> list[Callable[[int | None], int | None]]:
    """TIFFSetErrorHandler of each libtiff in this process: it takes a function's address, and returns the last one."""
    paths: set[str] = set()
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:  # elsewhere than on Linux: none
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "libtiff" in line}
    setters = [ctypes.CDLL(path).TIFFSetErrorHandler for path in sorted(paths)]
    for setter in setters:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    return list(setters)


def find_images(paths: list[Path]) -> list[Path]:
    """The files as given, and in place of a folder the image files anywhere below it, sorted.

    Links to folders are not followed below one. A folder that cannot be listed stands for itself, so that reading it
    says why. Raises ValueError where a folder has none.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir it raises nothing
            inside = sorted(_images_below(path))
            if not inside:
                raise ValueError(f"no {', '.join(sorted(EXTENSIONS))} file in the folder {path}")
            found += inside
        else:
            found.append(path)
    return found


def _images_below(folder: Path) -> Iterator[Path]:
    """Without recursion, which os.walk has before Python 3.12 and which ends at some depth."""
    pending = [os.fspath(folder)]
    while pending:
        path = pending.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not os.path.isdir(entry.path):
                        yield Path(entry.path)
        except OSError:
            yield Path(path)


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
