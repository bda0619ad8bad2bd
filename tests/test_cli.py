"""The command line: what it prints, how it prepares images, and what it says when something does not fit."""

import copy
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import convmixer_fast
from convmixer_fast import ConvMixer, build_info, cli, images, optimize

SIZE = 32
SMALL = ["--activation", "gelu", "--image-size", str(SIZE)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ConvMixer(dim=16, depth=2, kernel_size=5, patch_size=4, n_classes=7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.3, 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"kind {index}\n" for index in range(7)))
    return str(path)


def photo(width, height, mode="RGB", seed=0):
    """Smooth noise: something at every scale, and different at every place."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 4 if mode in ("RGBA", "CMYK") else 3), dtype=np.uint8)
    start = {"RGBA": "RGBA", "CMYK": "CMYK"}.get(mode, "RGB")
    return Image.fromarray(noise, start).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def classify(capsys, *arguments):
    """Runs the command in this process: (exit status, rows of columns, stderr)."""
    status = cli.main(["classify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, [line.split("\t") for line in captured.out.splitlines()], captured.err


def refused(capsys, *arguments):
    """What the command says on stderr when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    return captured.err


def expected(model, image, size=SIZE):
    """Probabilities by the plain model in float64."""
    with torch.inference_mode():
        return copy.deepcopy(model).double()(images.preprocess(image, size)[None].double()).softmax(1)[0]


