"""What the CUDA launchers say to the runtime, in the emulator's stand-in for it: limits of shared memory, errors."""

import contextlib
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from emulated import EmulatedOps
from ptxsim.device import OUT_OF_MEMORY, _LaunchFailed
from ptxsim.toolchain import find_nvcc

OPTIN = 232448  # bytes of shared memory of a block on sm_90, at most
MAX_DYNAMIC_SHARED, CARVEOUT = 8, 9  # cudaFuncAttribute
WITHOUT_ASKING = 48 << 10  # bytes that every kernel may have


def emulated_ops():
    return contextlib.closing(EmulatedOps("sm_90a", sm_count=2))


@pytest.fixture(scope="module")
def ops():
    with emulated_ops() as emulated:
        yield emulated


# Numbers of devices: under a new one, launchers take the emulated GPU for one that they have not seen.
NEW_NUMBERS = iter(range(60))
FIRST_OF_OTHERS = 60


class RuntimeCalls:
    """What the launchers call of the runtime, as far as it goes through a HostProgram.

    Attributes:
        names: of all calls so far.
        settings: (attribute, value) of all function attributes set so far.
        failing: which call is to fail, counted from the next; None: none.
        before: by name, what to do once before such a call is made.
    """

    def __init__(self, monkeypatch, program):
        self.names, self.settings, self.failing = [], [], None
        self.before: dict[str, Callable[[], None]] = {}
        for attribute in dir(type(program)):
            if attribute.startswith("_op_") and attribute != "_op_log_error":
                name = attribute.removeprefix("_op_")
                monkeypatch.setattr(program, attribute, partial(self._call, name, getattr(program, attribute)))

    def _call(self, name, original, out, *arguments):
        self.names.append(name)
        if self.failing is not None:
            self.failing -= 1
            if self.failing < 0:
                self.failing = None
                raise _LaunchFailed(OUT_OF_MEMORY, f"planted in {name}")
        if name == "func_set":
            self.settings.append(arguments[1:])
        if name in self.before:
            self.before.pop(name)()
        return original(out, *arguments)

    def of(self, run) -> list[str]:
        """The names of the calls that run() makes."""
        first = len(self.names)
        run()
        return self.names[first:]


@pytest.fixture
def calls(monkeypatch, ops):
    """The runtime calls on a device that no launcher has seen."""
    ops.program.device_number = next(NEW_NUMBERS)
    return RuntimeCalls(monkeypatch, ops.program)


def noise(*shape, dtype, layout=torch.contiguous_format):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).contiguous(memory_format=layout)


def forward(ops, size, dtype=torch.float16, kernel_size=(9, 9), batch=4, channels=16, layout=torch.channels_last):
    return ops.depthwise_conv2d(
        noise(batch, channels, *size, dtype=dtype, layout=layout), noise(channels, 1, *kernel_size, dtype=dtype)
    )


def direct(ops, size):
    return forward(ops, size, torch.float32, batch=1, channels=1, layout=torch.contiguous_format)


def wgrad(ops, size, dtype=torch.float16, kernel_size=(120, 3), channels=1, layout=torch.contiguous_format):
    x = noise(1, channels, *size, dtype=dtype, layout=layout)
    return torch.cat([gradient.flatten() for gradient in ops.depthwise_conv2d_wgrad(x, x, kernel_size)])


def wgrad_direct(ops, size):
    return wgrad(ops, size, torch.float32, (3, 3), channels=8, layout=torch.channels_last)


def pool(ops, size):
    vectors = (noise(3, dtype=torch.float32),) * 3
    return ops.activate_pool(noise(2, 3, *size, dtype=torch.float16), *vectors)


# The kernel, and two sizes of one instantiation, the first of which needs more shared memory.
LAUNCHERS = {
    "depthwise_mma_kernel": (forward, (14, 14), (32, 32)),
    "depthwise_direct_kernel": (direct, (14, 14), (24, 24)),
    "depthwise_wgrad_mma_kernel": (wgrad, (32, 128), (64, 64)),
    "depthwise_wgrad_direct_kernel": (wgrad_direct, (32, 32), (24, 24)),
}
launchers = pytest.mark.parametrize("kernel", LAUNCHERS)


def launched(ops, kernel):
    """The record of the last call's launch of a kernel."""
    (record,) = [record for record in ops.launches if f"::{kernel}<" in record.kernel]
    return record


