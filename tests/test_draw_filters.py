"""The pictures of a checkpoint's filters: every weight in its place and colour, at one channel and at many."""

import numpy as np
import pytest
import torch

from convmixer_fast import ConvMixer, cli

draw_filters = pytest.importorskip("convmixer_fast.draw_filters")
from PIL import Image  # noqa: E402


def filters_in(path, n, height, width):
    """The filters (n, height, width, 3) read back from a picture: its grid is framed in grey, row by row."""
    picture = np.asarray(Image.open(path)).astype(int)
    grey = (picture == draw_filters.GREY).all(2)
    top, left = (int(np.argmax(grey.sum(axis) > draw_filters.LARGEST_FILTER // 4)) for axis in (1, 0))
    inside = picture[top + draw_filters.GAP :, left + draw_filters.GAP :]
    side = int(np.argmax(grey[top + draw_filters.GAP, left + draw_filters.GAP :]))
    assert side % width == 0
    scale = side // width
    columns = int(grey[top].sum() - draw_filters.GAP) // (side + draw_filters.GAP)
    found = []
    for index in range(n):
        y = index // columns * (height * scale + draw_filters.GAP) + scale // 2
        x = index % columns * (side + draw_filters.GAP) + scale // 2
        found.append(inside[y : y + height * scale : scale, x : x + width * scale : scale][:height, :width])
    return np.stack(found)


@pytest.mark.parametrize("dim, depth, kernel_size, patch_size", [(1, 1, 9, 7), (1536, 1, 9, 14), (10, 12, 4, 1)])
def test_every_kernel_is_drawn(tmp_path, capsys, dim, depth, kernel_size, patch_size):
    torch.manual_seed(0)
    model = ConvMixer(dim, depth, kernel_size, patch_size, n_classes=2)
    depthwise = [module for module in model.modules() if getattr(module, "padding", None) == "same"]
    depthwise[-1].weight.data[-1] = 0
    torch.save(model.state_dict(), tmp_path / "model.pt")
    folder = tmp_path / "deep" / "pictures"
    assert cli.main(["weights", str(tmp_path / "model.pt"), "-o", str(folder)]) == 0
    layers = [f"layer_{number:0{len(str(depth))}}.png" for number in range(1, depth + 1)]
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in ["patch_embedding.png", *layers]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["patch_embedding.png", *layers])

    for conv, name in zip(depthwise, layers, strict=True):
        kernels = conv.weight.detach().squeeze(1).numpy()
        colours = filters_in(folder / name, dim, kernel_size, kernel_size)
        size = np.abs(kernels) / np.maximum(np.abs(kernels).max((1, 2), keepdims=True), 1e-30)
        sign = np.where(colours[..., 0] > colours[..., 2], 1, -1)  # red against blue
        clear = size > 0.1
        assert np.array_equal(sign[clear], np.sign(kernels)[clear])
        paleness = colours.min(3)  # the stronger, the darker
        assert np.all(paleness[size == 0] == 255) and np.all(paleness[size == 1] < 40)

    patches = model.stem[0].weight.detach().permute(0, 2, 3, 1).numpy()
    low, high = (function(patches, axis=(1, 2, 3), keepdims=True) for function in (np.min, np.max))
    colours = filters_in(folder / "patch_embedding.png", dim, patch_size, patch_size)
    assert np.abs(colours - 255 * (patches - low) / (high - low)).max() <= 0.51


def test_patches_that_are_not_rgb(tmp_path):
    """One filter after the other, its channels side by side."""
    model = ConvMixer(3, 1, 3, 2, n_classes=2, in_channels=2)
    paths = draw_filters.draw_weights(model, tmp_path)
    colours = filters_in(paths[0], 6, 2, 2)
    expected = model.stem[0].weight.detach().flatten(0, 1).numpy()
    clear = np.abs(expected) > 0.1 * np.abs(expected).max((1, 2), keepdims=True)
    assert np.array_equal((colours[..., 0] > colours[..., 2])[clear], (expected > 0)[clear])


def test_captions_fit(tmp_path):
    """Nothing is cut off at one channel, where the caption is wider than the kernels."""
    for path in draw_filters.draw_weights(ConvMixer(1, 1, 3, 2, n_classes=2), tmp_path):
        picture = np.asarray(Image.open(path)).astype(int)
        margin = draw_filters.MARGIN
        assert (picture[:, -margin // 2 :] == 255).all() and (picture[-margin // 2 :] == 255).all()
        assert (picture[: 2 * margin] < 100).any()


@pytest.mark.parametrize("name, message", [("no.pt", "argument CHECKPOINT: "), ("torn.pt", "torn.pt is damaged")])
def test_checkpoints_that_do_not_fit(tmp_path, capsys, name, message):
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(SystemExit):
        cli.main(["weights", str(tmp_path / name), "-o", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path, capsys):
    torch.save(ConvMixer(1, 1, 3, 2, n_classes=2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        cli.main(["weights", str(tmp_path / "model.pt"), "-o", str(tmp_path / "model.pt")])
    assert "argument -o/--output: " in capsys.readouterr().err


def saved(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key, where", [("stem.0.weight", "the patch embedding"), ("blocks.1.0.fn.0.weight", "layer 2")]
)
def test_weights_that_are_not_finite(tmp_path, capsys, value, key, where):
    """No picture is drawn, rather than one of meaningless colours."""
    model = ConvMixer(4, 2, 3, 2, n_classes=2)
    model.state_dict()[key].view(-1)[5] = value
    with pytest.raises(SystemExit):
        cli.main(["weights", saved(model, tmp_path / "model.pt"), "-o", str(tmp_path / "pictures")])
    assert f"{where} has weights that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_pictures_are_bounded(tmp_path, capsys, monkeypatch):
    """By their pixels, before a colour is computed."""
    path, folder = saved(ConvMixer(6, 1, 9, 7, n_classes=2), tmp_path / "model.pt"), str(tmp_path / "pictures")
    assert cli.main(["weights", path, "-o", folder]) == 0
    with Image.open(tmp_path / "pictures/layer_1.png") as picture:
        most = picture.width * picture.height  # its margins and caption included
    capsys.readouterr()
    monkeypatch.setattr(draw_filters, "MAX_PIXELS", most // 2)
    with pytest.raises(SystemExit):
        cli.main(["weights", path, "-o", folder])
    error = capsys.readouterr().err
    assert f"{path}: the patch embedding has 6 filters of 7 x 7, a picture of " in error
    assert f"pixels, accepted: at most {most // 2}" in error


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """Is named, and leaves no half of a picture; an older one stays."""
    path, folder = saved(ConvMixer(4, 1, 3, 2, n_classes=2), tmp_path / "model.pt"), tmp_path / "pictures"
    folder.mkdir()
    (folder / "patch_embedding.png").write_bytes(b"old")

    def save(image, file, *_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(SystemExit):
        cli.main(["weights", path, "-o", str(folder)])
    assert f"argument -o/--output: {folder}: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("patch_embedding.png", b"old")]
