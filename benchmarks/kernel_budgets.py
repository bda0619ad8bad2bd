"""What each instantiation of a CUDA kernel may cost: registers, spills, and for some instructions per plane.

The figures of a commit are recorded in a file; a later one may not be worse. Kernels that a case of launches() reaches
are recorded under that launch, not under their names, so that they can be compared after a change of their template
arguments, in float16 on sm_90a with their instructions; all others under their names.

    python benchmarks/kernel_budgets.py tests/data/kernel_budgets.json            # compares, and returns 1 if worse
    python benchmarks/kernel_budgets.py tests/data/kernel_budgets.json --record
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from kernel_report import CASES, PAPER, PLAIN, Case, Kernel, load_kernels, trace_case
from report import write

COUNTED = "sm_90a"  # the target whose instructions are counted
REGISTERS_AT_ONCE = 8  # a thread's registers are allocated by so many
# By layout and shape: one for each loader but that of channels_last in tiles. 11x9, 17x17, 31x31 and 5x51 take the
# ring, with one, two, three and four k-steps.
KERNEL_SIZES: dict[tuple[str, tuple[int, int, int, int]], tuple[int | tuple[int, int], ...]] = {
    ("contiguous", PAPER): (3, 5, 7, 9, (11, 9), 17, 31),
    ("contiguous", (64, 384, 14, 14)): (3, 5, 7, 9, 17, 31),
    ("contiguous", (64, 96, 112, 112)): (7, 17, (5, 51)),
    ("channels_last", PAPER): (7, 9, (11, 9), 17),
}
STEPS = [
    *(dict(activation=act, prologue=prologue) for act in ("gelu", "relu") for prologue in (False, True)),
    PLAIN,
]

Budgets = dict[str, dict[str, dict[str, Any]]]  # by target and launch or name


def launches() -> list[Case]:
    """The paper's maps, and some of each loader that these do not reach."""
    dtypes = torch.float16, torch.bfloat16
    result = [
        Case(shape, size, dtype, layout, **step)
        for dtype, ((layout, shape), sizes) in itertools.product(dtypes, KERNEL_SIZES.items())
        for size, step in itertools.product(sizes, STEPS)
    ]
    result += [Case(PAPER, k, dtype, operator="wgrad") for dtype in dtypes for k in (3, 5, 7, 9, 17)]
    return result


def measure(kernels: list[Kernel], cases: list[Case]) -> Budgets:
    """What the kernels cost: by case those that a case reaches, by name the others."""
    result: Budgets = {target: {} for target in sorted({kernel.target for kernel in kernels})}
    for target, entries in result.items():
        by_name = {kernel.name: kernel for kernel in kernels if kernel.target == target}
        reached = set()
        for case in cases:
            name = case.launch(target).name
            reached.add(name)
            if kernel := by_name.get(name):
                entries[" ".join(case.labels)] = entry = {"kernel": name, **resources(kernel)}
                if target == COUNTED and case.dtype == torch.float16:
                    entry["instructions"] = round(trace_case(kernel, case).opcodes.total(), 2)
        entries |= {name: resources(kernel) for name, kernel in by_name.items() if name not in reached}
    return result


def resources(kernel: Kernel) -> dict[str, int]:
    return {"registers": kernel.resources.registers, "spills": kernel.resources.spills}


def worse(recorded: Budgets, found: Budgets) -> list[str]:
    """What is worse than recorded, or was not recorded, in words."""
    result = []
    for target, entries in found.items():
        for label, entry in entries.items():
            before = recorded.get(target, {}).get(label)
            if before is None:
                result.append(f"{target}, {label}: not recorded")
                continue
            limits = dict(before)
            limits["registers"] = -(-limits["registers"] // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
            for what in ("registers", "spills", "instructions"):
                if what in entry and entry[what] > limits.get(what, 0):
                    result.append(f"{target}, {label}: {entry[what]} {what}, recorded are {before.get(what)}")
    return result


def as_text(budgets: Budgets) -> str:
    """JSON with a line per entry."""
    targets = []
    for target, entries in budgets.items():
        lines = [f"  {json.dumps(label)}: {json.dumps(entry)}" for label, entry in entries.items()]
        targets.append(f" {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(targets) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--record", action="store_true", help="write the file anew")
    parser.add_argument("--targets", nargs="+", default=list(CASES), metavar="T", help=f"({' '.join(CASES)})")
    parser.add_argument("--kernels", default="*", metavar="P", help="sources by name, without .cu (%(default)s)")
    args = parser.parse_args(argv)
    found = measure(load_kernels(args.targets, args.kernels), launches())
    if args.record:
        write(args.file, as_text(found))
        return 0
    failures = worse(json.loads(args.file.read_text()), found)
    print("\n".join(failures) or "nothing is worse than recorded")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
