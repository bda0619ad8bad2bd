"""Image files of every kind that is read, and those that no one should send: huge, hostile, damaged, never ending."""

import collections
import gc
import inspect
import io
import os
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import fuzz_run

images = pytest.importorskip("convmixer_fast.images")
from PIL import Image, UnidentifiedImageError, features  # noqa: E402

SIZE = 32


def picture(width=48, height=40, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def png(width, height, rows=b"", depth=8, colour=2):
    """A PNG that claims a size, whatever its compressed rows hold."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(tags, pixels):
    """A little-endian TIFF of the tags {number: (type, value)}, the only strip or tile of which is pixels."""
    places = 273, 324
    entries, start = b"", 8 + 2 + 12 * len(tags) + 4
    for number, (kind, value) in sorted(tags.items()):
        entries += struct.pack("<HHII", number, kind, 1, start if number in places else value)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def animation():
    return [picture(), picture().rotate(90), picture().rotate(180)]


def rgb_of(content, tmp_path, name="image"):
    (tmp_path / name).write_bytes(content)
    read = images.read_image(tmp_path / name)
    assert read.mode == "RGB"
    return np.asarray(read)


def first_of_many(name, **options):
    first, *rest = animation()
    return saved(first, name, save_all=True, append_images=rest, **options)


needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
needs_jpeg2000 = pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: saved(picture(), "JPEG2000", irreversible=False), id="jpeg2000", marks=needs_jpeg2000),
        pytest.param(lambda: first_of_many("PNG"), id="apng"),
        pytest.param(lambda: first_of_many("WEBP", lossless=True), id="webp"),
        pytest.param(lambda: first_of_many("TIFF"), id="tiff"),
        pytest.param(lambda: first_of_many("TIFF", compression="tiff_lzw"), id="tiff_lzw"),
        pytest.param(lambda: saved(picture(), "TIFF", compression="tiff_adobe_deflate"), id="tiff_deflate"),
        pytest.param(lambda: saved(picture(), "TIFF", compression="packbits"), id="tiff_packbits"),
    ],
)
def test_first_picture_exactly(tmp_path, content):
    """Of what holds it losslessly, among other pictures or alone."""
    np.testing.assert_array_equal(rgb_of(content(), tmp_path), np.asarray(picture()))


@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param("AVIF", {"quality": 95}, marks=needs_avif),
        pytest.param("AVIF", {"quality": 95, "save_all": True}, marks=needs_avif),
        ("MPO", {"quality": 95, "save_all": True}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("GIF", {"save_all": True}),
        ("WEBP", {"quality": 95}),
    ],
)
def test_first_picture_nearly(tmp_path, name, options):
    options = options | {"append_images": animation()[1:]} if "save_all" in options else options
    read = rgb_of(saved(picture(), name, **options), tmp_path)
    assert np.abs(read.astype(int) - np.asarray(picture())).mean() < 8
    assert np.abs(read.astype(int) - np.asarray(animation()[2])).mean() > 20


def test_modes(tmp_path):
    """Each as Pillow alone converts it, as timm does; of premultiplied grey the alpha channel is undone, as of RGB."""
    for mode, name in [
        ("1", "TIFF"),
        ("LA", "PNG"),
        ("LA", "TIFF"),
        ("P", "PNG"),
        ("RGBA", "TIFF"),
        ("RGBX", "TIFF"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
        ("L", "JPEG"),
        ("PA", "TIFF"),
    ]:
        image = picture().convert("P").convert("PA") if mode == "PA" else picture(mode="RGB")
        if mode == "LAB":
            image = Image.merge("LAB", picture().split())
        content = saved(image.convert(mode) if image.mode != mode else image, name)
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(rgb_of(content, tmp_path), shown, err_msg=f"{mode} {name}")

    premultiplied = {256: (4, 2), 257: (4, 1), 258: (3, 8), 259: (3, 1), 338: (3, 1)}
    tags = premultiplied | {262: (3, 1), 273: (4, 0), 277: (3, 2), 278: (4, 1), 279: (4, 4)}
    content = tiff(tags, bytes([60, 120, 200, 255]))
    assert Image.open(io.BytesIO(content)).mode == "La"
    assert rgb_of(content, tmp_path)[0, :, 0].tolist() == [60 * 255 // 120, 200]


def grey16():
    return np.arange(0, 65536, 23, dtype=np.uint16)[: 40 * 70].reshape(40, 70)


@pytest.mark.parametrize("form", ["png", "pgm", "tiff little", "tiff big", "jpeg2000"])
def test_grey_of_16_bits(tmp_path, form):
    values = grey16()
    image = Image.fromarray(values)
    if form == "pgm":
        content = b"P5 70 40 65535\n" + values.astype(">u2").tobytes()
    elif form == "tiff big":
        file = io.BytesIO()
        Image.frombytes("I;16B", (70, 40), values.astype(">u2").tobytes()).save(file, "TIFF")
        content = file.getvalue()
    elif form == "jpeg2000":
        if not features.check("jpg_2000"):
            pytest.skip("this Pillow has no JPEG 2000")
        content = saved(image, "JPEG2000", irreversible=False)
    else:
        content = saved(image, form.split()[0].upper())
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(rgb_of(content, tmp_path), expected[..., None].repeat(3, 2))


def test_grey_of_16_bits_as_older_pillow_has_it():
    """In mode I, with the same values."""
    image = Image.fromarray(grey16().astype(np.int32))
    image.format = "PNG"
    assert images._white(image) == 65535
    image.format = "TIFF"
    with pytest.raises(ValueError, match="32-bit grey .mode I. has no known range"):
        images._white(image)


def test_grey_of_12_bits(tmp_path):
    """As cameras and microscopes write TIFF: 4095 is white."""
    values = [0, 16, 2048, 4095]
    packed = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in zip(values[::2], values[1::2]))
    tags = {256: (4, 4), 257: (4, 1), 258: (3, 12), 259: (3, 1), 262: (3, 1), 273: (4, 0), 277: (3, 1)}
    content = tiff(tags | {278: (4, 1), 279: (4, 6)}, packed)
    assert rgb_of(content, tmp_path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_finds_every_extension(tmp_path):
    names = ["a.jfif", "b.JPE", "c.mpo", "d.PNG", "e.apng", "f.jp2", "g.pnm", "h.tif", "i.ico", "j.eps", "k.tga"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in images.find_images([tmp_path])] == names[:8]


@pytest.mark.parametrize("name", ["EPS", "ICO", "TGA", "PDF"])
def test_other_decoders_stay_shut(tmp_path, name):
    (tmp_path / "image.png").write_bytes(saved(picture(), name))
    with pytest.raises(UnidentifiedImageError, match="not an image, or of another kind than BMP, GIF, "):
        images.read_image(tmp_path / "image.png")


# ---- what is refused by its header ----------------------------------------------------------------------------------

LIMIT = images.MEMORY // 12


def huge_webp():
    content = bytearray(saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    bits = struct.unpack_from("<I", content, 21)[0]
    struct.pack_into("<I", content, 21, bits & ~0xFFFFFFF | 16383 << 14 | 16383)
    return bytes(content)


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda: png(13400, 13400), f"13400 x 13400 pixels of PNG are too many, accepted: at most {LIMIT}"),
        (lambda: png(2**31 - 1, 2**31 - 1), "pixels of PNG are too many"),
        (lambda: b"P6 20000 20000 255\n", "20000 x 20000 pixels of PPM are too many"),
        (
            lambda: saved(picture(), "GIF")[:6] + b"\xff" * 4 + saved(picture(), "GIF")[10:],
            "65535 x 65535 pixels of GIF are",
        ),
        (huge_webp, "16384 x 16384 pixels of WEBP are too many"),
        (
            lambda: tiff(
                {256: (4, 64), 257: (4, 64), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1)}
                | {322: (4, 20000), 323: (4, 20000), 324: (4, 0), 325: (4, 4)},
                zlib.compress(bytes(1000)),
            ),
            "64 x 64 pixels of TIFF are too many",
        ),
    ],
)
@pytest.mark.parametrize("trusting", [False, True])
def test_too_many_pixels(tmp_path, monkeypatch, content, reason, trusting):
    """By our limit, where Pillow's was lifted by who uses it, as well; nothing is decoded."""
    if trusting:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb").write_bytes(content())
    monkeypatch.setattr(Image.Image, "convert", None)
    outcome = images.load_input(tmp_path / "bomb", SIZE)
    assert isinstance(outcome, Exception)
    if trusting:
        assert reason in str(outcome) and not isinstance(outcome, TypeError), outcome


def test_each_kind_has_a_limit_of_its_own(tmp_path, monkeypatch):
    """By the memory that its decoder takes: of the smallest, one pixel more is refused."""
    for name in images.DECODERS:
        content = saved(picture(20, 20), name)
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(images, "MEMORY", 400 * images.FORMATS[name])
        assert images.read_image(tmp_path / name).size == (20, 20)
        monkeypatch.setattr(images, "MEMORY", 399 * images.FORMATS[name])
        with pytest.raises(ValueError, match=f"20 x 20 pixels of {name} are too many, accepted: at most 399"):
            images.read_image(tmp_path / name)


def test_pillows_state_is_left_alone(tmp_path):
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    (tmp_path / "image").write_bytes(saved(picture(), "PNG"))
    assert isinstance(images.load_input(tmp_path / "image", SIZE), torch.Tensor)
    assert limit == Image.MAX_IMAGE_PIXELS and filters == list(warnings.filters)


def test_too_many_bytes(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(png(8, 8))
        file.truncate(images.MAX_FILE_BYTES + 1)  # a sparse file
    with pytest.raises(ValueError, match=f"the file has {images.MAX_FILE_BYTES + 1} bytes, accepted: at most"):
        images.read_image(tmp_path / "huge.png")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "empty.png").touch()
    for path, reason in {
        tmp_path / "fifo.png": "fifo.png is a FIFO",
        tmp_path / "loop.png": "Too many levels of symbolic links",
        tmp_path / "dangling.png": "No such file",
        tmp_path / "empty.png": "the file is empty",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path: "Is a directory",
        Path("/dev/zero"): "is a character device",
        Path("a\0b"): "null",
    }.items():
        outcome = images.load_input(path, SIZE)
        assert isinstance(outcome, Exception) and reason in str(outcome), (path, outcome)


def test_finds_to_the_bottom_and_ends(tmp_path, monkeypatch):
    """Links to folders are not followed, so a tree with cycles ends; neither depth nor a folder that cannot be listed
    ends the search; what has an image's name and is none is left to the reader to name."""
    (tmp_path / "cycle").symlink_to(tmp_path)
    (tmp_path / "cycle.png").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png/b.png").touch()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked/c.png").touch()
    depth, limit = 300, sys.getrecursionlimit()
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("z.png").touch()
    scandir = os.scandir

    def refusing(folder):
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing)
        sys.setrecursionlimit(len(inspect.stack(0)) + depth - 50)
        try:
            found = images.find_images([tmp_path])
        finally:
            sys.setrecursionlimit(limit)
    Path("z.png").unlink()
    for _ in range(depth):  # shutil.rmtree, which pytest would use, recurses as well
        os.chdir("..")
        os.rmdir("d")
    expected = [tmp_path / name for name in ("a.png/b.png", "dangling.png", "fifo.png", "locked")]
    assert found == sorted([*expected, tmp_path.joinpath(*["d"] * depth, "z.png")])