def assert_rows(rows, path, probabilities, topk=5):
    """The rows of one image against its probabilities, up to the sixth digit and float32's rounding."""
    assert [row[0] for row in rows] == [str(path)] * topk
    assert [int(row[1]) for row in rows] == list(range(1, topk + 1))
    assert [int(row[2]) for row in rows] == probabilities.topk(topk).indices.tolist()
    printed = torch.tensor([float(row[3]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(printed, probabilities.topk(topk).values, rtol=1e-5, atol=1e-6)


# Shapes where rounding decides: odd and even margins, both orientations, equal sides, up- and downscaling.
@pytest.mark.parametrize(
    "shape", [(500, 375), (375, 500), (333, 251), (233, 233), (224, 224), (1, 1), (7, 640), (641, 5)]
)
@pytest.mark.parametrize("size", [224, 96, 33, 32, 7])
def test_preprocess_equals_timm(shape, size):
    transforms = pytest.importorskip("timm.data.transforms_factory")
    from timm.models.convmixer import default_cfgs

    settings = default_cfgs["convmixer_768_32"].default
    theirs = transforms.transforms_imagenet_eval(
        size, settings.crop_pct, interpolation=settings.interpolation, mean=settings.mean, std=settings.std
    )
    image = photo(*shape)
    torch.testing.assert_close(images.preprocess(image, size), theirs(image), rtol=0, atol=0)


def test_read_image_modes(tmp_path):
    """Every kind of file that holds the same picture is read as that picture."""
    picture = photo(60, 40)
    grey = picture.convert("L")
    palette = picture.quantize(200)
    transparent = picture.copy()
    transparent.putalpha(photo(60, 40, "L", seed=1))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be shown after a quarter turn clockwise
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cmyk = photo(60, 40, "CMYK")
    files = {
        "rgb.png": (picture, {}, picture),
        "rgb.bmp": (picture, {}, picture),
        "rgb.ppm": (picture, {}, picture),
        "rgb.tiff": (picture, {}, picture),
        "rgb.webp": (picture, {"lossless": True}, picture),
        "grey.png": (grey, {}, grey.convert("RGB")),
        "grey16.png": (deep, {}, grey.convert("RGB")),
        "grey16.tiff": (deep, {}, grey.convert("RGB")),
        "black and white.png": (picture.convert("1"), {}, picture.convert("1").convert("RGB")),
        "palette.png": (palette, {}, palette.convert("RGB")),
        "palette.gif": (palette, {}, palette.convert("RGB")),
        "palette with transparency.png": (palette, {"transparency": 3}, palette.convert("RGB")),
        "rgba.png": (transparent, {}, picture),
        "cmyk.tiff": (cmyk, {}, cmyk.convert("RGB")),
        "rotated.png": (picture.transpose(Image.Transpose.ROTATE_90), {"exif": rotated}, picture),
        "rotated16.png": (deep.transpose(Image.Transpose.ROTATE_90), {"exif": rotated}, grey.convert("RGB")),
        "rotated.tiff": (picture.transpose(Image.Transpose.ROTATE_90), {"exif": rotated}, picture),
    }
    for name, (image, options, shown) in files.items():
        image.save(tmp_path / name, **options)
        read = images.read_image(tmp_path / name)
        assert read.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(read), np.asarray(shown), err_msg=name)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 255, dtype=np.uint16)[None]
    Image.fromarray(values).save(tmp_path / "ramp.png")
    read = np.asarray(images.read_image(tmp_path / "ramp.png"))
    assert np.abs(read.astype(float) - values[..., None] / 257).max() <= 0.5


def test_classify_files_and_folders(capsys, tmp_path, model, checkpoint, labels):
    """Files in the order given, folders sorted and searched to the bottom; batches that do not divide their number."""
    names = ["b.png", "a.JPG", "deep/er/c.webp", "notes.txt", "deep/.d.gif"]
    folder = tmp_path / "pictures"
    (folder / "deep/er").mkdir(parents=True)
    for index, name in enumerate(names):
        path = folder / name
        path.write_text("text") if path.suffix == ".txt" else photo(40 + index, 50, seed=index).save(path)
    single = tmp_path / "no suffix"
    photo(90, 30, "L").save(single, "PNG")
    status, rows, errors = classify(
        capsys, single, folder, "--checkpoint", checkpoint, "--labels", labels, "--batch-size", 2, *SMALL
    )
    assert (status, errors) == (0, "")
    paths = [single, *(folder / name for name in ["a.JPG", "b.png", "deep/.d.gif", "deep/er/c.webp"])]
    assert len(rows) == 5 * len(paths)
    for index, path in enumerate(paths):
        mine = rows[5 * index : 5 * index + 5]
        assert_rows(mine, path, expected(model, Image.open(path).convert("RGB")))
        assert [row[4] for row in mine] == [f"kind {row[2]}" for row in mine]


@pytest.mark.parametrize("topk, printed", [(1, 1), (7, 7), (100, 7)])
def test_topk(capsys, tmp_path, model, checkpoint, topk, printed):
    photo(32, 32).save(tmp_path / "x.png")
    status, rows, _ = classify(capsys, tmp_path / "x.png", "--checkpoint", checkpoint, "--topk", topk, *SMALL)
    assert status == 0
    assert {len(row) for row in rows} == {4}  # no labels, no column of labels
    assert_rows(rows, tmp_path / "x.png", expected(model, photo(32, 32)), printed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(capsys, tmp_path, model, checkpoint, dtype):
    """What is printed is what the optimized model computes in that type, to the last digit."""
    photo(32, 32).save(tmp_path / "x.png")
    name = str(dtype).removeprefix("torch.")
    _, rows, _ = classify(capsys, tmp_path / "x.png", "--checkpoint", checkpoint, "--dtype", name, *SMALL)
    with torch.inference_mode():
        logits = optimize(model, dtype=dtype)(images.preprocess(photo(32, 32), SIZE)[None].to(dtype))
    top = logits[0].float().softmax(0).topk(5)
    assert [row[2:] for row in rows] == [[str(int(index)), f"{value:.6f}"] for value, index in zip(*top)]


def test_broken_images_are_named_and_the_rest_go_on(capsys, tmp_path, model, checkpoint):
    good = photo(48, 48)
    good.save(tmp_path / "a good.png")
    whole = (tmp_path / "a good.png").read_bytes()
    jpeg = tmp_path / "photo.jpg"
    photo(200, 200).save(jpeg)
    reasons = {
        "empty.png": b"",
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": jpeg.read_bytes()[:2000],
        "foreign.gif": b"GIF89a, said the text file",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
        "flipped.png": whole[:60] + bytes(byte ^ 255 for byte in whole[60:90]) + whole[90:],
    }
    jpeg.unlink()
    for name, content in reasons.items():
        (tmp_path / name).write_bytes(content)
    Image.new("F", (9, 9)).save(tmp_path / "float.tiff")
    good.save(tmp_path / "z good.png")
    missing = tmp_path / "missing.png"
    status, rows, errors = classify(capsys, missing, tmp_path, "--checkpoint", checkpoint, "--batch-size", 1, *SMALL)
    assert status == 1
    named = {line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in errors.splitlines()}
    assert named == {*reasons, "float.tiff", "missing.png"}
    assert "float.tiff: ValueError: 32-bit grey (mode F) has no known range of values" in errors
    assert "missing.png: FileNotFoundError" in errors
    for name in ("a good.png", "z good.png"):
        assert_rows([row for row in rows if row[0] == str(tmp_path / name)], tmp_path / name, expected(model, good))


def test_elongated_image():
    """A line that would fill the memory once its short side is scaled up is refused, the longest allowed one is not."""
    side = int(Image.MAX_IMAGE_PIXELS / 33**2)
    assert images.preprocess(Image.new("RGB", (side, 1), "white"), 32).unique().numel() == 3
    side += 40
    with pytest.raises(ValueError, match=f"1 x {side} pixels are too elongated: resized, 33 x {33 * side}"):
        images.preprocess(Image.new("RGB", (1, side)), 32)


def test_outputs_that_are_not_finite_are_reported(capsys, tmp_path, model):
    weights = {name: value * torch.nan if value.ndim == 2 else value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "nan.pt")
    photo(32, 32).save(tmp_path / "x.png")
    status, rows, errors = classify(capsys, tmp_path / "x.png", "--checkpoint", tmp_path / "nan.pt", *SMALL)
    assert (status, rows) == (1, [])
    assert errors == f"{tmp_path / 'x.png'}: OverflowError: the outputs are not finite in torch.float32\n"


def test_awkward_names_stay_in_their_column(capsys, tmp_path, checkpoint):
    name = os.fsencode(tmp_path) + b"/tab\tline\nbyte\xff \xc3\xa9.png"
    with open(name, "wb") as file:
        photo(8, 8).save(file, "PNG")
    status, rows, _ = classify(capsys, tmp_path, "--checkpoint", checkpoint, "--topk", 1, *SMALL)
    assert status == 0
    assert [row[0] for row in rows] == [rf"{tmp_path}/tab\tline\nbyte\udcff é.png"]
    assert len(rows[0]) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        (b"one\ntwo\n", r"argument --labels: \S+ has 2 lines, the model 7 classes"),
        (b"".join(b"%d\n" % line for line in range(8)), "has 8 lines, the model 7 classes"),
        (b"", "has 1 lines, the model 7 classes"),
        (b"\xff\xfe\n" * 7, "argument --labels: .* 'utf-8' codec can't decode"),
        ("kind\n".encode("utf-16-le") * 7, "argument --labels: .*null characters, expected text in UTF-8"),
        (b"x" * (cli.MAX_LABELS_BYTES + 1), f"argument --labels: .*more than {cli.MAX_LABELS_BYTES} bytes"),
        (None, "argument --labels: .*No such file"),
    ],
)
def test_labels_that_do_not_fit(capsys, tmp_path, checkpoint, content, message):
    path = tmp_path / "labels"
    if content is not None:
        path.write_bytes(content)
    error = refused(capsys, "classify", "x.png", "--checkpoint", checkpoint, "--labels", path, *SMALL)
    assert re.search(message, error), error