# ------------------------------------------------------------------------------------------------ shared memory


@launchers
def test_limits_are_the_devices_and_are_set_once(ops, calls, kernel):
    run, large, small = LAUNCHERS[kernel]
    records = []
    for size in (small, large, small, large):
        run(ops, size)
        records.append(launched(ops, kernel))
    assert len({record.kernel for record in records}) == 1
    assert records[1].shared_bytes > records[0].shared_bytes
    assert calls.settings == [(MAX_DYNAMIC_SHARED, OPTIN), (CARVEOUT, 100)]
    assert records[0].attributes == {"max_dynamic_shared": OPTIN, "carveout": 100}


def test_limits_of_kernels_with_one_signature(ops, calls):
    for kernel_size in ((9, 9), (7, 7), (9, 9), (7, 7)):
        forward(ops, (14, 14), kernel_size=kernel_size)
        assert launched(ops, "depthwise_mma_kernel").shared_bytes > WITHOUT_ASKING
    assert calls.settings == 2 * [(MAX_DYNAMIC_SHARED, OPTIN), (CARVEOUT, 100)]


@pytest.mark.parametrize(
    "kernel, call",
    [
        ("depthwise_mma_kernel", "occupancy"),
        ("depthwise_mma_kernel", "launch"),
        ("depthwise_wgrad_mma_kernel", "launch"),
        ("depthwise_wgrad_direct_kernel", "launch"),
    ],
)
def test_smaller_launch_in_between(ops, calls, kernel, call):
    """As of another thread: after the larger launch has set its limit, and before it starts."""
    run, large, small = LAUNCHERS[kernel]
    expected, between = run(ops, large), []

    def run_small():
        between.append(run(ops, small))
        between.append(launched(ops, kernel))

    ops.program.device_number = next(NEW_NUMBERS)
    calls.before[call] = run_small
    result = run(ops, large)
    assert torch.equal(result, expected)
    assert torch.equal(between[0], run(ops, small))
    record = launched(ops, kernel)
    assert between[1].kernel == record.kernel
    run(ops, large)
    assert launched(ops, kernel).shared_bytes > between[1].shared_bytes > WITHOUT_ASKING


def test_static_shared_memory_counts(ops, calls, monkeypatch):
    """The kernels have none today."""
    get = ops.program._op_func_get

    def with_static(out, *arguments):
        get(out, *arguments)
        assert out[1] == 0
        out[1] = 1000

    monkeypatch.setattr(ops.program, "_op_func_get", with_static)
    direct(ops, (8, 8))
    assert calls.settings == [(MAX_DYNAMIC_SHARED, OPTIN - 1000), (CARVEOUT, 100)]


def test_each_device_has_limits_of_its_own(ops, calls):
    """Also those beyond the 64 that are kept in mind."""
    for number, times in ((3000, 3), (63, 1), (64, 3), (FIRST_OF_OTHERS, 1)):
        ops.program.device_number = number
        before = len(calls.settings)
        for _ in range(3):
            direct(ops, (8, 8))
        assert len(calls.settings) - before == 2 * times, number


def test_flags_and_answers_belong_to_one_library(ops):
    """Were they symbols that the linker merges, a second copy of the library would take its kernels for prepared."""
    symbols = subprocess.run(["nm", "-C", ops.program.path], capture_output=True, text=True, check=True).stdout
    for name, least in ((">()::prepared", 100), (")::answers", 60)):
        kinds = [line.split()[1] for line in symbols.splitlines() if line.endswith(name)]
        assert len(kinds) > least
        assert set(kinds) == {"b"}  # local, of the data that starts as zero


# ------------------------------------------------------------------------------------------------ questions

PUBLIC = {
    "depthwise": partial(forward, size=(14, 14)),
    "depthwise, direct": partial(direct, size=(8, 8)),
    "depthwise_direct": partial(forward, size=(8, 8), channels=3, kernel_size=(3, 3)),
    "depthwise_wgrad": partial(wgrad, size=(32, 32), kernel_size=(3, 3)),
    "depthwise_wgrad, direct": partial(wgrad_direct, size=(8, 8)),
    "activate_pool": partial(pool, size=(5, 5)),
}
NO_QUESTIONS = {"device_number", "launch"}  # the first comes from the thread's memory, not from the driver
DEVICE = {"device_attribute": 4}  # compute capability, SMs, shared memory of a CTA and of an SM
PREPARED = {"device_attribute": 1, "func_get": 1, "func_set": 2}
OCCUPANCY = {"occupancy": 1}
# What a first call asks and sets.
FIRST_CALL = {
    "depthwise": [DEVICE, PREPARED, OCCUPANCY],
    "depthwise, direct": [DEVICE, PREPARED],
    "depthwise_direct": [PREPARED],
    "depthwise_wgrad": [DEVICE, PREPARED],
    "depthwise_wgrad, direct": [DEVICE, PREPARED],
    "activate_pool": [],
}


