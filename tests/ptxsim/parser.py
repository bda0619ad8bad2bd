"""PTX text -> Module / Function / Instr objects.  Accepts the PTX that nvcc emits (incl. inline asm)."""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field


class ParseError(Exception):
    """The PTX text could not be parsed."""


# ---- operands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reg:
    name: str  # C++ identifier, unique in the function
    type: str  # declared PTX type without the dot: b32, f32, pred ...


@dataclass(frozen=True)
class Imm:
    value: int


@dataclass(frozen=True)
class FImm:
    value: float  # exact for f32 and f64 literals
    bits: int  # the literal's own bits
    width: int  # 32 or 64


@dataclass(frozen=True)
class Sym:
    name: str  # variable, function, parameter or label


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x ...


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Addr:
    base: object  # Reg, Sym or Imm
    offset: int = 0


@dataclass(frozen=True)
class Neg:
    op: object  # !%p


@dataclass(frozen=True)
class Pair:
    first: object  # a|b
    second: object


SINK = Sym("_")


# ---- program --------------------------------------------------------------------------------


@dataclass
class Instr:
    opcode: str
    ops: list
    guard: Reg | None
    guard_neg: bool
    line: int
    loc: int  # index into Module.locs, -1 if none
    # call only:
    callee: object = None
    rets: list = field(default_factory=list)

    @property
    def base(self):
        return self.opcode.split(".", 1)[0]

    @property
    def mods(self):
        return self.opcode.split(".")[1:]


@dataclass
class Label:
    name: str


@dataclass
class Var:
    name: str
    space: str
    type: str
    align: int
    size: int  # bytes; 0 for extern [] arrays
    init: list | None = None  # list of (value | (symbol, addend, generic))
    extern: bool = False


@dataclass
class Param:
    name: str
    type: str
    align: int
    size: int
    is_reg: bool = False


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list
    rets: list
    body: list = field(default_factory=list)  # Instr and Label
    regs: dict = field(default_factory=dict)  # C++ name -> type
    shared: list = field(default_factory=list)
    local: list = field(default_factory=list)
    call_params: list = field(default_factory=list)
    tables: dict = field(default_factory=dict)  # .branchtargets label -> [labels]
    directives: dict = field(default_factory=dict)
    declared_only: bool = False


@dataclass
class ModuleAst:
    functions: dict = field(default_factory=dict)
    vars: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    locs: list = field(default_factory=list)  # (file, line, inlined_at (file, line) | None)
    loc_parents: list = field(default_factory=list)  # index into locs of the place it was inlined at, or -1
    target: str = ""
    bodies: dict = field(default_factory=dict)  # function name -> (text, its first line), until function() parses it
    loc_index: dict = field(default_factory=dict)  # (*locs[i], loc_parents[i]) -> i

    def function(self, name: str) -> Function:
        """A function with its body, which is parsed when it is first asked for: a program uses few of its kernels."""
        fn = self.functions[name]
        if name in self.bodies:
            Parser(*self.bodies[name], self).parse_body(fn)
            del self.bodies[name]  # only now: text that does not parse is refused each time
        return fn


TYPE_SIZE = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "e4m3": 1,
    "e5m2": 1,
    "tf32": 4,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "u16x2": 4,
    "s16x2": 4,
    "f32x2": 8,
}

_TOKEN = re.compile(
    r"""
    (?P<nl>\n)
  | (?P<skip>[ \t\r]+|//[^\n]*)
  | (?P<block>/\*.*?\*/)
  | (?P<str>"[^"]*")
  | (?P<num>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
        |\d+\.\d+(?:[eE][+-]?\d+)?|\d+U?)
  | (?P<word>(?:[A-Za-z_$%.]|::)(?:[\w$%.]|::)*)
  | (?P<punct>[{}()\[\],;:|!@<>=+\-*&~^])
""",
    re.X | re.S,
)


_BRACE = re.compile(r"""[{}]|"[^"]*"|//[^\n]*|/\*.*?\*/""", re.S)  # strings and comments hide theirs
_OPENS_BODY = re.compile(r"\.(entry|func)\b([^;={]|\.pragma[^;]*;)*\Z")  # matches what stands before a body's brace


def _line_at(text, position):
    return text.count("\n", 0, position) + 1


