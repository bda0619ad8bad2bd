"""Ends a test process whose CUDA is unusable. After an illegal access every later CUDA call of the process fails: tests
that are right would be reported as failures, and the one that is wrong would drown among them."""

import os

import pytest
import torch

EXIT_STATUS = 70


def pytest_runtest_logfinish(nodeid, location):
    """Waits for the test's kernels. Under pytest-xdist, which names the test and starts another worker, a fault ends
    the worker; without it, the run."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(EXIT_STATUS)
        pytest.exit(f"CUDA is unusable after {nodeid}: {error}", returncode=EXIT_STATUS)
