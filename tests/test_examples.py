"""The examples, run as a newcomer runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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