@pytest.mark.parametrize("path", ["/dev/zero", "."])
def test_labels_that_are_no_file(capsys, checkpoint, path):
    """The first never ends."""
    error = refused(capsys, "classify", "x.png", "--checkpoint", checkpoint, "--labels", path, *SMALL)
    assert re.search(r"argument --labels: \S+: .*([Ii]s a directory|is a character device)", error), error


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_labels_of_other_systems(capsys, tmp_path, checkpoint, line_end):
    """With a mark of byte order, and any line ends; what would move the cursor is escaped, and length bounded."""
    names = ["é", "tab\t", "\x1b[2J", "\u2028", "x" * 3000, "", "last"]
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbf" + "".join(name + line_end for name in names).encode())
    photo(32, 32).save(tmp_path / "x.png")
    options = ["--checkpoint", checkpoint, "--labels", tmp_path / "labels", "--topk", 7]
    status, rows, _ = classify(capsys, tmp_path / "x.png", *options, *SMALL)
    shown = ["é", r"tab\t", r"\x1b[2J", r"\u2028", None, "", "last"]
    assert status == 0 and len(rows) == 7
    for row in rows:
        name = shown[int(row[2])]
        assert row[4] == name if name is not None else "x ... x" in row[4] and len(row[4]) <= 1000