def test_a_name_that_is_no_folder_stays(tmp_path):
    """Whatever the system says of it, such as that the name is too long."""
    names = [Path("x" * 300), Path("a\0b"), tmp_path / "missing"]
    assert images.find_images(names) == names


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_shared():
    """At most the capacity is taken at any time; who needs more than that takes all."""
    memory, taken, most, lock = images.Memory(10), 0, 0, threading.Lock()

    def work(n_bytes):
        nonlocal taken, most
        with memory.taken(n_bytes):
            with lock:
                taken += min(n_bytes, 10)
                most = max(most, taken)
            time.sleep(0.002)
            with lock:
                taken -= min(n_bytes, 10)

    threads = [threading.Thread(target=work, args=(n,)) for n in [3, 4, 5, 6, 1, 100, 0, 10] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 5 < most <= 10

    with pytest.raises(KeyError), memory.taken(10):
        raise KeyError
    with memory.taken(10):
        pass


def test_decoding_waits_for_its_memory(tmp_path, monkeypatch):
    """Reading the header takes what the file may hold, decoding what the pixels do; both are given back."""
    taken = []

    class Recorder(images.Memory):
        def taken(self, n_bytes):
            taken.append(n_bytes)
            return super().taken(n_bytes)

    memory = Recorder(images.MEMORY)
    monkeypatch.setattr(images, "_memory", memory)
    path = tmp_path / "image"
    path.write_bytes(saved(picture(500, 400), "PNG"))
    assert isinstance(images.load_input(path, SIZE), torch.Tensor)
    header, pixels = taken
    assert header == 4 * path.stat().st_size and pixels >= header + 500 * 400 * 12
    path.write_bytes(path.read_bytes()[:3000])
    assert isinstance(images.load_input(path, SIZE), Exception)
    assert memory._free == images.MEMORY


def test_a_failure_keeps_no_image(tmp_path, monkeypatch):
    """Its traceback would, until the batch is printed: the pixels of each truncated image."""
    path = tmp_path / "image"
    path.write_bytes(saved(picture(500, 400), "PNG")[:3000])
    seen = []
    resized = images._resized
    monkeypatch.setattr(images, "_resized", lambda image, size: seen.append(weakref.ref(image)) or resized(image, size))
    outcome = images.load_input(path, SIZE)
    assert isinstance(outcome, OSError) and outcome.__traceback__ is None and outcome.__context__ is None
    gc.collect()
    assert [image() for image in seen] == [None]


@pytest.mark.slow
def test_large_images_are_decoded_one_at_a_time(tmp_path):
    """The process's memory grows by one of them, and not by one of each thread, at work or when it has ended."""
    side = 4000
    content = png(side, side, zlib.compress(bytes(side * (3 * side + 1)), 1))
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(content)
    code = f"""
import sys, torch
from pathlib import Path
from convmixer_fast import images
images._memory = images.Memory({side * side * 12})
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
paths = sorted(Path(sys.argv[1]).glob("*.png"))
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5))
before = peak()
assert all(isinstance(row, torch.Tensor) for _, row in images.predict(network, paths, 32, 6, "cpu", torch.float32))
print(peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.7 * side * side * 4 / 2**20


# ---- damaged files --------------------------------------------------------------------------------------------------


def seeds():
    """Small files of every format, by name."""
    found = {name: saved(picture(), name) for name in images.DECODERS}
    found |= {f"{name} of many": first_of_many(name) for name in ("GIF", "PNG", "TIFF", "WEBP")}
    exif = Image.Exif()
    exif[0x0112] = 6
    found |= {f"{name} turned": saved(picture(), name, exif=exif) for name in ("JPEG", "PNG", "TIFF", "WEBP")}
    found["MPO"] = first_of_many("MPO")
    found["JPEG progressive"] = saved(picture(), "JPEG", progressive=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        found[f"TIFF {compression}"] = saved(picture(), "TIFF", compression=compression)
    found["TIFF group4"] = saved(picture(mode="1"), "TIFF", compression="group4")
    found["PNG palette"] = saved(picture(mode="P"), "PNG", transparency=3)
    found["PNG grey16"] = saved(Image.fromarray(grey16()), "PNG")
    found["BMP palette"] = saved(picture(mode="P"), "BMP")
    found["PPM plain"] = b"P3 2 2 255\n" + b" 1 2 3" * 4
    found["WEBP lossless"] = saved(picture(mode="RGBA"), "WEBP", lossless=True)
    return found


def damaged(content, draw):
    """The file with bits flipped, numbers replaced by extreme ones, parts lost, doubled or moved."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(min(len(content), draw.choice((32, 128, 1 << 20)))) if content else 0
        kind = draw.randrange(6)
        if not content:
            break
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            width = draw.choice((2, 4, 8))
            value = draw.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 65500, 13000)) % 2 ** (8 * width)
            content[at : at + width] = value.to_bytes(width, draw.choice(("little", "big")))
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at : at + draw.randrange(1, 64)]
        else:
            content[at:at] = content[at : at + draw.randrange(1, 512)]
    if content[:8] == b"\x89PNG\r\n\x1a\n" and draw.randrange(2):
        content = with_checksums(content)
    return bytes(content)


