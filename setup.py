"""Builds the two libraries: _C.so (schemas, CPU kernels) always, _C_cuda.so (CUDA kernels) where torch is a build with
CUDA and there is an nvcc.

Environment: CMF_CUDA=auto|0|1 (1: fail rather than build without CUDA), CMF_NVCC=path of nvcc, TORCH_CUDA_ARCH_LIST=
targets, such as "8.0;9.0a", or "all" for a release (default: the visible GPUs' own; where none is visible, a few that
run on every GPU from compute capability 8.0 on), CMF_LINEINFO=0|1 (default 1: the line tables by which profilers and
compute-sanitizer name source lines of CUDA kernels).
`build_ext --parallel 2` compiles both libraries at once. What the compilers print is in build/build.log.
"""

import copy
import importlib.util
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
ALL_TARGETS = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")
TARGETS_WITHOUT_GPU = ("8.0+PTX", "9.0a")
SAME_PTX = {"8.6": "8.0", "8.9": "8.0", "12.0": "10.0"}  # no kernel has code of its own for the former
SHOWN = 30  # lines of the log, when a build fails


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's folder. nvcc itself is asked: the file on PATH may be a wrapper script."""
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)[1]).resolve()


def choice(variable: str, accepted: tuple[str, ...]) -> str:
    """The environment variable's value; the first of the accepted ones where it is not set."""
    value = os.environ.get(variable, accepted[0])
    if value not in accepted:
        raise SystemExit(f"{variable} must be one of {', '.join(accepted)}, got {value!r}")
    return value


def choose_toolkit() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and the reason."""
    wanted = choice("CMF_CUDA", ("auto", "0", "1"))
    if wanted == "0":
        return None, "CMF_CUDA=0 was set"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    else:
        # Run by its path: the clone's root need not be on the path of whoever builds.
        find_tool = runpy.run_path(str(ROOT / "tools" / "find_cuda.py"))["find_tool"]
        try:
            nvcc = find_tool("nvcc")
        except FileNotFoundError as error:
            if os.environ.get("CMF_NVCC"):
                raise SystemExit(str(error)) from None
            reason = str(error)
        else:
            return toolkit_of(nvcc), ""
    if wanted == "1":
        raise SystemExit(f"CMF_CUDA=1, but {reason}")
    return None, reason


def gpu_targets() -> list[str]:
    """Those of the GPUs that torch sees, such as ["8.6", "9.0a"]."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    return ["9.0a" if capability == (9, 0) else "{}.{}".format(*capability) for capability in capabilities]


def choose_targets(toolkit: Path) -> tuple[list[str], str]:
    """The targets, such as ["8.0", "12.0+PTX"], and where they come from."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted not in ("", "all"):
        targets = re.split("[; ]+", wanted.strip("; "))
        if not all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", target) for target in targets):
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST must be "all" or targets such as "8.0;9.0a+PTX", got {wanted!r}')
        return targets, "TORCH_CUDA_ARCH_LIST"
    command = [toolkit / "bin" / "nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def offered(targets):
        return [target for target in targets if f"compute_{''.join(re.findall('[0-9]', target))}" in known]

    if wanted == "all":
        return offered(ALL_TARGETS), "all"
    if gpus := offered(gpu_targets()):
        return gpus, "the visible GPU's own"
    return list(TARGETS_WITHOUT_GPU), "no GPU is visible; TORCH_CUDA_ARCH_LIST chooses others, CMF_CUDA=0 none"


def sm_name(target: str) -> str:
    """sm_120+ptx for 12.0+PTX."""
    return f"sm_{target.replace('.', '').lower()}"


def gencode_flags(targets: list[str]) -> list[str]:
    """For nvcc. Targets whose code is the same until ptxas share one run of the compiler's front end."""
    flags = []
    for target in targets:
        real, _, ptx = target.partition("+")
        virtual = SAME_PTX.get(real, real).replace(".", "")
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{real.replace('.', '')}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{virtual},code=compute_{virtual}")
    return flags


