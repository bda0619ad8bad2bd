"""An AOTInductor package of the optimized model runs with the compiled libraries alone, without our Python."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer

import convmixer_fast
from convmixer_fast import ConvMixer, optimize

LIBRARIES = Path(convmixer_fast.__file__).parent

RUN = """
import sys
import torch

*libraries, package, images, logits = sys.argv[1:]
for library in libraries:
    torch.ops.load_library(library)
run = torch._inductor.aoti_load_package(package)
torch.save([run(x) for x in torch.load(images)], logits)
assert not any(name.startswith("convmixer_fast") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, dtype, libraries",
    [
        ("cpu", torch.float32, ["_C.so"]),
        pytest.param("cuda", torch.float16, ["_C.so", "_C_cuda.so"], marks=pytest.mark.cuda),
    ],
)
def test_package_without_our_python(tmp_path, device, dtype, libraries):
    torch.manual_seed(0)
    model = randomize(ConvMixer(dim=32, depth=2, kernel_size=9, patch_size=4, n_classes=10)).to(device)
    optimized = optimize(model, dtype)
    inputs = [
        torch.randn(2, 3, 32, 24, device=device, dtype=dtype),
        torch.randn(5, 3, 40, 48, device=device, dtype=dtype),
    ]
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(optimized, (inputs[0],), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "convmixer.pt2"))
    images, logits = tmp_path / "images.pt", tmp_path / "logits.pt"
    torch.save(inputs, images)
    arguments = [*(LIBRARIES / library for library in libraries), package, images, logits]
    # An environment of its own, outside of the clone: only torch can be imported.
    subprocess.run([sys.executable, "-I", "-c", RUN, *map(str, arguments)], check=True, cwd=tmp_path, timeout=300)
    model = model.to(dtype)
    for ours, x in zip(torch.load(logits), inputs):
        with torch.no_grad():
            eager = model(x)
        assert_error_at_most_peer(ours, eager, float64_logits(model, x), f"packaged, {device}, {dtype}")
