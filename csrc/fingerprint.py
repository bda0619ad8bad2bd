"""Which sources a library was compiled from: setup.py writes this digest into both libraries, and whoever wants to know
whether a library that is already there fits these sources compares."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(root: Path = ROOT) -> str:
    """SHA-256 (first 12 digits) over setup.py, the search for nvcc and every file of csrc/, by name and content."""
    files = [
        path
        for path in (root / "csrc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")  # an editor's own
    ]
    digest = hashlib.sha256()
    for path in [root / "setup.py", root / "tools" / "find_cuda.py", *sorted(files)]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