def _split(text):
    """The text with the body of each function empty, and the bodies, each with its braces, as (text, first line)."""
    outline, bodies, depth = [], [], 0
    start = 0  # everything before it is in the outline
    for m in _BRACE.finditer(text):
        if m[0] == "{":
            if depth == 0:
                opened = m.start()
            depth += 1
        elif m[0] == "}":
            depth -= 1
            if depth < 0:
                raise ParseError(f"PTX line {_line_at(text, m.start())}: unexpected '}}'")
            if depth == 0:
                before, inside, start = text[start:opened], text[opened : m.end()], m.end()
                if _OPENS_BODY.search(before):
                    bodies.append((inside, _line_at(text, opened)))
                    inside = "{" + "\n" * inside.count("\n") + "}"
                outline += [before, inside]
    if depth:
        raise ParseError(f"PTX line {_line_at(text, opened)}: '{{' without '}}'")
    outline.append(text[start:])
    return "".join(outline), bodies


def _tokenize(text, line):
    kinds, toks, lines = [], [], []
    pos, end = 0, len(text)
    match = _TOKEN.match
    while pos < end:
        m = match(text, pos)
        if not m:
            raise ParseError(f"PTX line {line}: unexpected character {text[pos]!r}")
        kind = m.lastgroup
        pos = m.end()
        if kind == "nl":
            line += 1
        elif kind == "block":
            line += m.group().count("\n")
        elif kind != "skip":
            kinds.append(kind)
            toks.append(m.group())
            lines.append(line)
    return kinds, toks, lines


def _number(tok):
    low = tok.lower()
    if low.startswith("0f") and len(tok) == 10:
        bits = int(tok[2:], 16)
        return FImm(struct.unpack("<f", struct.pack("<I", bits))[0], bits, 32)
    if low.startswith("0d") and len(tok) == 18:
        bits = int(tok[2:], 16)
        return FImm(struct.unpack("<d", struct.pack("<Q", bits))[0], bits, 64)
    if "." in tok:
        value = float(tok)
        return FImm(value, struct.unpack("<Q", struct.pack("<d", value))[0], 64)
    tok = tok.rstrip("U")
    if low.startswith("0x"):
        return Imm(int(tok, 16))
    if low.startswith("0b"):
        return Imm(int(tok, 2))
    if len(tok) > 1 and tok[0] == "0":
        return Imm(int(tok, 8))
    return Imm(int(tok))


class _Scope:
    def __init__(self, parent, suffix):
        self.parent, self.suffix = parent, suffix
        self.regs, self.ranges, self.params, self.labels = {}, {}, {}, set()


