"""The end of the tests' report."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import warnings
import pytest


@pytest.mark.parametrize("number", range(3))
def test_skipped(number):
    pytest.skip("no GPU is visible")


@pytest.mark.skip(reason="no compiler")
def test_skipped_by_a_mark():
    pass


@pytest.mark.parametrize("number", range(2))
def test_warns(number):
    warnings.warn("old way")
"""


def test_skips_are_summed_by_reason_and_a_warning_is_shown_once(tmp_path):
    (tmp_path / "conftest.py").write_text("from summary import pytest_terminal_summary\n")
    (tmp_path / "test_few.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", tmp_path]
    command += ["-o", f"pythonpath={Path(__file__).parent}", "--disable-warnings", "-r", "fE", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("skipped", "warning", "SKIPPED"))]
    assert lines[:2] == ["skipped 3x: no GPU is visible", "skipped 1x: no compiler"]
    (warning,) = lines[2:]
    assert warning.startswith("warning 2x: ") and warning.endswith("test_few.py:18: UserWarning: old way")
