"""The examples, run as a newcomer runs them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_digits():
    """Trained on real images to 97 % or more; the file and the fused operators leave the predictions as they were."""
    pytest.importorskip("sklearn")
    ran = subprocess.run([sys.executable, EXAMPLES / "digits.py"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    correct = dict(re.findall(r"^(trained|loaded|optimized) +(\d+)/450 correct", ran.stdout, re.M))
    assert len(correct) == 3
    assert len(set(correct.values())) == 1
    assert int(correct["optimized"]) / 450 >= 0.97
    assert re.search(r"^loading +changes the logits by at most 0.0e\+00$", ran.stdout, re.M)
    assert re.search(r"speed-up \d+\.\d+x$", ran.stdout, re.M)


@pytest.mark.slow
def test_segment(tmp_path):
    """A short training finds shapes at a resolution it was not trained on; the optimized network finds the same."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "deep" / "picture.png"
    command = [sys.executable, EXAMPLES / "segment.py", "--steps", "60", "--output", path]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    found = re.findall(r"^(\w+) +intersection over union (\S+)", ran.stdout, re.M)
    scores = {name: float(value) for name, value in found}
    assert list(scores) == ["background", "disc", "cross", "triangle"]
    assert max(scores["disc"], scores["cross"], scores["triangle"]) > 0.15
    assert float(re.search(r"^optimizing +changes the class of (\S+)% of the pixels$", ran.stdout, re.M)[1]) < 0.1
    picture = np.asarray(image.open(path).convert("RGB"))
    assert min(picture.shape[:2]) > 500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