def require_tools() -> None:
    """Ends with one line where a tool is missing that BuildExtension would look for in vain, with a traceback."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        raise SystemExit(
            f"convmixer_fast: no C++ compiler: {compiler!r} is not on PATH. Install one (Debian, Ubuntu: apt install "
            "g++), or name it in CXX"
        )
    if shutil.which("ninja"):
        return
    if importlib.util.find_spec("ninja") is None:
        raise SystemExit("convmixer_fast: ninja is missing: pip install ninja")
    import ninja  # the package of an environment that is not activated

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])


toolkit, missing = choose_toolkit()
if toolkit:
    os.environ["CUDA_HOME"] = str(toolkit)  # read when torch.utils.cpp_extension is imported
    targets, chosen = choose_targets(toolkit)
    cuda_build = " ".join(map(sm_name, targets))
    announcement = f"CPU kernels, and CUDA kernels for {cuda_build} ({chosen})"
else:
    cuda_build = missing
    announcement = f"CPU kernels alone: {missing}"

# It warns of a toolkit on a machine without a GPU, which is what a build machine is like.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# -g0: Python's own flags ask for debug data, which would be nine tenths of _C.so.
cxx_flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall"]
facts_source = "csrc/bindings/build_facts.cpp"
x86_only = set(sources("csrc/cpu/isa/*_avx*.cpp"))
cpu_sources = sources(
    "csrc/cpu/**/*.cpp",
    *(f"csrc/bindings/{name}.cpp" for name in ("schemas", "register_cpu", "network_cpu", "explain")),
)
cpu_sources.append(facts_source)
if os.uname().machine != "x86_64":
    cpu_sources = [source for source in cpu_sources if source not in x86_only]

extensions = [
    CppExtension(
        "convmixer_fast._C",
        cpu_sources,
        extra_compile_args={"cxx": cxx_flags},
        py_limited_api=True,
    )
]
if toolkit:
    libraries = next(folder for folder in (toolkit / "lib64", toolkit / "lib") if folder.is_dir())
    # torch's flags forbid half arithmetic; the kernels use the operators of cuda_fp16.h and cuda_bf16.h.
    forbidden = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    nvcc_flags = ["-O3", "-std=c++17", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
    nvcc_flags += ["-lineinfo"] if choice("CMF_LINEINFO", ("1", "0")) == "1" else []
    nvcc_flags += [f"-U__CUDA_NO_{name}__" for name in forbidden] + gencode_flags(targets)
    extensions.append(
        CppExtension(
            "convmixer_fast._C_cuda",
            [*sources("csrc/cuda/**/*.cu", "csrc/bindings/register_cuda.cpp"), facts_source],
            include_dirs=[str(toolkit / "include")],
            library_dirs=[str(libraries)],
            # The CUDA runtime is linked statically: any driver of its major version will do, whatever torch brings.
            # libtorch is named so that the stream function, a weak symbol, is found through it.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
            extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
            py_limited_api=True,
        )
    )


class PlatformWheel(bdist_wheel):
    """Neither library depends on a Python version: py3-none-<platform>."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BuildLog:
    """Takes what this process and the compilers print to a file, and shows one line a source: [7/23] csrc/cuda/pool.cu.
    After a failure it shows what the compiler said."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.terminal = [os.dup(1), os.dup(2)]
        reading, writing = os.pipe()
        self._redirect([writing, writing])
        os.close(writing)
        self.copier = threading.Thread(target=self._copy, args=(reading,))
        self.copier.start()

    def __exit__(self, kind, error, trace):
        if error:
            traceback.print_exception(kind, error, trace)
        self._redirect(self.terminal)
        self.copier.join()
        for descriptor in self.terminal:
            os.close(descriptor)
        if isinstance(error, Exception):
            lines = self.path.read_text(errors="replace").splitlines()
            # What ninja says of the first source that failed; what runs beside it, and Python's traceback, come after.
            first = next((i for i, line in enumerate(lines) if line.startswith("FAILED")), max(0, len(lines) - SHOWN))
            print(*(line[:200] for line in lines[first : first + SHOWN]), sep="\n", file=sys.stderr)
            raise SystemExit(f"convmixer_fast: the build failed; all that was printed is in {self.path}") from None

    def _redirect(self, descriptors: list[int]):
        for target, descriptor in zip((1, 2), descriptors, strict=True):
            (sys.stdout if target == 1 else sys.stderr).flush()
            os.dup2(descriptor, target)

    def _copy(self, reading: int):
        with open(reading, errors="replace") as printed, open(self.path, "w") as log:
            for line in printed:
                log.write(line)
                log.flush()
                step = re.match(r"(\[\d+/\d+\]) .*?(csrc/\S+\.(?:cpp|cu)) -o ", line)
                if step:
                    os.write(self.terminal[0], f"{step[1]} {step[2]}\n".encode())


class CleanBuild(BuildExtension):
    """Each library has a folder of its own for its objects, so that both can be compiled at the same time."""

    def run(self):
        require_tools()
        print(f"convmixer_fast: building {announcement}", file=sys.stderr)
        os.environ["NINJA_STATUS"] = "[%f/%t] "  # BuildLog looks for it
        folder = ROOT if self.inplace else Path(self.build_lib)
        if not toolkit:  # a _C_cuda.so of an earlier build may not stay beside what this one builds
            (folder / "convmixer_fast" / "_C_cuda.so").unlink(missing_ok=True)
        self.write_facts(Path(self.build_temp).resolve())
        with BuildLog(ROOT / "build" / "build.log"):
            super().run()

    def write_facts(self, folder: Path):
        """build_facts.h, which only build_facts.cpp includes: one file is compiled anew when a source changes."""
        fingerprint = runpy.run_path(str(ROOT / "csrc" / "fingerprint.py"))["fingerprint"]
        facts = {"CMF_SOURCES": fingerprint(ROOT), "CMF_CUDA_BUILD": cuda_build}
        text = "".join(f'#define {name} "{value}"\n' for name, value in facts.items())
        header = folder / "build_facts.h"
        folder.mkdir(parents=True, exist_ok=True)
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        for extension in self.extensions:
            extension.include_dirs.append(str(folder))

    def build_extension(self, ext):
        mine = copy.copy(self)
        mine.build_temp = os.path.join(self.build_temp, ext.name.rpartition(".")[2])
        super(CleanBuild, mine).build_extension(ext)


setup(
    ext_modules=extensions,
    cmdclass={"build_ext": CleanBuild.with_options(no_python_abi_suffix=True), "bdist_wheel": PlatformWheel},
)
