"""Compares the machine code of two builds, to prove that a move or a renaming changed no instruction.

    python tools/compare_builds.py BEFORE AFTER

BEFORE and AFTER are folders of object files, such as build/temp.linux-x86_64-cpython-311 of two checkouts that were
built with the same flags, or parts of them (.../_C/csrc/cpu). A CUDA object's kernels are compared, as SASS with the
encoding of each instruction; any other object's functions and tables. Names and places do not count: the bodies are
compared as two multisets, in which the name of a callee or a table is replaced by the digest of its body, and the
address of a constant by the constant. What a switch's jump table holds is not compared. Exits with 1 if they differ.

Needs objdump (binutils), and for CUDA objects cuobjdump, where find_cuda.py finds it.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from find_cuda import find_tool

ROUNDS = 4  # of replacing callees by their digests: calls that differ deeper than that are not told apart


@dataclass
class Function:
    """A function, a kernel, or a table of constants. In `lines` {name} stands for another one of the same object."""

    name: str
    origin: str
    lines: list[str] = field(default_factory=list)
    digest: str = ""

    def update(self, digests: dict[str, str]) -> None:
        text = "\n".join(
            re.sub(r"\{(.+?)\}", lambda match: digests.get(match[1], "unknown"), line) for line in self.lines
        )
        self.digest = hashlib.sha256(text.encode()).hexdigest()


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise SystemExit(f"{command[0]} failed on {command[-1]}: {result.stderr.strip()[-500:]}")
    return result.stdout


class Symbol(NamedTuple):
    name: str
    section: str
    offset: int
    size: int
    is_object: bool


SYMBOL = re.compile(r"([0-9a-f]+) (.{7}) (\S+)\t([0-9a-f]+) (?:\.\w+ )?(\S+)$")
INSTRUCTION = re.compile(r" +([0-9a-f]+):\t(.*)")
RELOCATION = re.compile(r"\t+([0-9a-f]+): (R_\w+)\t(.+?)([+-]0x[0-9a-f]+)?$")
DATA_RELOCATION = re.compile(r"([0-9a-f]+) (R_\w+) +(.+?)([+-]0x[0-9a-f]+)?$")
TARGET = re.compile(r"\b[0-9a-f]+ <(.+?)(\+0x[0-9a-f]+)?>")
PADDING = re.compile(r"(data16 |cs )*(nop[wl]?|xchg +%ax,%ax)\b")


class Object:
    """An object file without kernels: its functions, and the tables that they read."""

    def __init__(self, path: Path):
        self.path = path
        self.contents = self._contents()
        matches = [SYMBOL.match(line) for line in run("objdump", "-t", path).splitlines()]
        symbols = [
            Symbol(match[5], match[3], int(match[1], 16), int(match[4], 16), match[2][6] == "O")
            for match in matches
            if match and match[3].startswith((".text", ".rodata", ".data")) and match[5] != match[3]
        ]
        self.symbols = {symbol.name: symbol for symbol in symbols}
        self.by_place: dict[str, list[Symbol]] = {}
        for symbol in sorted(symbols, key=lambda symbol: symbol.offset):
            if symbol.size > 0:
                self.by_place.setdefault(symbol.section, []).append(symbol)

    def code(self) -> list[Function]:
        functions = self._functions() + self._tables()
        digests: dict[str, str] = {}
        for _ in range(ROUNDS):
            for function in functions:
                function.update(digests)
            digests = {function.name: function.digest for function in functions}
        return functions

    def _contents(self) -> dict[str, bytes]:
        contents: dict[str, bytearray] = {}
        section = bytearray()
        for line in run("objdump", "-s", self.path).splitlines():
            if match := re.match(r"Contents of section (\S+):", line):
                section = contents.setdefault(match[1], bytearray())
            elif match := re.match(r" [0-9a-f]+ ((?:[0-9a-f]+ ){1,4})", line):
                section += bytes.fromhex(match[1].replace(" ", ""))
        return {name: bytes(content) for name, content in contents.items()}

    def _place(self, symbol: str, offset: int) -> str:
        """What a relocation names: the constant itself, or {function or table} and the distance from its start."""
        section = symbol
        if known := self.symbols.get(symbol):
            section, offset = known.section, known.offset + offset
        elif not symbol.startswith("."):
            return f"{symbol}{offset:+}"  # another object's; the linker knows it by this name, which may change
        data = self.contents.get(section, b"")
        if match := re.match(r"\.rodata\.cst(\d+)$", section):
            return data[offset : offset + int(match[1])].hex()
        if section.startswith(".rodata") and ".str" in section:
            return data[offset : data.find(b"\0", offset)].hex()
        for candidate in self.by_place.get(section, []):
            if candidate.offset <= offset < candidate.offset + candidate.size:
                return f"{{{candidate.name}}}{offset - candidate.offset:+}"
        return section  # a jump table, whose targets are not compared

    def _functions(self) -> list[Function]:
        functions: list[Function] = []
        pending: list[tuple[int, str, str, int]] = []  # relocations of the instruction before

        def resolve(next_address: int) -> None:
            """Appends what is pending once the end of its instruction is known: such addresses count from there."""
            for address, kind, symbol, addend in pending:
                counts_from_end = re.search("PC|PLT|GOT", kind)
                offset = addend + (next_address - address if counts_from_end else 0)
                functions[-1].lines.append(f"  {kind} {self._place(symbol, offset)}")
            pending.clear()

        last_address = 0
        for line in run("objdump", "-dr", "--no-show-raw-insn", self.path).splitlines():
            if match := re.match(r"([0-9a-f]+) <(.+)>:$", line):
                resolve(int(match[1], 16) or last_address)
                functions.append(Function(match[2], self.path.stem))
            elif match := INSTRUCTION.match(line):
                last_address = int(match[1], 16)
                resolve(last_address)
                name, text = functions[-1].name, match[2].split("#")[0].rstrip()
                target = TARGET.search(text)
                named = TARGET.sub(lambda m, name=name: "self" if m[1] == name else f"{{{m[1]}}}", text)
                functions[-1].lines.append(named + (target[2] or "" if target else ""))
            elif match := RELOCATION.match(line):
                last_address = int(match[1], 16) + 4
                pending.append((int(match[1], 16), match[2], match[3], int(match[4] or "0", 16)))
        resolve(last_address)
        for function in functions:
            while function.lines and PADDING.match(function.lines[-1]):
                function.lines.pop()
        return functions

    def _tables(self) -> list[Function]:
        relocations: dict[str, list[tuple[int, str]]] = {}
        section = ""
        for line in run("objdump", "-r", self.path).splitlines():
            if match := re.match(r"RELOCATION RECORDS FOR \[(\S+)\]", line):
                section = match[1]
            elif section.startswith((".rodata", ".data")) and (match := DATA_RELOCATION.match(line)):
                place = self._place(match[3], int(match[4] or "0", 16))
                relocations.setdefault(section, []).append((int(match[1], 16), place))
        tables = []
        for symbol in (symbol for symbols in self.by_place.values() for symbol in symbols if symbol.is_object):
            end = symbol.offset + symbol.size
            lines = [self.contents.get(symbol.section, b"")[symbol.offset : end].hex()]
            inside = [entry for entry in relocations.get(symbol.section, []) if symbol.offset <= entry[0] < end]
            lines += [f"{offset - symbol.offset} {place}" for offset, place in inside]
            tables.append(Function(symbol.name, self.path.stem, lines))
        return tables


def kernels(path: Path) -> list[Function]:
    functions: list[Function] = []
    target = ""
    for line in run(find_tool("cuobjdump"), "-sass", path).splitlines():
        if match := re.match(r"\s*code for (\S+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            functions.append(Function(match[1], f"{path.stem}, {target}", [target]))
        elif functions and "/*" in line:
            functions[-1].lines.append(re.sub(r"`\(.*?\)", "`", line.strip()))
    for function in functions:
        function.update({})
    return functions


def code_of(path: Path) -> list[Function]:
    has_kernels = ".nv_fatbin" in run("objdump", "-h", path)
    return kernels(path) if has_kernels else Object(path).code()


def read(folder: Path) -> list[Function]:
    paths = sorted(folder.rglob("*.o"))
    if not paths:
        raise SystemExit(f"{folder} holds no object files")
    with ThreadPoolExecutor() as pool:
        return [function for functions in pool.map(code_of, paths) for function in functions]


def demangled(names: list[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return names
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return output.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    counts = [Counter(function.digest for function in functions) for functions in (before, after)]
    same = sum((counts[0] & counts[1]).values())
    instructions = sum(len(function.lines) for function in after)
    print(f"{len(before)} bodies before, {len(after)} after ({instructions} lines of code): {same} identical")
    for label, functions, unmatched in (
        ("only before", before, counts[0] - counts[1]),
        ("only after", after, counts[1] - counts[0]),
    ):
        rest = []
        for function in functions:
            if unmatched[function.digest] > 0:
                unmatched[function.digest] -= 1
                rest.append(function)
        for function, name in zip(rest, demangled([function.name for function in rest]), strict=True):
            print(f"{label}: {name} ({function.origin}, {len(function.lines)} lines)")
    sys.exit(counts[0] != counts[1])


if __name__ == "__main__":
    main()