def with_checksums(content):
    """A PNG whose chunks' checksums are right again, so that what they guard is read."""
    at = 8
    while at + 12 <= len(content):
        length = struct.unpack_from(">I", content, at)[0]
        if at + 12 + length > len(content):
            break
        struct.pack_into(">I", content, at + 8 + length, zlib.crc32(content[at + 4 : at + 8 + length]))
        at += 12 + length
    return content


def try_damaged(path, n, seed):
    """Reads n damaged files: how many gave an input, how many which exception, and the seconds of the slowest."""
    draw, outcomes, slowest, originals = random.Random(seed), collections.Counter(), 0.0, seeds()
    for content in originals.values():
        path.write_bytes(content)
        assert isinstance(images.load_input(path, SIZE), torch.Tensor)
    names = sorted(originals)
    for index in range(n):
        path.write_bytes(damaged(originals[names[index % len(names)]], draw))
        started = time.monotonic()
        outcome = images.load_input(path, SIZE)
        slowest = max(slowest, time.monotonic() - started)
        if isinstance(outcome, torch.Tensor):
            assert outcome.shape == (3, SIZE, SIZE) and outcome.isfinite().all()
        outcomes["read" if isinstance(outcome, torch.Tensor) else type(outcome).__name__] += 1
    return outcomes, slowest


def test_damaged_files_are_read_or_named(capfd, tmp_path):
    with images.quiet_decoders():
        outcomes, _ = try_damaged(tmp_path / "image", 400, seed=0)
    assert capfd.readouterr().err == ""
    assert outcomes["read"] > 40 and sum(outcomes.values()) - outcomes["read"] > 40, outcomes


@pytest.mark.fuzz
def test_many_damaged_files_are_read_or_named(tmp_path):
    """In a process of its own, whose memory is watched."""
    count, seed = fuzz_run(10_000)
    code = f"""
import resource, sys
from pathlib import Path
from test_images import images, try_damaged
with images.quiet_decoders():
    outcomes, slowest = try_damaged(Path(sys.argv[1]), {count}, {seed})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("seed {seed}:", sum(outcomes.values()), "files,", dict(outcomes.most_common()))
print(f"slowest {{slowest:.1f}} s, peak {{peak:.0f}} MiB")
sys.exit(peak > 4096)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "image")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    print(ran.stdout)
    assert (ran.returncode, ran.stderr) == (0, ""), (seed, ran.stdout)