class Parser:
    """Recursive-descent parser over the token list: of a module without its functions' bodies, or of one body."""

    def __init__(self, text, line, mod):
        self.kinds, self.toks, self.lines = _tokenize(text, line)
        self.i = 0
        self.n = len(self.toks)
        self.mod = mod
        self.last_loc = {}

    # -- token helpers
    def peek(self, k=0):
        j = self.i + k
        return self.toks[j] if j < self.n else ""

    def next(self):
        if self.i >= self.n:
            raise ParseError("unexpected end of PTX")
        self.i += 1
        return self.toks[self.i - 1]

    def expect(self, tok):
        got = self.next()
        if got != tok:
            raise ParseError(f"PTX line {self.lines[self.i - 1]}: expected {tok!r}, got {got!r}")

    def accept(self, tok):
        if self.peek() == tok:
            self.i += 1
            return True
        return False

    def integer(self):
        neg = self.accept("-")
        v = _number(self.next())
        return -v.value if neg else v.value

    def skip_to(self, tok):
        while self.next() != tok:
            pass

    # -- module level
    def parse_module(self, bodies):
        mod, self.bodies = self.mod, iter(bodies)
        while self.i < self.n:
            tok = self.peek()
            if tok in (".version", ".address_size"):
                self.i += 2
            elif tok == ".target":
                self.next()
                mod.target = self.next()
                while self.accept(","):
                    self.next()
            elif tok == ".file":
                self.next()
                index = self.integer()
                mod.files[index] = self.next().strip('"')
                while self.accept(","):
                    self.next()
            elif tok == ".section":
                self.skip_to("{")
                self.skip_to("}")
            elif tok == ".pragma":
                self.skip_to(";")
            elif tok == ".loc":
                self.parse_loc()
            elif tok in (".alias",):
                raise ParseError(".alias is not supported")
            elif tok == ";":
                self.next()
            else:
                self.parse_global()
        return mod

    def parse_global(self):
        extern = False
        while self.peek() in (".visible", ".extern", ".weak", ".common"):
            extern |= self.next() == ".extern"
        tok = self.peek()
        if tok in (".entry", ".func"):
            self.parse_function(extern)
        elif tok in (".global", ".const", ".shared"):
            self.next()
            for var in self.parse_vars(tok[1:], extern):
                old = self.mod.vars.get(var.name)
                if old is None or old.extern:
                    self.mod.vars[var.name] = var
        else:
            raise ParseError(f"PTX line {self.lines[self.i]}: unexpected {tok!r}")

    def parse_vars(self, space, extern=False):
        """After the state space: [.align n] [.v2] .type name[dims] [= init] {, name...} ;"""
        align, vec = 0, 1
        while True:
            tok = self.next()
            if tok == ".align":
                align = self.integer()
            elif tok in (".v2", ".v4", ".v8"):
                vec = int(tok[2:])
            elif tok == ".attribute":
                self.skip_to(")")
            elif tok == ".ptr":
                pass
            else:
                break
        if not tok.startswith(".") or tok[1:] not in TYPE_SIZE:
            raise ParseError(f"PTX line {self.lines[self.i - 1]}: unknown type {tok!r}")
        type_ = tok[1:]
        elem = TYPE_SIZE[type_] * vec
        out = []
        while True:
            name = self.next()
            count = 1
            while self.accept("["):
                if self.accept("]"):
                    count = 0
                else:
                    count *= self.integer()
                    self.expect("]")
            init = None
            if self.accept("="):
                init = self.parse_init()
            if init is not None and count == 0:
                count = len(init)
            out.append(Var(name, space, type_, align or elem, elem * count, init, extern))
            if not self.accept(","):
                break
        self.expect(";")
        return out

    def parse_init(self):
        if self.accept("{"):
            items = []
            while not self.accept("}"):
                items += self.parse_init()
                self.accept(",")
            return items
        if self.accept("-"):
            v = _number(self.next())
            return [Imm(-v.value) if isinstance(v, Imm) else FImm(-v.value, 0, v.width)]
        if self.kinds[self.i] == "num":
            return [_number(self.next())]
        generic = False
        name = self.next()
        if name == "generic":
            self.expect("(")
            name, generic = self.next(), True
            self.expect(")")
        add = 0
        if self.accept("+"):
            add = self.integer()
        return [(name, add, generic)]

    def parse_loc(self):
        self.expect(".loc")
        file, line, _col = self.integer(), self.integer(), self.integer()
        inlined = None
        while self.accept(","):
            what = self.next()
            if what == "function_name":
                self.next()
                if self.accept("+"):
                    self.integer()
            elif what == "inlined_at":
                inlined = (self.integer(), self.integer())
                self.integer()
        parent = self.last_loc.get(inlined, -1)  # the call, itself perhaps inlined
        key = (file, line, inlined, parent)
        index = self.mod.loc_index.get(key)
        if index is None:
            index = self.mod.loc_index[key] = len(self.mod.locs)
            self.mod.locs.append(key[:3])
            self.mod.loc_parents.append(parent)
        self.last_loc[file, line] = index
        return index

    # -- functions
    def parse_param_list(self):
        params = []
        self.expect("(")
        while not self.accept(")"):
            is_reg = self.next() == ".reg"
            align = 0
            while True:
                tok = self.next()
                if tok == ".align":
                    align = self.integer()
                elif tok == ".ptr":
                    while self.peek() in (".global", ".shared", ".const", ".local", ".align"):
                        if self.next() == ".align":
                            self.integer()
                else:
                    break
            type_ = tok[1:]
            # a pointer attribute may follow the type: .param .u64 .ptr .align 1 name
            if self.accept(".ptr"):
                while self.peek() in (".global", ".shared", ".const", ".local", ".align"):
                    if self.next() == ".align":
                        self.integer()
            name = self.next()
            size = TYPE_SIZE[type_]
            own_align = size
            while self.accept("["):
                size *= self.integer()
                self.expect("]")
            params.append(Param(name, type_, align or own_align, size, is_reg))
            self.accept(",")
        return params

    def parse_function(self, extern):
        is_entry = self.next() == ".entry"
        rets = []
        if not is_entry and self.peek() == "(":
            rets = self.parse_param_list()
        name = self.next()
        params = self.parse_param_list() if self.peek() == "(" else []
        fn = Function(name, is_entry, params, rets)
        while self.peek() not in ("{", ";"):
            directive = self.next()
            values = []
            while self.kinds[self.i] == "num" or self.peek() == ",":
                if not self.accept(","):
                    values.append(self.integer())
            if directive == ".pragma":
                self.skip_to(";")
            fn.directives[directive] = values
        if self.accept(";"):
            fn.declared_only = True
            self.mod.functions.setdefault(name, fn)
            return
        self.expect("{")
        self.expect("}")
        self.mod.functions[name] = fn
        self.mod.bodies[name] = next(self.bodies)

    def parse_body(self, fn):
        self.expect("{")
        self.fn = fn
        self.loc = -1
        self.scope_count = 0
        self.cname = {}
        scope = _Scope(None, "")
        for p in fn.params + fn.rets:
            if p.is_reg:
                scope.regs[p.name] = p.type
        self.scan_labels(scope)
        self.parse_block(scope)

    def scan_labels(self, scope):
        """Record the labels declared directly in this scope (nested scopes have their own)."""
        depth, j = 0, self.i
        toks, kinds = self.toks, self.kinds
        while True:
            tok = toks[j]
            if tok == "{":
                depth += 1
            elif tok == "}":
                if depth == 0:
                    return
                depth -= 1
            elif tok == ":" and depth == 0 and kinds[j - 1] == "word":
                scope.labels.add(toks[j - 1])
            j += 1

    def label_name(self, scope, name):
        s = scope
        while s is not None:
            if name in s.labels:
                return name + s.suffix
            s = s.parent
        return None

    def parse_block(self, scope):
        fn = self.fn
        while True:
            tok = self.peek()
            if tok == "}":
                self.next()
                return
            if tok == "{":
                self.next()
                self.scope_count += 1
                inner = _Scope(scope, f"_s{self.scope_count}")
                self.scan_labels(inner)
                self.parse_block(inner)
            elif tok == ";":
                self.next()
            elif tok == ".loc":
                self.loc = self.parse_loc()
            elif tok == ".pragma":
                self.skip_to(";")
            elif tok == ".reg":
                self.parse_reg(scope)
            elif tok == ".param":
                self.next()
                for v in self.parse_vars("param"):
                    unique = v.name + scope.suffix
                    scope.params[v.name] = unique
                    fn.call_params.append(Var(unique, "param", v.type, v.align, v.size))
            elif tok in (".shared", ".local"):
                self.next()
                target = fn.shared if tok == ".shared" else fn.local
                target += self.parse_vars(tok[1:])
            elif tok == ".section":
                self.skip_to("{")
                self.skip_to("}")
            elif self.peek(1) == ":" and self.kinds[self.i] == "word":
                name = self.label_name(scope, self.next())
                self.next()
                if self.peek() == ".branchtargets":
                    self.next()
                    fn.tables[name] = [self.label_name(scope, t) for t in self.word_list()]
                elif self.peek() in (".callprototype", ".calltargets"):
                    self.skip_to(";")
                else:
                    fn.body.append(Label(name))
            else:
                self.parse_instr(scope)

    def word_list(self):
        out = [self.next()]
        while self.accept(","):
            out.append(self.next())
        self.expect(";")
        return out

    def parse_reg(self, scope):
        self.expect(".reg")
        tok = self.next()
        if tok in (".v2", ".v4"):
            raise ParseError(f"PTX line {self.lines[self.i - 1]}: vector registers are not supported")
        type_ = tok[1:]
        while True:
            name = self.next()
            if self.accept("<"):
                count = self.integer()
                self.expect(">")
                scope.ranges[name] = (type_, count)
            else:
                scope.regs[name] = type_
            if not self.accept(","):
                break
        self.expect(";")

    def find_reg(self, scope, name):
        key = (id(scope), name)
        hit = self.cname.get(key)
        if hit is not None:
            return hit
        s = scope
        prefix = name.rstrip("0123456789")
        while s is not None:
            type_ = s.regs.get(name)
            if type_ is None and prefix != name and prefix in s.ranges:
                type_ = s.ranges[prefix][0]
            if type_ is not None:
                c = "r" + re.sub(r"\W", "_", name) + s.suffix
                reg = Reg(c, type_)
                self.fn.regs[c] = type_
                self.cname[key] = reg
                return reg
            s = s.parent
        return None

    def parse_operand(self, scope):
        tok = self.peek()
        if tok == "{":
            self.next()
            items = []
            while not self.accept("}"):
                items.append(self.parse_operand(scope))
                self.accept(",")
            return Vec(tuple(items))
        if tok == "[":
            return self.parse_addr(scope)
        if tok == "!":
            self.next()
            return Neg(self.parse_operand(scope))
        if tok == "(":  # (1 << 2) style constant expressions do not occur
            self.next()
            op = self.parse_operand(scope)
            self.expect(")")
            return op
        op = self.parse_atom(scope)
        if self.accept("|"):
            return Pair(op, self.parse_atom(scope))
        if isinstance(op, Sym) and self.peek() in ("+", "-"):  # sym+imm
            sign = -1 if self.next() == "-" else 1
            return Addr(op, sign * self.integer())
        return op

    def parse_atom(self, scope):
        tok = self.next()
        kind = self.kinds[self.i - 1]
        if tok == "-":
            v = _number(self.next())
            if isinstance(v, Imm):
                return Imm(-v.value)
            flip = 1 << (v.width - 1)
            return FImm(-v.value, v.bits ^ flip, v.width)
        if kind == "num":
            return _number(tok)
        if kind != "word":
            raise ParseError(f"PTX line {self.lines[self.i - 1]}: unexpected {tok!r}")
        if tok == "_":
            return SINK
        reg = self.find_reg(scope, tok)
        if reg is not None:
            return reg
        if tok.startswith("%"):
            return Special(tok)
        if tok == "WARP_SZ":
            return Imm(32)
        s = scope
        while s is not None:
            if tok in s.params:
                return Sym(s.params[tok])
            s = s.parent
        return Sym(self.label_name(scope, tok) or tok)

    def parse_addr(self, scope):
        self.expect("[")
        base = self.parse_atom(scope)
        offset = 0
        if self.peek() in ("+", "-"):
            sign = -1 if self.next() == "-" else 1
            offset = sign * self.integer()
        if self.accept(","):  # the coordinates of a texture or tensor map: codegen names the instruction and refuses it
            self.parse_operand(scope)
        self.expect("]")
        return Addr(base, offset)

    def parse_instr(self, scope):
        guard, neg = None, False
        line = self.lines[self.i]
        if self.accept("@"):
            neg = self.accept("!")
            guard = self.find_reg(scope, self.next())
        opcode = self.next()
        if self.kinds[self.i - 1] != "word" or opcode[0] in ".%$":
            raise ParseError(f"PTX line {line}: unexpected {opcode!r}")
        ins = Instr(opcode, [], guard, neg, line, self.loc)
        if opcode.split(".")[0] == "call":
            if self.peek() == "(":
                ins.rets = self.call_list(scope)
                self.expect(",")
            ins.callee = self.parse_atom(scope)
            if self.accept(","):
                if self.peek() == "(":
                    ins.ops = self.call_list(scope)
                    if self.accept(","):
                        self.parse_atom(scope)  # prototype or target list
                else:
                    self.parse_atom(scope)
        else:
            while self.peek() != ";":
                ins.ops.append(self.parse_operand(scope))
                if not self.accept(","):
                    break
        self.expect(";")
        self.fn.body.append(ins)

    def call_list(self, scope):
        self.expect("(")
        out = []
        while not self.accept(")"):
            out.append(self.parse_operand(scope))
            self.accept(",")
        return out


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ModuleAst:
    """Parse PTX text.  The result is shared by callers with the same text: it is not to be changed."""
    outline, bodies = _split(text)
    return Parser(outline, 1, ModuleAst()).parse_module(bodies)