def test_arguments_that_do_not_fit(capsys, tmp_path, model, checkpoint):
    grey = tmp_path / "grey.pt"
    torch.save(ConvMixer(dim=8, depth=1, kernel_size=3, patch_size=2, n_classes=3, in_channels=1).state_dict(), grey)
    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "nothing").mkdir()
    given = {"x.png": "x.png", "--checkpoint": checkpoint, "--activation": "gelu", "--image-size": SIZE}
    for change, message in [
        ({"--checkpoint": tmp_path / "no.pt"}, "argument --checkpoint: "),
        ({"--checkpoint": torn}, "argument --checkpoint: "),
        ({"--checkpoint": grey}, "argument --checkpoint: the model takes 1 channels, expected 3 (RGB)"),
        ({"--image-size": 3}, "argument --image-size: 3 is less than a patch, 4"),
        ({"--image-size": "-1"}, "argument --image-size: '-1' is not a positive whole number"),
        ({"--image-size": images.MAX_SIZE + 1}, f"argument --image-size: {images.MAX_SIZE + 1}, accepted: at most"),
        ({"--topk": 0}, "argument --topk: '0' is not a positive whole number"),
        ({"--topk": "9" * 5000}, "99' is not a positive whole number"),
        ({"--checkpoint": ""}, "argument --checkpoint: '' is not the name of a file or folder"),
        ({"--labels": ""}, "argument --labels: '' is not the name of a file or folder"),
        ({"x.png": ""}, "argument IMAGE: '' is not the name of a file or folder"),
        ({"--batch-size": "many"}, "argument --batch-size: 'many' is not a positive whole number"),
        ({"--activation": "tanh"}, "argument --activation: invalid choice: 'tanh'"),
        ({"--dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
        ({"--device": "tpu"}, "argument --device: invalid choice: 'tpu'"),
        ({"x.png": tmp_path / "nothing"}, f"file in the folder {tmp_path / 'nothing'}"),
    ]:
        arguments = {**given, **change}
        options = [part for name, value in arguments.items() if name != "x.png" for part in (name, value)]
        error = refused(capsys, "classify", arguments["x.png"], *options)
        assert message in error, error
    assert "the following arguments are required: IMAGE, --checkpoint" in refused(capsys, "classify")
    assert "the following arguments are required: command" in refused(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "x.png", "--checkpoint", "{}"],
        ["classify", "x.png", "--checkpoint", "c.pt", "--topk", "{}"],
        ["classify", "x.png", "--checkpoint", "c.pt", "--dtype", "{}"],
        ["classify", "x.png", "--checkpoint", "c.pt", "--{}"],
        ["weights", "{}", "-o", "folder"],
        ["explain", "1", "2", "3", "{}", "--kernel-size", "3"],
        ["explain", "1", "2", "3", "4", "--kernel-size", "{}"],
        ["{}"],
    ],
)
def test_what_messages_quote_is_escaped_and_bounded(capsys, arguments):
    for quoted in ("\x1b]0;title\x07\x1b[2J\nfake line\u202e", "y" * 100_000):
        error = refused(capsys, *(argument.format(quoted) for argument in arguments))
        last = error.splitlines()[-1]
        assert " error: " in last and len(last) < 2100
        assert all(character.isprintable() or character == "\n" for character in error)


