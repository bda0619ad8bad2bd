"""examples/train_cifar10.py on a small generated set in CIFAR-10's format: restarts, several processes, errors."""

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from processes import press_ctrl_c

import convmixer_fast
from convmixer_fast.model import VARIANTS

SCRIPT = Path(__file__).parent.parent / "examples" / "train_cifar10.py"
MODEL, BATCH, EPOCHS = "convmixer_128_4_k8_p1", 16, 2
IMAGES = 16  # a file
STEPS = EPOCHS * 5 * IMAGES // BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise around a brightness that tells the class."""
    imported = subprocess.run([sys.executable, "-c", "import timm.data"], capture_output=True, text=True)
    if imported.returncode:
        pytest.skip(f"timm does not import: {imported.stderr.strip().splitlines()[-1]}")
    folder, generator = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        labels = generator.integers(0, 10, (IMAGES, 1))
        images = 20 * labels + generator.integers(0, 60, (IMAGES, 3072))
        np.concatenate([labels, images], axis=1).astype(np.uint8).tofile(folder / name)
    return folder


@pytest.fixture(scope="module")
def script(data):
    spec = importlib.util.spec_from_file_location("train_cifar10", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(data, out, epochs=EPOCHS):
    sizes = "--model", MODEL, "--epochs", epochs, "--batch-size", BATCH, "--workers", 0, "--save-every", 2
    return list(map(str, (data, "--out", out, *sizes)))


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def start(*command):
    return processes.start(*command, PYTHONPATH=str(SCRIPT.parent.parent), OMP_NUM_THREADS="1")


def rows(out):
    with (out / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_killed_and_started_again(data, tmp_path):
    """The weights are those of a training that nothing disturbed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed, killed = (start(SCRIPT, *options(data, out)) for out in (whole, parts))
    while not (parts / "checkpoint.pt").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    stopped_at = torch.load(parts / "checkpoint.pt")["progress"]["step"]
    assert 0 < stopped_at < STEPS and not (parts / "weights.pt").exists()

    (parts / "checkpoint.pt.partial").write_bytes(b"the half of a file")  # it may also die while it writes
    assert "test accuracy" in finish(start(SCRIPT, *options(data, parts)))
    assert "test accuracy" in finish(undisturbed)
    a, b = (torch.load(out / "weights.pt") for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    for row, other in zip(rows(whole), rows(parts), strict=True):
        assert all(row[name] == other[name] for name in row if name != "images_per_second")
    assert [row["epoch"] for row in rows(whole)] == [1, 2]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert convmixer_fast.load_checkpoint(whole / "weights.pt", activation="gelu").n_classes == 10


@pytest.mark.slow
def test_ctrl_c_shows_the_finished_epochs(data, tmp_path):
    """Once it has drawn for the first time: an interrupt is lost where matplotlib reads its fonts."""
    out = tmp_path / "out"
    finished, written = out / "log.csv", ("log.csv", "curves.png", "checkpoint.pt")
    process = start(SCRIPT, *options(data, out, epochs=1000))
    status, output, errors = press_ctrl_c(process, lambda: all((out / name).exists() for name in written))
    assert status == 130 and "Traceback" not in errors, errors
    assert output.startswith(finished.read_text())
    assert output.splitlines()[-1] == f"stopped by Ctrl-C; the same command goes on from {out / 'checkpoint.pt'}"


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"
    output = finish(start(*torchrun, "--rdzv-endpoint=localhost:0", SCRIPT, *options(data, tmp_path, epochs=1)))
    assert output.count("test accuracy") == 1, "one of them reports"
    assert rows(tmp_path)[0]["epoch"] == 1
    state = torch.load(tmp_path / "checkpoint.pt")
    assert (state["settings"]["processes"], state["progress"]["step"]) == (2, STEPS // EPOCHS)


def batches(script, monkeypatch, processes, rank, first=0):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    result = script.Batches(90, script.parse(["data", "--batch-size", "16", "--epochs", "3"]), rank)
    result.first = first
    return list(result)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.n_classes == 10])
def test_trains_each_model_of_the_papers_cifar10_family(script, tmp_path, name):
    """By name: a step moves every parameter."""
    args = script.parse([str(tmp_path), "--model", name])
    args.device = torch.device("cpu")
    training = script.Training(args)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(training.model(images), torch.tensor([1, 2])).backward()
    training.optimizer.step()
    assert len(before) == 8 * training.model.depth + 6
    assert not any(torch.equal(old, new) for old, new in zip(before, training.model.parameters()))


def test_batches(script, monkeypatch):
    """Every image at most once an epoch, another order in each, shared out among processes, from any step on."""
    alone = batches(script, monkeypatch, 1, 0)
    assert len(alone) == 3 * (90 // 16)
    epochs = [[place for batch in alone[i : i + 5] for place in batch] for i in (0, 5, 10)]
    for epoch, places in enumerate(epochs):
        assert len(set(places)) == len(places) == 80 and {place[0] for place in places} == {epoch}
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]
    assert batches(script, monkeypatch, 1, 0, first=7) == alone[7:]
    shares = zip(batches(script, monkeypatch, 2, 0), batches(script, monkeypatch, 2, 1), strict=True)
    assert [sorted(first + second) for first, second in shares] == [sorted(batch) for batch in alone]


def test_augmentation_depends_on_epoch_and_image_only(script):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    labels = np.array([3, 4], np.uint8)
    data, other = (script.AugmentedImages(images, labels, seed=0) for _ in range(2))
    first = data[5, 1]
    other[0, 0], torch.rand(3)
    again = other[5, 1]
    assert torch.equal(first[0], again[0]) and first[1] == again[1] == 4
    assert first[0].shape == (3, 32, 32)
    assert not torch.equal(first[0], data[6, 1][0])


def test_learning_rate_is_a_triangle(script):
    rates = [script.learning_rate(step, 1000, 0.05) for step in range(1000)]
    assert max(rates) == pytest.approx(0.05, rel=0.01) and rates.index(max(rates)) in (399, 400)
    assert rates[200] == pytest.approx(0.025, rel=0.01)
    assert rates[800] == pytest.approx(0.0025, rel=0.01)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "convmixer_1"], "argument --model: must be one of .*, got 'convmixer_1'"),
        (["--batch-size", "15"], r"argument --batch-size: must be a multiple of 2 .*, got 15"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--batch-size", "1000"], "--batch-size 1000 is more than the 80 training images"),
    ],
)
def test_errors_name_the_argument(script, data, tmp_path, change, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main([*options(data, tmp_path), *change])
    text = capsys.readouterr().err + str(error.value)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory; the folder must hold CIFAR-10's binary version"),
        (b"", "0 bytes are not one or more records of 3073 bytes"),
        (bytes(3074), "3074 bytes are not one or more records of 3073 bytes"),
        (bytes([10]) + bytes(3072), "a label is 10, accepted: 0 to 9"),
    ],
)
def test_errors_name_the_file(script, tmp_path, content, message):
    path = tmp_path / "data_batch_1.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"data_batch_1.bin: {message}"):
        script.main([str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_checkpoint_of_other_settings(script, data, tmp_path):
    training = script.Training(script.parse(options(data, tmp_path)))
    training.save()
    with pytest.raises(SystemExit, match=r"checkpoint.pt: this training was begun with seed = 0, got 1"):
        script.main([*options(data, tmp_path), "--seed", "1"])


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: whole[:2000], lambda whole: b"\x1b[2J" + whole[4:]]
)
def test_a_damaged_checkpoint(script, data, tmp_path, damage):
    training = script.Training(script.parse(options(data, tmp_path)))
    training.save()
    training.path.write_bytes(damage(training.path.read_bytes()))
    with pytest.raises(
        SystemExit, match=r"checkpoint.pt is no checkpoint of this training, remove it to begin"
    ) as exit:
        script.main(options(data, tmp_path))
    assert str(exit.value).isprintable()


def test_does_not_wait_for_what_is_no_file(script, data, tmp_path):
    for folder in ("data", "out"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "data" / "data_batch_1.bin")
    with pytest.raises(SystemExit, match="data_batch_1.bin is a FIFO, accepted: a regular file"):
        script.main([str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    os.mkfifo(tmp_path / "out" / "checkpoint.pt")
    with pytest.raises(SystemExit, match="checkpoint.pt is a FIFO, accepted: a regular file"):
        script.main(options(data, tmp_path / "out"))


def test_reads_what_the_format_says(script, data):
    """Planes of red, green and blue, rows of 32."""
    images, labels = script.read_records(data / "test_batch.bin")
    record = (data / "test_batch.bin").read_bytes()[3073 : 2 * 3073]
    assert labels[1] == record[0]
    assert images[1, 2, 5, 7] == record[1 + 2 * 1024 + 5 * 32 + 7]