@pytest.mark.parametrize("launcher", PUBLIC)
def test_the_driver_is_asked_once(ops, calls, monkeypatch, launcher):
    if launcher == "depthwise_direct":
        monkeypatch.setattr(ops, "launcher", ops.program.depthwise_direct)
    run = partial(PUBLIC[launcher], ops)
    asked = Counter(name for name in calls.of(run) if name not in NO_QUESTIONS)
    assert asked == sum(map(Counter, FIRST_CALL[launcher]), Counter())
    assert NO_QUESTIONS.issuperset(calls.of(run))


def occupancies(calls, run) -> int:
    return calls.of(run).count("occupancy")


def test_occupancy_is_asked_for_each_size_of_shared_memory(ops, calls):
    run, large, small = LAUNCHERS["depthwise_mma_kernel"]
    assert [occupancies(calls, partial(run, ops, size)) for size in (small, large, small, large)] == [1, 1, 0, 0]


def test_a_first_launch_amid_another_ones_question(ops, calls):
    """As of two threads: each asks, and takes its answer."""
    run, large, _ = LAUNCHERS["depthwise_mma_kernel"]
    between = []
    calls.before["occupancy"] = lambda: between.append(run(ops, large))
    assert occupancies(calls, lambda: between.append(run(ops, large))) == 2
    assert torch.equal(*between)
    assert occupancies(calls, partial(run, ops, large)) == 0


def test_each_device_has_properties_of_its_own(ops, calls):
    run, large, _ = LAUNCHERS["depthwise_mma_kernel"]
    numbers = ops.program.device_number, next(NEW_NUMBERS)
    asked = []
    for number in 2 * numbers:
        ops.program.device_number = number
        asked.append(calls.of(partial(run, ops, large)))
    assert [names.count("occupancy") for names in asked] == [1, 1, 0, 0]
    assert [names.count("device_attribute") for names in asked] == [5, 5, 0, 0]


def test_answer_cache(tmp_path):
    program = Path(__file__).with_name("answer_cache_program.cpp")
    flags = ["-std=c++17", "-cudart", "none", "-Xcompiler=-O1,-Wall,-pthread,-fsanitize=thread"]
    subprocess.run([find_nvcc(), *flags, program, "-o", tmp_path / "program"], check=True)
    ran = subprocess.run([tmp_path / "program"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("launcher", PUBLIC)
def test_error_is_returned_once(monkeypatch, launcher):
    """Whatever runtime call fails, the launcher returns its error, leaves none behind, and the next call is good."""
    with emulated_ops() as ops:
        check_errors(ops, RuntimeCalls(monkeypatch, ops.program), monkeypatch, launcher)


def check_errors(ops, calls, monkeypatch, launcher):
    """ops: of which no launcher has been called."""
    name = launcher.partition(",")[0]
    if name == "depthwise_direct":
        monkeypatch.setattr(ops, "launcher", ops.program.depthwise_direct)
    run, results = partial(PUBLIC[launcher], ops), []
    made = calls.of(lambda: results.append(run()))
    assert made.count("launch") == (2 if "wgrad" in name else 1)
    returned_by, public = set(), {name, "depthwise_wgrad_workspace"} if "wgrad" in name else {name}
    for failing, call in enumerate(made):
        ops.program.device_number += 1
        calls.failing = failing
        with pytest.raises(RuntimeError, match=rf"returned CUDA error {OUT_OF_MEMORY}: .*planted in {call}") as error:
            run()
        returned_by.add(str(error.value).partition(" ")[0])
        assert ops.program.last_error == 0, call
        again = calls.of(lambda: results.append(run()))
        assert torch.equal(results[-1], results[0])
        wanted = made.count("func_set") if made[:failing].count("func_set") < made.count("func_set") else 0
        assert again.count("func_set") == wanted, f"after a failed {call}"
        assert call in again, f"after a failed {call}"
    assert returned_by == public
