"""tools/compare_builds.py, on objects compiled here."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "compare_builds.py"
HELPERS = """
static __attribute__((noinline)) double helper(double x, const double* y) { return x * 3.25 + y[0]; }
static __attribute__((noinline)) double another(double x, const double* y) { return x * 3.5 - y[0]; }
static const int digits[] = {3, 1, 4, 1, 5};
"""
USERS = """
double apply(double x, const double* y) { return helper(x, y) + another(x + 1, y); }
int digit(int i) { return digits[i]; }
const char* words(int i) { return i ? "one" : "two"; }
typedef double (*Function)(double, const double*);
static const Function pointers[] = {apply, helper};
Function choose(int i) { return pointers[i]; }
"""
SOURCE = HELPERS + USERS
BODIES = {"helper", "another", "apply", "digit", "words", "choose", "digits", "pointers"}


def compare(folder: Path, changed: str):
    for name, source in (("before", SOURCE), ("after", changed)):
        (folder / name).mkdir()
        path = folder / name / "source.cpp"
        path.write_text(source)
        subprocess.run(["g++", "-O2", "-fPIC", "-c", path, "-o", path.with_suffix(".o")], check=True)
    command = [sys.executable, TOOL, folder / "before", folder / "after"]
    return subprocess.run(command, capture_output=True, text=True)


def test_names_and_order_do_not_count(tmp_path):
    lines = HELPERS.splitlines()
    changed = "\n".join(reversed(lines)) + USERS
    for old, new in (("helper", "assistant"), ("words", "text"), ("digits", "numbers"), ("pointers", "table")):
        changed = changed.replace(old, new)
    result = compare(tmp_path, changed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"{len(BODIES)} bodies before, {len(BODIES)} after")
    assert f"{len(BODIES)} identical" in result.stdout


@pytest.mark.parametrize(
    ("old", "new", "differing"),
    [
        ("3.25", "3.75", {"helper", "apply", "pointers", "choose"}),  # a constant in memory, and all that lead to it
        ("- y[0]", "- y[1]", {"another", "apply", "pointers", "choose"}),
        (
            "return helper(x, y) + another(x + 1, y)",
            "return another(x, y) + helper(x + 1, y)",
            {"apply", "pointers", "choose"},
        ),
        ("{apply, helper}", "{helper, apply}", {"pointers", "choose"}),
        ("{3, 1, 4, 1, 5}", "{3, 1, 4, 1, 6}", {"digits", "digit"}),
        ('"one"', '"six"', {"words"}),
    ],
)
def test_changes_are_found(tmp_path, old, new, differing):
    assert SOURCE.count(old) == 1
    result = compare(tmp_path, SOURCE.replace(old, new))
    assert result.returncode == 1
    for label in ("only before", "only after"):
        lines = [line for line in result.stdout.splitlines() if line.startswith(label)]
        names = {line.split(": ", 1)[1].split("(")[0].split()[0] for line in lines}
        assert names == differing


def test_no_objects(tmp_path):
    result = subprocess.run([sys.executable, TOOL, tmp_path, tmp_path], capture_output=True, text=True)
    assert result.returncode == 1 and "holds no object files" in result.stderr