def test_names_that_begin_with_a_dash(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    photo(32, 32).save(tmp_path / "-x.png")
    for arguments in (["--", "-x.png"], ["./-x.png"]):
        status, rows, _ = classify(capsys, "--checkpoint", checkpoint, "--topk", 1, *SMALL, *arguments)
        assert (status, [row[0] for row in rows]) == (0, ["-x.png"])


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(capsys, tmp_path, model, checkpoint):
    good, loop, fifo = tmp_path / "good.png", tmp_path / "loop.png", tmp_path / "fifo.png"
    photo(32, 32).save(good)
    loop.symlink_to("loop.png")
    os.mkfifo(fifo)
    escapes = tmp_path / "\x1b[2J\nfake.png"
    escapes.touch()
    long = "x" * 300 + ".png"
    status, rows, errors = classify(capsys, long, tmp_path, "/dev/null", "--checkpoint", checkpoint, *SMALL)
    assert status == 1
    assert_rows(rows, good, expected(model, photo(32, 32)))
    named = [rf"{long}: OSError: .*too long", rf"{tmp_path}/\\x1b\[2J\\nfake.png: ValueError: the file is empty"]
    named += [rf"{fifo}: OSError: .* is a FIFO", rf"{loop}: OSError: ", "/dev/null: OSError: .* is a character device"]
    assert len(errors.splitlines()) == len(named)
    for line, pattern in zip(errors.splitlines(), named):
        assert re.match(pattern, line), line


def test_reasons_are_bounded(capsys, tmp_path, monkeypatch, checkpoint):
    def failing(path, size):
        return ValueError("long\n" * 100_000)

    monkeypatch.setattr(images, "load_input", failing)
    status, _, errors = classify(capsys, "x.png", "--checkpoint", checkpoint, *SMALL)
    assert status == 1 and len(errors.splitlines()) == 1 and len(errors) < 3000


def test_large_images_are_read_without_a_warning(capsys, tmp_path, monkeypatch, model, checkpoint):
    """Pillow would write a line of its source code, and not the image's name, between ours."""
    photo(40, 50).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shown, filters = warnings.showwarning, list(warnings.filters)
        status, rows, errors = classify(capsys, tmp_path / "x.png", "--checkpoint", checkpoint, *SMALL)
        assert shown is warnings.showwarning and filters == list(warnings.filters)
    assert (status, errors, caught) == (0, "", [])
    assert_rows(rows, tmp_path / "x.png", expected(model, photo(40, 50)))


def test_decoders_write_no_lines_of_their_own(capfd, tmp_path, monkeypatch, checkpoint):
    """libtiff in C, and Pillow by its logger, say what is wrong with a file, but not with which."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own, which keep the logger from stderr
    deflated, samples = tmp_path / "deflated.tif", tmp_path / "samples.tif"
    photo(40, 50).save(deflated, compression="tiff_adobe_deflate")
    with Image.open(deflated) as image:
        start = image.tag_v2[273][0]
    content = bytearray(deflated.read_bytes())
    content[start : start + 30] = bytes(30)
    deflated.write_bytes(content)
    photo(40, 50).save(samples)
    content = bytearray(samples.read_bytes())
    place = content.index(b"\x15\x01\x03\x00\x01\x00\x00\x00") + 8  # where the samples per pixel are, tag 277
    content[place : place + 2] = b"\x00\x40"
    samples.write_bytes(content)

    def read_both():
        images.load_input(deflated, SIZE)
        images.load_input(samples, SIZE)
        return capfd.readouterr().err

    by_themselves = read_both()
    assert "ZIPDecode" in by_themselves and "More samples per pixel" in by_themselves
    cli.main(["classify", *map(str, (deflated, samples, "--checkpoint", checkpoint, *SMALL))])
    errors = capfd.readouterr().err.splitlines()
    assert errors and all(line.startswith(f"{tmp_path}/") for line in errors), errors
    assert read_both() == by_themselves  # whoever else uses libtiff has it as before


@pytest.mark.parametrize("option, ema", [([], None), (["--ema"], True), (["--no-ema"], False)])
def test_averaged_weights(capsys, tmp_path, monkeypatch, model, checkpoint, option, ema):
    """The option reaches load_checkpoint, whose warning is a line that begins with the file's name."""
    photo(32, 32).save(tmp_path / "x.png")
    asked = []

    def load(path, activation=None, *, ema=None):
        asked.append(ema)
        warnings.warn(f"{path} has averaged weights\n\x1b[2J", stacklevel=2)
        return model

    monkeypatch.setattr(cli, "load_checkpoint", load)
    for command in (["classify", tmp_path / "x.png", "--checkpoint", checkpoint, *SMALL], ["weights", checkpoint]):
        command += ["-o", tmp_path / "pictures"] if command[0] == "weights" else []
        assert cli.main([*map(str, command), *option]) == 0
        assert capsys.readouterr().err == rf"{checkpoint}: has averaged weights\n\x1b[2J" + "\n"
    assert asked == [ema, ema]


def test_other_warnings_are_a_line(capsys, tmp_path, monkeypatch, checkpoint):
    find = images.find_images

    def warning(paths):
        warnings.warn("be\nware", FutureWarning, stacklevel=1)
        return find(paths)

    monkeypatch.setattr(images, "find_images", warning)
    photo(32, 32).save(tmp_path / "x.png")
    status, _, errors = classify(capsys, tmp_path / "x.png", "--checkpoint", checkpoint, *SMALL)
    assert (status, errors) == (0, "FutureWarning: be\\nware\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_that_lack_characters(tmp_path, monkeypatch, checkpoint, encoding):
    """What the encoding has not is escaped, names of files on both streams and of classes."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    photo(32, 32).save(tmp_path / "图.png")
    (tmp_path / "é.png").touch()
    (tmp_path / "labels").write_text("猫\n" * 7)
    options = ["--checkpoint", checkpoint, "--labels", str(tmp_path / "labels"), "--topk", "1", *SMALL]
    assert cli.main(["classify", str(tmp_path), *options]) == 1
    printed, complained = (
        stream.buffer.getvalue().decode(encoding) for stream in (output, errors) if not stream.flush()
    )
    picture, cat = ("图", "猫") if encoding == "utf-8" else (r"\u56fe", r"\u732b")
    assert printed.startswith(f"{tmp_path}/{picture}.png\t1\t") and printed.endswith(f"\t{cat}\n")
    empty = r"\xe9" if encoding == "ascii" else "é"
    assert complained.startswith(f"{tmp_path}/{empty}.png: ValueError")


def test_streams_that_are_closed_or_full(capsys, tmp_path, monkeypatch, checkpoint):
    """A message where there is a place for one, a status in any case, and never a traceback; errors that cannot be
    said are not mixed with results."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert cli.main(["info"]) == 1
        assert capsys.readouterr().err == "convmixer-fast: error: stdout is closed\n"

    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert cli.main(["info"]) == 1
        message = "convmixer-fast: error: stdout cannot be written: [Errno 28] No space left on device\n"
        assert capsys.readouterr().err == message

    photo(32, 32).save(tmp_path / "a.png")
    for closed in (lambda: None, lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", closed())
            arguments = ["missing.png", tmp_path / "a.png", "--checkpoint", checkpoint, *SMALL]
            status, rows, _ = classify(capsys, *arguments)
            assert status == 1 and {row[0] for row in rows} == {str(tmp_path / "a.png")}
            if hasattr(sys.stderr, "detach"):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
                sys.stderr.close()


def test_memory_that_is_not_there(capsys, tmp_path, monkeypatch, checkpoint):
    """Said with the arguments to change; another error of the network is not taken for it."""
    photo(32, 32).save(tmp_path / "x.png")
    arguments = ["classify", tmp_path / "x.png", "--checkpoint", checkpoint, *SMALL]
    for error in (
        MemoryError(),
        RuntimeError("can't allocate memory:\nlong"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):

        def predict(*_, error=error):
            raise error

        monkeypatch.setattr(images, "predict", predict)
        assert "error: out of memory with --batch-size 16, --image-size 32: " in refused(capsys, *arguments)
    error = RuntimeError("a fault")
    monkeypatch.setattr(images, "predict", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main([*map(str, arguments)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_device_that_is_not_there(capsys, checkpoint):
    assert "argument --device: 'cuda', but" in refused(
        capsys, "classify", "x.png", "--checkpoint", checkpoint, "--device", "cuda", *SMALL
    )


def test_without_pillow(capsys, monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "convmixer_fast.images")
    monkeypatch.delattr("convmixer_fast.images")
    assert "classify needs Pillow (pip install pillow)" in refused(
        capsys, "classify", "x.png", "--checkpoint", checkpoint, *SMALL
    )


def test_info(capsys):
    """A line for each fact, and nothing else."""
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = build_info()
    assert len(lines) == len(facts)
    for line, (name, value) in zip(lines, facts.items()):
        assert line.startswith(f"{name.replace('_', ' ')} ")
        for part in value if isinstance(value, list) else [value or "none"]:
            assert part in line


def test_info_as_json(capsys):
    """The facts that the lines show, and nothing else."""
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == build_info()


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"convmixer_fast {convmixer_fast.__version__}\n"


def test_ctrl_c_ends_a_command_without_a_traceback(capsys, tmp_path, monkeypatch, checkpoint):
    """What is there by then is printed."""
    for name in ("a.png", "b.png"):
        photo(32, 32).save(tmp_path / name)
    predict = images.predict

    def interrupted_at_the_second(network, batch, *settings):
        if batch[0].name == "b.png":
            raise KeyboardInterrupt
        return predict(network, batch, *settings)

    monkeypatch.setattr(images, "predict", interrupted_at_the_second)
    status, rows, errors = classify(capsys, tmp_path, "--checkpoint", checkpoint, "--batch-size", 1, *SMALL)
    assert (status, errors) == (130, "")
    assert [row[0] for row in rows] == 5 * [str(tmp_path / "a.png")]


def test_as_a_program(tmp_path, checkpoint):
    """Run as users do, in a process of its own: predictions on stdout, complaints on stderr, the status; and a reader
    that stops early is no error to complain of."""
    photo(32, 32).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    command = [sys.executable, "-m", "convmixer_fast"]
    ran = subprocess.run(
        [*command, "classify", tmp_path, "--checkpoint", checkpoint, *SMALL], capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert [line.split("\t")[:2] for line in ran.stdout.splitlines()] == [
        [str(tmp_path / "good.png"), str(rank)] for rank in range(1, 6)
    ]
    assert ran.stderr.splitlines()[0].startswith(f"{tmp_path / 'bad.png'}: UnidentifiedImageError")
    assert len(ran.stderr.splitlines()) == 1

    # Without a buffer argparse itself passes over the reader that is gone, and leaves with 0.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for arguments in (["info"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        ran = subprocess.run([*command, *arguments], stdout=writer, stderr=subprocess.PIPE, env=buffered, text=True)
        os.close(writer)
        assert (ran.returncode, ran.stderr) == (1, "")
