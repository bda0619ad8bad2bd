"""Other runtimes for the same network on a CPU, each as a function of images: ONNX Runtime and OpenVINO.

Both get the weights of the PyTorch model, as many threads as torch uses, and the images' own memory.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Runtime = Callable[[Tensor], Tensor]
POLL = 100  # milliseconds


def onnxruntime(model: nn.Module, images: Tensor) -> Runtime:
    """ONNX Runtime with all graph optimizations.

    Raises TypeError for bfloat16, in which its CPU kernels do not convolve.
    """
    import onnxruntime as ort

    if images.dtype == torch.bfloat16:
        raise TypeError("ONNX Runtime has no bfloat16 convolution on the CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # no waiting in the next one's time
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:  # in one piece a model may not have 2 GiB
        path = Path(folder) / "model.onnx"
        with contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
            torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, external_data=True)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Runtime:
    """OpenVINO, tuned for one batch at a time, computing in the images' dtype; bfloat16 ones are passed as float32."""
    import openvino as ov

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[images.dtype]
    converted = ov.convert_model(model.float(), example_input=images.float())
    converted.reshape(list(images.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.compile_model(converted, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        inputs = x.float().numpy()  # of which OpenVINO keeps the address
        request.start_async({0: inputs}, share_inputs=True)
        try:
            while not request.wait_for(POLL):
                pass  # infer() would not come back to Python, where a limit of time is noticed, before it is done
        except BaseException:
            request.cancel()
            with contextlib.suppress(RuntimeError):  # which says that it was cancelled
                request.wait()
            raise
        return torch.from_numpy(request.results[0].copy()).to(x.dtype)

    return run


@contextlib.contextmanager
def _quiet(name: str):
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
