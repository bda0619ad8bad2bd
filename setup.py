"""Builds the two libraries: _C.so (schemas, CPU kernels) always, _C_cuda.so (CUDA kernels) where there is an nvcc.

Environment: CMF_CUDA=auto|0|1 (1: fail rather than build without CUDA), CMF_NVCC=path of nvcc,
TORCH_CUDA_ARCH_LIST=targets (default: all that nvcc knows of DEFAULT_TARGETS), CMF_LINEINFO=0|1 (default 1: the line
tables by which profilers and compute-sanitizer name source lines of CUDA kernels).
`build_ext --parallel 2` compiles both libraries at once.
"""

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
DEFAULT_TARGETS = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")


def find_nvcc() -> Path | None:
    site_packages = Path(sysconfig.get_path("purelib"))
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        os.environ.get("CMF_NVCC"),
        *(Path(home) / "bin" / "nvcc" for home in homes),
        shutil.which("nvcc"),
        *site_packages.glob("nvidia/cu*/bin/nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((Path(nvcc) for nvcc in candidates if nvcc and os.access(nvcc, os.X_OK)), None)


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
    nvcc = find_nvcc()
    if wanted == "0":
        reason = "CMF_CUDA=0 was set"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif nvcc is None:
        reason = "no nvcc was found (CMF_NVCC, CUDA_HOME, PATH, the toolkit's PyPI packages)"
    else:
        return toolkit_of(nvcc), ""
    if wanted == "1":
        raise SystemExit(f"CMF_CUDA=1, but {reason}")
    return None, reason


def set_targets(toolkit: Path) -> str:
    """Sets TORCH_CUDA_ARCH_LIST where it is not set; returns the targets as "sm_80 sm_90a"."""
    known = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    offered = [t for t in DEFAULT_TARGETS if f"compute_{t.rstrip('a').replace('.', '')}" in known.stdout.split()]
    targets = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(offered) + "+PTX")
    return " ".join(f"sm_{t.replace('.', '').replace('+PTX', '+ptx')}" for t in re.split("[; ]+", targets))


def load_fingerprint():
    """csrc/fingerprint.py as a module: the clone's root need not be on the path of whoever builds."""
    spec = importlib.util.spec_from_file_location("fingerprint", ROOT / "csrc" / "fingerprint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit, missing = choose_toolkit()
if toolkit:
    os.environ["CUDA_HOME"] = str(toolkit)  # read when torch.utils.cpp_extension is imported
    cuda_build = set_targets(toolkit)
else:
    cuda_build = missing
    print(f"convmixer_fast: building the CPU part only: {missing}.", file=sys.stderr)

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# -g0: Python's own flags ask for debug data, which would be nine tenths of _C.so.
cxx_flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall"]
facts_source = "csrc/bindings/build_facts.cpp"
x86_only = set(sources("csrc/cpu/*_avx*.cpp"))
cpu_sources = sources(
    "csrc/cpu/*.cpp", *(f"csrc/bindings/{name}.cpp" for name in ("library", "cpu_ops", "mixer_ops", "explain"))
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
    nvcc_flags += [f"-U__CUDA_NO_{name}__" for name in forbidden]
    extensions.append(
        CppExtension(
            "convmixer_fast._C_cuda",
            [*sources("csrc/cuda/*.cu", "csrc/bindings/cuda_ops.cpp"), facts_source],
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


class CleanBuild(BuildExtension):
    """Each library has a folder of its own for its objects, so that both can be compiled at the same time."""

    def run(self):
        folder = ROOT if self.inplace else Path(self.build_lib)
        if not toolkit:  # a _C_cuda.so of an earlier build may not stay beside what this one builds
            (folder / "convmixer_fast" / "_C_cuda.so").unlink(missing_ok=True)
        self.write_facts(Path(self.build_temp).resolve())
        super().run()

    def write_facts(self, folder: Path):
        """build_facts.h, which only build_facts.cpp includes: one file is compiled anew when a source changes."""
        facts = {"CMF_SOURCES": load_fingerprint().fingerprint(ROOT), "CMF_CUDA_BUILD": cuda_build}
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
