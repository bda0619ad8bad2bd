"""Processes that tests start, and stop as a user does at a terminal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """Python with these arguments and variables, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as the tests may be, has SIGINT ignored, and passes that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def press_ctrl_c(process: subprocess.Popen, ready: Callable[[], bool]) -> tuple[int, str, str]:
    """Sends SIGINT as soon as ready() is true: (exit status, stdout, stderr)."""
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors
