"""Everything that needs a GPU, in three parts of a few minutes each: `make gpu`.

It uses the libraries that are there if they load, contain code for this GPU and were built from these sources; else it
says why and builds both. Then come the steps of gpu_steps.py: --steps names parts (first, second, third) or single
steps, and leaves the other steps' results as they are. It uses the active python3, downloads nothing, and needs neither
make nor a repository (the commit is then $COMMIT). After each step the results so far are in
benchmarks/results/<device>/ and in --archive: README.md with all tables, JSON files, charts, logs and clocks.

--rehearse runs every step's real command line on a CPU, with options appended that make it tiny and with stand-ins for
the profiler, the sanitizer and nvidia-smi that check their arguments: a mistyped option costs nothing on a GPU then.

    python3 benchmarks/gpu.py --steps first --minutes 5.75 --archive results.tar.gz
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

BEGUN = time.monotonic()  # what follows imports torch, which on a fresh machine is a good part of a minute

import gpu_steps  # noqa: E402
import rehearsal  # noqa: E402
import report  # noqa: E402
import supervisor  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(report.ROOT / "csrc"))

from fingerprint import fingerprint  # noqa: E402


def unusable(capability: tuple[int, int]) -> str:
    """Why the libraries in the package's folder do not do for a GPU; empty if they do.

    They are loaded in a process of their own: one that crashes there, or is built anew, does no harm here.
    """
    code = "import convmixer_fast, json; print(json.dumps(convmixer_fast.build_info()))"
    environment = os.environ | {"PYTHONPATH": str(report.ROOT)}
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=report.ROOT, env=environment, capture_output=True, text=True
    )
    if asked.returncode:
        return f"they do not load: {([''] + asked.stderr.strip().splitlines())[-1] or f'exit {asked.returncode}'}"
    return unfit(json.loads(asked.stdout.splitlines()[-1]), capability)


def unfit(info: dict, capability: tuple[int, int]) -> str:
    """As unusable(), of libraries that loaded, and so are of these sources: by what build_info() says of them."""
    target = "sm_" + gpu_steps.target(capability).replace(".", "")
    if info["cuda_missing"]:
        return info["cuda_missing"]
    if target not in info["cuda_targets"]:
        return f"the kernels are for {', '.join(info['cuda_targets'])}, not for {target}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Runs the steps; 0 if all that ran passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", metavar="NAME", default=(), help="parts or steps (all)")
    parser.add_argument("--minutes", type=float, help="for everything (as many as the steps ask for)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results/<device>)")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of that folder, written anew after each step")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, to check the steps' command lines")
    args = parser.parse_args(argv)
    try:
        planned = gpu_steps.plan(Path(), args.steps)
    except ValueError as error:
        parser.error(f"argument --steps: {error}")
    if not (args.rehearse or torch.cuda.is_available()):
        reason = "is a build without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        parser.error(f"this command needs a GPU, and torch {torch.__version__} {reason}")
    seconds = 60 * args.minutes if args.minutes else gpu_steps.seconds_for(planned)
    archive = args.archive and args.archive.resolve()
    if args.rehearse:
        out = (args.out or report.ROOT / "build" / "rehearsal").resolve()
        return rehearse(out, args.steps, 3 * seconds, archive)
    facts = report.environment(torch.device("cuda", torch.cuda.current_device()))
    out = (args.out or report.results_folder(facts["device"])).resolve()
    capability, say = torch.cuda.get_device_capability(), supervisor.Speaker(supervisor.OUTPUT_LIMIT)
    reason = unusable(capability)
    say(f"libraries: building them, since {reason}" if reason else f"libraries: of these sources, {fingerprint()}")
    steps = [gpu_steps.build(capability)] if reason else []
    steps += gpu_steps.plan(out, args.steps, seconds - sum(step.seconds for step in steps))
    return supervisor.run(steps, out, facts, seconds - (time.monotonic() - BEGUN), archive, say)


def rehearse(out: Path, names: list[str], seconds: float, archive: Path | None) -> int:
    """The steps on a CPU, and the build's options; 0 if all that ran passed."""
    say = supervisor.Speaker(supervisor.OUTPUT_LIMIT)
    say(f"libraries: {unusable((9, 0)) or 'as a run on sm_90a wants them'}")
    facts = report.environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, rehearsal.stand_ins(Path(folder)):
        steps = [gpu_steps.build((9, 0)), *gpu_steps.plan(out, names, seconds)]
        tiny = [make_tiny(step, number) for number, step in enumerate(steps)]
        return supervisor.run(tiny, out, facts, seconds, archive, say)


def make_tiny(step: supervisor.Step, number: int) -> supervisor.Step:
    """The step as a rehearsal runs it: two at a time on a core each, since nothing is timed, and with time for a slow
    machine. torch.compile works in the first step that has it, without trying out the processor's vector instructions;
    the others leave out its minutes."""
    compiler = {"TORCHINDUCTOR_VEC_ISA_OK": "0"} if step.name == "networks-compiled" else {"TORCH_COMPILE_DISABLE": "1"}
    return replace(
        step,
        command=[*step.command, *step.rehearsal],
        seconds=3 * step.seconds,
        environment=step.environment | compiler | {"OMP_NUM_THREADS": "1"},
        group=step.group or f"pair {number // 2}",
        in_place_of="",
    )


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
