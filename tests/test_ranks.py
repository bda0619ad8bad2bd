"""Jobs shared by two processes over gloo, and what becomes of them when one dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import slow

from convmixer_fast import ConvMixer, ranks

images = pytest.importorskip("convmixer_fast.images")
pytest.importorskip("tqdm")
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import throughput  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@contextlib.contextmanager
def two_processes(code: str):
    """Two ranks that execute the code, started without torchrun, which would end the one when the other dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | meeting | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of classify: a checkpoint and a folder of 11 images, two of them broken."""
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    model = ConvMixer(dim=16, depth=2, kernel_size=5, patch_size=4, n_classes=7)
    torch.save(model.state_dict(), folder / "gelu.pt")
    (folder / "pictures").mkdir()
    for index in range(11):
        path = folder / "pictures" / f"{index:02}.png"
        noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
        path.write_bytes(b"torn") if index in (0, 6) else Image.fromarray(noise).save(path)
    options = ["--checkpoint", folder / "gelu.pt", "--image-size", "32", "--batch-size", "2"]
    return ["classify", folder / "pictures", *map(str, options)]


def test_alone_there_is_one_rank():
    with ranks.joined("cpu"):
        assert (ranks.rank(), ranks.count()) == (0, 1)
        assert ranks.gather("part") == ["part"] and ranks.of_first("value") == "value"


def test_classify_is_shared(job):
    """Two ranks print what one prints: every image once, in order, the broken ones named."""
    alone = run(sys.executable, "-m", "convmixer_fast", *job)
    shared = run(*TORCHRUN, "-m", "convmixer_fast", *job)
    assert len(alone.stdout.splitlines()) == 5 * 9
    assert shared.stdout == alone.stdout
    assert alone.returncode == 1 and shared.returncode == 1  # for the broken images
    named = [line for line in shared.stderr.splitlines() if "UnidentifiedImageError" in line]
    assert named == alone.stderr.splitlines() and len(named) == 2


@pytest.mark.slow
def test_more_ranks_than_images(job, tmp_path):
    single = ["classify", job[1] / "03.png", *job[2:]]
    shared = run(*TORCHRUN, "-m", "convmixer_fast", *single)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout == run(sys.executable, "-m", "convmixer_fast", *single).stdout != ""


@pytest.mark.parametrize("dead", [0, *slow(1)])
def test_a_rank_that_dies_is_named_by_torchrun(job, tmp_path, dead):
    """Killed after its first batch, with half of the images to go."""
    script = tmp_path / "dies.py"
    script.write_text(
        f"""
import os, signal, sys
from convmixer_fast import cli, images
predict, calls = images.predict, []
def killed(*arguments):
    calls.append(arguments)
    if os.environ["RANK"] == "{dead}" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(*arguments)
images.predict = killed
sys.exit(cli.main(sys.argv[1:]))
"""
    )
    done = run(*TORCHRUN, script, *job)
    assert done.returncode != 0
    root_cause = done.stderr.partition("Root Cause")[2]
    assert f"rank      : {dead} " in root_cause and "SIGKILL" in root_cause
    assert "08.png" not in done.stdout


def test_the_first_rank_names_one_that_died():
    """Without torchrun, too, and at once rather than after the time that a slow rank is given."""
    code = """
from convmixer_fast import ranks
import time
with ranks.joined("cpu"):
    ranks.gather(1)
    print("joined", flush=True)
    if ranks.rank() == 1:
        time.sleep(300)
    ranks.gather(2)
"""
    with two_processes(code) as (first, second):
        assert second.stdout.readline() == "joined\n"
        second.send_signal(signal.SIGKILL)
        started = time.monotonic()
        _, complaint = first.communicate(timeout=120)
        assert time.monotonic() - started < 60
    assert first.returncode == 1
    assert "RuntimeError: a process has died, or is 0:30:00 late: [Rank 0]: Rank 1 failed" in complaint


@pytest.mark.slow
def test_throughput_is_summed_over_ranks(tmp_path):
    model, results = "convmixer_256_8_k3_p2", tmp_path / "results.json"
    options = ["--device", "cpu", "--batch", 2, "--batches", 2, "--image-size", 8, "--backends", "eager", "fused"]
    done = run(*TORCHRUN, ROOT / "benchmarks/throughput.py", *options, "--models", model, "--json", results)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("* settings: ") == 1 and ", 2 ranks: NOT the paper's protocol" in done.stdout
    rows = json.loads(results.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["eager", "fused"]
    for row in rows:
        rates = row["rank_images_per_second"]
        assert len(rates) == 2 and row["images_per_second"] == sum(rates)
        assert [len(seconds) for seconds in row["rank_seconds"]] == [2, 2]
    assert done.stdout.count("| ranks: ") == 2


def test_what_one_rank_lacks_is_said_with_its_name():
    def row(**facts):
        return dict(model="m", backend="eager", batch=6, flops_per_image=1, message="") | facts

    timed = row(status="timed", seconds=[2.0, 2.0, 9.0]), row(status="timed", seconds=[1.0, 3.0, 3.0])
    failed = row(status="skipped", message="out of memory")
    (merged,) = throughput.merge([[timed[0]], [timed[1]]])
    throughput.summarise([merged])
    assert merged["rank_images_per_second"] == [3, 2] and merged["images_per_second"] == 5
    (merged,) = throughput.merge([[timed[0]], [failed]])
    assert (merged["status"], merged["message"]) == ("skipped", "rank 1: out of memory")
