"""Makes timm importable beside a CPU build of torch, which the operators in torchvision's wheel do not load into; and
keeps oneDNN, inside PyTorch, from its float16 kernels for AVX512-FP16, which never return from a depthwise convolution
15 wide. A CUDA fault ends its process (cuda_faults.py), and float32 results of PyTorch on a GPU, which tests judge by,
are computed in float32."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # they share the cores: a worker's tests, and the programs that they start, compute on its part of them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else it compiles a program for each kind of instructions
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # read once, at the first convolution

import pytest  # noqa: E402
import torch  # noqa: E402
from cuda_faults import pytest_runtest_logfinish  # noqa: E402, F401
from summary import pytest_terminal_summary  # noqa: E402, F401

torch.backends.cudnn.allow_tf32 = False  # by default convolutions round their operands to TF32
torch.backends.cuda.matmul.allow_tf32 = False

try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # timm is not there either: its tests skip
except RuntimeError:  # operator torchvision::nms does not exist: torchvision looks them up while it is imported
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items):
    from convmixer_fast import build_info

    missing = build_info()["cuda_missing"] if torch.cuda.is_available() else "no GPU is visible"
    if missing:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def two_threads(monkeypatch):
    """Operators, and the programs that a test starts, compute with two threads or more, even in a worker of
    pytest-xdist whose part of the cores is one."""
    threads = torch.get_num_threads()
    wanted = max(2, threads)
    torch.set_num_threads(wanted)
    monkeypatch.setenv("OMP_NUM_THREADS", str(wanted))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def product(request, monkeypatch):
    """Who multiplies the matrices of optimized networks on the CPU, in place of what this machine would choose: our own
    kernels, or what indirect parameters say."""
    from convmixer_fast import cpu_gemm

    chosen = getattr(request, "param", cpu_gemm.OWN)
    monkeypatch.setenv("CMF_CPU_GEMM", chosen)
    cpu_gemm.products.cache_clear()
    yield chosen
    cpu_gemm.products.cache_clear()


@pytest.fixture
def lacking(monkeypatch):
    """benchmarks/throughput.py has no memory for channels_last, no compiler for compile, and no timm."""
    import throughput

    def no_memory(model, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def no_compiler(model, images):
        raise RuntimeError("no compiler\nand a long explanation")

    def no_timm():
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setitem(throughput.BACKENDS, "channels_last", throughput.Backend(no_memory))
    monkeypatch.setitem(throughput.BACKENDS, "compile", throughput.Backend(no_compiler))
    monkeypatch.setattr(throughput, "_timm", no_timm)
