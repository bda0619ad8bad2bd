"""Translate a parsed PTX entry (and the .funcs it reaches) to C++.

Every PTX register becomes a local variable of unsigned bits; each instruction becomes one C++
statement.  `HANDLERS` maps the first component of an opcode to the function that translates it.
"""

from __future__ import annotations

import re
import struct

from .parser import SINK, TYPE_SIZE, Addr, FImm, Imm, Instr, Label, Neg, Pair, Reg, Special, Sym, Vec


class UnsupportedInstruction(Exception):
    """The PTX uses an instruction (or form of one) that ptxsim does not implement."""


SHARED_START = 1024  # the hardware reserves the first KiB of the shared window
SHARED_REDZONE = 32
WIN_SHARED, WIN_LOCAL, WIN_PARAM, WIN_GLOBAL = (k << 44 for k in (1, 2, 3, 5))

CLUSTER_DIRECTIVES = (".reqnctapercluster", ".explicitcluster", ".maxclusterrank")

HANDLERS = {}
ELEM_CODE = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6, "f64": 7}
ACC_CODE = {"f16": 0, "f32": 1, "s32": 2, "f64": 3}


def handler(*names):
    def register(fn):
        for n in names:
            HANDLERS[n] = fn
        return fn

    return register


def align_up(x, a):
    return (x + a - 1) // a * a


def cname(name):
    return re.sub(r"\W", "_", name)


def bits(ty):
    return TYPE_SIZE[ty] * 8


def utype(ty):
    return "bool" if ty == "pred" else f"u{bits(ty)}"


class BasicBlock:
    """Instructions that are issued together; `last` ends the block."""

    def __init__(self, fn, labels):
        self.fn, self.labels, self.pcs, self.last = fn, labels, [], None


class EntryCodegen:
    """Generates the C++ for one kernel."""

    def __init__(self, ast, entry, global_addr, profile=False):
        self.ast = ast
        self.profile = profile  # count blocks and memory accesses (profile.cpp)
        self.blocks, self.order = [], None  # BasicBlock, and block_order() of profile.py
        self.entry = entry
        self.global_addr = global_addr  # name -> device address of .global / .const variables
        self.sites = []  # pc -> (function, PTX line, loc index, opcode)
        self.op_ids = {}  # collective opcode -> id
        if clusters := [d for d in ast.functions[entry].directives if d in CLUSTER_DIRECTIVES]:
            raise UnsupportedInstruction(f"{entry}: unsupported directive '{clusters[0]}'")
        self.layout_shared()

    # -- layout
    def reachable(self):
        out, todo = [], [self.entry]
        while todo:
            name = todo.pop()
            fn = self.ast.function(name)
            if fn.declared_only or fn in out:
                continue
            out.append(fn)
            for ins in fn.body:
                called = ins.callee if isinstance(ins, Instr) else None
                if isinstance(called, Sym) and called.name in self.ast.functions:
                    todo.append(called.name)
        return out

    def layout_shared(self):
        self.functions = self.reachable()
        used = set()
        for fn in self.functions:
            for ins in fn.body:
                if isinstance(ins, Instr):
                    for op in ins.ops:
                        collect_symbols(op, used)
        vars_ = [v for v in self.ast.vars.values() if v.space == "shared" and v.name in used]
        for fn in self.functions:
            vars_ += fn.shared
        self.shared_vars = []  # (name, offset, size)
        self.shared_addr = {}
        self.static_shared = 0  # bytes on the hardware, without red zones
        off, dyn_align = SHARED_START, 16
        for v in vars_:
            if v.size == 0 or v.extern:
                dyn_align = max(dyn_align, v.align)
                continue
            off = align_up(off, v.align)
            self.shared_addr[v.name] = off
            self.shared_vars.append((v.name, off, v.size))
            off += v.size + SHARED_REDZONE
            self.static_shared = align_up(self.static_shared, v.align) + v.size
        self.dyn_offset = align_up(off, dyn_align)
        for v in vars_:
            if v.size == 0 or v.extern:
                self.shared_addr[v.name] = self.dyn_offset
        params, off = {}, 0
        for p in self.ast.functions[self.entry].params:
            off = align_up(off, p.align)
            params[p.name] = off
            off += p.size
        self.param_addr, self.param_bytes = params, off

    # -- output
    def generate(self):
        out = ['#include "device.h"', "using std::isnan;", ""]
        protos, bodies = [], []
        for fn in self.functions:
            proto, body = FunctionCodegen(self, fn).generate()
            protos.append(proto + ";")
            bodies.append(proto + " {\n" + body + "}\n")
        return "\n".join(out + protos + [""] + bodies)

    def site(self, fn, ins):
        self.sites.append((fn.name, ins.line, ins.loc, ins.opcode))
        return len(self.sites) - 1

    def op_id(self, opcode):
        return self.op_ids.setdefault(opcode, len(self.op_ids) + 1)


def collect_symbols(op, out):
    if isinstance(op, Sym):
        out.add(op.name)
    elif isinstance(op, Addr):
        collect_symbols(op.base, out)
    elif isinstance(op, Vec):
        for x in op.items:
            collect_symbols(x, out)


class FunctionCodegen:
    def __init__(self, unit, fn):
        self.unit, self.fn = unit, fn
        self.param_names = {p.name for p in fn.params} | {p.name for p in fn.rets}
        self.call_params = {v.name for v in fn.call_params}
        self.local_addr, off = {}, 0
        for v in fn.local:
            off = align_up(off, max(v.align, 16))
            self.local_addr[v.name] = off
            off += v.size
        # parameters whose address is taken live in local memory
        self.local_params = {}
        if not fn.is_entry:
            taken = set()
            for ins in fn.body:
                if isinstance(ins, Instr) and ins.base == "mov":
                    for op in ins.ops[1:]:
                        collect_symbols(op, taken)
            for p in fn.params:
                if p.name in taken:
                    off = align_up(off, 16)
                    self.local_params[p.name] = self.local_addr[p.name] = off
                    off += p.size
        self.local_bytes = align_up(off, 16)
        self.labels_seen = set()
        self.used = set()

    # -- whole function
    def prototype(self):
        fn = self.fn
        if fn.is_entry:
            return 'extern "C" void ptxsim_entry(Thread* T)'
        args = ["Thread* T"]
        args += [f"u8* p_{cname(r.name)}" for r in fn.rets]
        args += [f"u8* p_{cname(p.name)}" for p in fn.params]
        return f"static __attribute__((noinline)) void f_{cname(fn.name)}({', '.join(args)})"

    def generate(self):
        fn = self.fn
        lines = []
        block_start, count, block = None, 0, None
        pending = []  # labels before the next block
        enders = ("bra", "brx", "ret", "exit", "trap") + (("call",) if self.unit.profile else ())

        def flush():
            nonlocal block_start, count
            if block_start is not None and count:
                lines[block_start] = f"  T->icount += {count};" + (
                    f" prof_block(T, {len(self.unit.blocks) - 1});" if block else ""
                )
            block_start, count = None, 0

        for item in fn.body:
            if isinstance(item, Label):
                flush()
                self.labels_seen.add(item.name)
                pending.append(item.name)
                lines.append(f"{self.label(item.name)}:;")
                continue
            if block_start is None:
                block_start = len(lines)
                lines.append("")
                if self.unit.profile:
                    block = BasicBlock(fn, pending)
                    self.unit.blocks.append(block)
                pending = []
            count += 1
            lines.append("  " + self.statement(item))
            if block:
                block.pcs.append(self.pc)
                block.last = item
            if item.base in enders:
                flush()
        flush()
        head = []
        by_type = {}
        reg_params = [p for p in fn.params + fn.rets if p.is_reg]
        for c, ty in fn.regs.items():
            by_type.setdefault(utype(ty), []).append(c)
        for ty, names in by_type.items():
            for i in range(0, len(names), 20):
                head.append(f"  {ty} " + ", ".join(f"{n} = 0" for n in names[i : i + 20]) + ";")
        for v in fn.call_params:
            head.append(f"  alignas(16) u8 cp_{cname(v.name)}[{max(v.size, 1)}] = {{}};")
        pc = self.unit.site(fn, Instr("function entry", [], None, False, 0, -1))
        head.append(f"  const u32 lbase = local_enter(T, {self.local_bytes}, {pc}); (void)lbase;")
        for p in fn.params:
            if p.name in self.local_params:
                head.append(
                    f"  memcpy(mem_local(T, lbase + {self.local_params[p.name]}, 1, AC_WRITE, {pc}), "
                    f"p_{cname(p.name)}, {p.size});"
                )
        for p in reg_params:
            head.append(f"  r{cname(p.name)} = rd<{utype(p.type)}>(p_{cname(p.name)});")
        head.append("  u32 cc = 0; (void)cc;")
        tail = ["leave:;"]
        for p in fn.rets:
            if p.is_reg:
                tail.append(f"  wr<{utype(p.type)}>(p_{cname(p.name)}, r{cname(p.name)});")
        tail.append("  T->local_sp = lbase;")
        return self.prototype(), "\n".join(head + lines + tail) + "\n"

    def label(self, name):
        return "L_" + cname(name)

    def statement(self, ins):
        fn = HANDLERS.get(ins.base)
        self.ins = ins
        if fn is None or "shared::cluster" in ins.mods:
            self.unsupported()
        try:
            self._pc = None
            code = fn(self, ins)
        except (IndexError, KeyError, AttributeError, ValueError, TypeError) as e:
            raise UnsupportedInstruction(
                f"{self.fn.name}, PTX line {ins.line}: cannot translate '{ins.opcode}' ({e!r})"
            ) from e
        if ins.guard is not None:
            cond = ("!" if ins.guard_neg else "") + ins.guard.name
            code = f"if ({cond}) {{ {code} }}"
        return code

    def unsupported(self, why=""):
        raise UnsupportedInstruction(
            f"{self.fn.name}, PTX line {self.ins.line}: unsupported instruction "
            f"'{self.ins.opcode}'" + (f": {why}" if why else "")
        )

    @property
    def pc(self):
        if self._pc is None:
            self._pc = self.unit.site(self.fn, self.ins)
        return self._pc

    # -- operands
    def val(self, op, ty):
        """C++ expression with the operand's bits as an unsigned of ty's width (bool for pred)."""
        if isinstance(op, Reg):
            if op.type == "pred" or ty == "pred" or bits(op.type) == bits(ty):
                return op.name
            return f"({utype(ty)}){op.name}"
        if isinstance(op, Neg):
            return "!" + self.val(op.op, "pred")
        if isinstance(op, Imm):
            if ty == "pred":
                return "true" if op.value else "false"
            if ty in ("f32", "f64"):
                return self.val(FImm(float(op.value), 0, 64), ty)
            w = bits(ty)
            v = op.value & ((1 << w) - 1)
            if w == 128:
                return f"(u128)0x{v:x}ull"
            return f"(u{w})0x{v:x}" + ("ull" if w == 64 else "u")
        if isinstance(op, FImm):
            if ty == "f64" or bits(ty) == 64:
                return f"0x{struct.unpack('<Q', struct.pack('<d', op.value))[0]:x}ull"
            if op.width == 32 and op.bits:
                return f"(u32)0x{op.bits:x}u"
            return f"(u32)0x{struct.unpack('<I', struct.pack('<f', op.value))[0]:x}u"
        if isinstance(op, Special):
            return f"({utype(ty)}){self.special(op.name)}"
        if isinstance(op, (Sym, Addr)):
            return f"({utype(ty)})({self.addr(op)})"
        raise ValueError(f"operand {op}")

    def sym_addr(self, name):
        unit = self.unit
        if name in unit.shared_addr:
            return f"{unit.shared_addr[name]}u"
        if name in self.local_addr:
            return f"(lbase + {self.local_addr[name]}u)"
        if self.fn.is_entry and name in unit.param_addr:
            return f"({WIN_PARAM + unit.param_addr[name]:#x}ull)"
        if name in unit.global_addr:
            return f"({unit.global_addr[name]:#x}ull)"
        self.unsupported(f"address of '{name}'")

    def addr(self, op):
        if isinstance(op, (Sym, Reg, Imm)):
            op = Addr(op)
        if isinstance(op.base, Reg):
            base = op.base.name
            if op.offset == 0:
                return base
            if bits(op.base.type) == 32:
                return f"(u32)({base} + {op.offset & 0xFFFFFFFF:#x}u)"
            return f"({base} + {op.offset & (1 << 64) - 1:#x}ull)"
        if isinstance(op.base, Imm):
            return f"{(op.base.value + op.offset) & (1 << 64) - 1:#x}ull"
        a = self.sym_addr(op.base.name)
        return f"({a} + {op.offset})" if op.offset else a

    def set(self, op, expr):
        if op == SINK:
            return f"(void)({expr});"
        if isinstance(op, Pair):
            raise ValueError("pair destination")
        self.used.add(op.name)
        return f"{op.name} = ({utype(op.type)})({expr});"

    def special(self, name):
        """C++ expression of a special register."""
        fixed = {
            "%laneid": "T->lane",
            "%warpid": "T->warp_id",
            "%clock64": "clock_ticks(T)",
            "%clock": "(u32)clock_ticks(T)",
            "%clock_hi": "(u32)(clock_ticks(T) >> 32)",
            "%globaltimer": "clock_ticks(T)",
            "%globaltimer_lo": "(u32)clock_ticks(T)",
            "%globaltimer_hi": "(u32)(clock_ticks(T) >> 32)",
            "%smid": "0u",
            "%nsmid": "1u",
            "%gridid": "0u",
            "%nwarpid": "64u",
            "%lanemask_eq": "(1u << T->lane)",
            "%lanemask_lt": "((1u << T->lane) - 1)",
            "%lanemask_le": "((2u << T->lane) - 1)",
            "%lanemask_gt": "(~((2u << T->lane) - 1))",
            "%lanemask_ge": "(~((1u << T->lane) - 1))",
            "%dynamic_smem_size": "shared_bytes(T, true)",
            "%total_smem_size": "shared_bytes(T, false)",
        }
        if name in fixed:
            return fixed[name]
        base, _, comp = name.partition(".")
        k = {"x": 0, "y": 1, "z": 2}.get(comp)
        if k is not None and base in ("%tid", "%ntid", "%ctaid", "%nctaid"):
            return f"T->{base[1:]}[{k}]"
        self.unsupported(f"special register {name}")


# =============================================================================================
# helpers for handlers


def last_type(ins):
    return ins.mods[-1]


def rounding(mods):
    for r in ("rn", "rz", "rm", "rp"):
        if r in mods:
            return r.upper()
    return "RN"


def signed(ty, expr):
    return f"(s{bits(ty)}){expr}" if ty[0] == "s" else expr


def simple(fmt):
    """Handler for `op.type d, a, b, ...` given a format over operands {0} {1} and types {u} {s} {w}."""

    def fn(g, ins):
        ty = last_type(ins)
        args = [g.val(o, ty) for o in ins.ops[1:]]
        return g.set(ins.ops[0], fmt.format(*args, u=utype(ty), s=utype(ty).replace("u", "s"), ty=ty, w=bits(ty)))

    return fn


FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2"}


def float_op(g, ins, name, nargs, ty, mods, dest=None):
    """add/sub/mul/fma/min/max/... on a float type, with .ftz .sat .relu and rounding modes."""
    ops = ins.ops[1 : 1 + nargs]
    args = [g.val(o, ty) for o in ops]
    if ty.endswith("x2") and ty != "f32x2":
        half = ty[:-2]
        parts = [float_expr(g, name, [f"{p}({a})" for a in args], half, mods) for p in ("lo", "hi")]
        expr = f"pack2({parts[0]}, {parts[1]})"
    elif ty == "f32x2":
        parts = [float_expr(g, name, [f"(u32)({a} >> {s})" for a in args], "f32", mods) for s in (0, 32)]
        expr = f"(u64)({parts[0]}) | (u64)({parts[1]}) << 32"
    else:
        expr = float_expr(g, name, args, ty, mods)
    return g.set(ins.ops[0], expr)


def float_expr(g, name, args, ty, mods):
    ftz = {"f32": "ftz", "f16": "ftz_f16", "bf16": "ftz_bf16"}.get(ty) if "ftz" in mods else None
    if ftz:
        args = [f"{ftz}({a})" for a in args]
    mode = rounding(mods)
    if name in ("min", "max") and "NaN" in mods:
        name += "_nan"
        if ty == "f64":
            g.unsupported("min.NaN.f64")
    if "xorsign" in mods:
        sign = {"f32": "0x80000000u"}.get(ty, "0x8000")
        expr = f"({name}_{ty}(abs_{ty}({args[0]}), abs_{ty}({args[1]})) | (({args[0]} ^ {args[1]}) & {sign}))"
    elif mode != "RN" and ty in ("f32", "f64") and name in ("add", "sub", "mul", "fma", "div", "sqrt"):
        expr = f"{name}_{ty}_dir({', '.join(args)}, {mode})"
    elif mode != "RN" and ty == "f32" and name == "rcp":
        expr = f"div_f32_dir(0x3f800000u, {args[0]}, {mode})"
    elif mode != "RN" and ty not in ("f32", "f64"):
        g.unsupported("rounding mode")
    else:
        expr = f"{name}_{ty}({', '.join(args)})"
    if ftz:
        expr = f"{ftz}({expr})"
    if "sat" in mods:
        expr = f"sat_{ty}({expr})"
    if "relu" in mods:
        expr = f"relu_{ty}({expr})"
    return expr


# =============================================================================================
# moves


@handler("mov")
def h_mov(g, ins):
    ty = last_type(ins)
    d, a = ins.ops
    if isinstance(d, Vec):
        w = bits(ty) // len(d.items)
        src = g.val(a, ty)
        out = [f"{{ {utype(ty)} t_ = {src};"]
        for i, x in enumerate(d.items):
            if x != SINK:
                out.append(g.set(x, f"(u{w})(t_ >> {i * w})" if i else f"(u{w})t_"))
        return " ".join(out) + " }"
    if isinstance(a, Vec):
        w = bits(ty) // len(a.items)
        part = f"b{w}"
        expr = " | ".join(f"({utype(ty)}){g.val(x, part)} << {i * w}" for i, x in enumerate(a.items))
        return g.set(d, expr)
    return g.set(d, g.val(a, ty))


@handler("cvta")
def h_cvta(g, ins):
    mods, (d, a) = ins.mods, ins.ops
    ty = last_type(ins)
    space = next((m for m in mods if m.split("::")[0] in ("shared", "local", "global", "const", "param")), "")
    win = {"shared": WIN_SHARED, "local": WIN_LOCAL}.get(space.split("::")[0], 0)
    src = g.val(a, ty)
    if not win:
        return g.set(d, src)
    return g.set(d, f"{src} {'-' if 'to' in mods else '+'} {win:#x}ull")


@handler("isspacep")
def h_isspacep(g, ins):
    space = ins.mods[-1].split("::")[0]
    a = g.val(ins.ops[1], "u64")
    if space == "const":
        return g.set(ins.ops[0], "false")
    return g.set(ins.ops[0], f"in_win({a}, WIN_{space.upper()})")


@handler("selp")
def h_selp(g, ins):
    ty = last_type(ins)
    d, a, b, p = ins.ops
    return g.set(d, f"{g.val(p, 'pred')} ? {g.val(a, ty)} : {g.val(b, ty)}")


@handler("slct")
def h_slct(g, ins):
    ct = ins.mods[-1]
    ty = next(m for m in ins.mods if m in TYPE_SIZE)
    d, a, b, c = ins.ops
    cv = g.val(c, ct)
    cond = f"F({cv}) >= 0.f" if ct == "f32" else f"(s32){cv} >= 0"
    return g.set(d, f"{cond} ? {g.val(a, ty)} : {g.val(b, ty)}")


# =============================================================================================
# integer and float arithmetic


@handler("add", "sub")
def h_add(g, ins):
    ty, mods, name = last_type(ins), ins.mods, ins.base
    if ty in FLOATS or ty == "f32x2":
        return float_op(g, ins, name, 2, ty, mods)
    d, a, b = ins.ops
    x, y = g.val(a, ty), g.val(b, ty)
    if ty in ("u16x2", "s16x2"):
        op = "+" if name == "add" else "-"
        return g.set(d, f"pack2(lo({x}) {op} lo({y}), hi({x}) {op} hi({y}))")
    if "sat" in mods:
        return g.set(d, f"{name}_sat({x}, {y})")
    if "cc" in mods:
        wide = "u64" if bits(ty) == 32 else "u128"
        if name == "add":
            return (
                f"{{ {wide} t_ = ({wide}){x} + {y}; cc = (t_ >> {bits(ty)}) & 1; " + g.set(d, f"({utype(ty)})t_") + " }"
            )
        return f"{{ bool c_ = {x} < {y}; " + g.set(d, f"{x} - {y}") + " cc = c_; }"
    return g.set(d, f"{x} {'+' if name == 'add' else '-'} {y}")


@handler("addc", "subc")
def h_addc(g, ins):
    ty = last_type(ins)
    d, a, b = ins.ops
    x, y = g.val(a, ty), g.val(b, ty)
    wide = "u64" if bits(ty) == 32 else "u128"
    op = "+" if ins.base == "addc" else "-"
    keep = f"cc = (t_ >> {bits(ty)}) & 1; " if "cc" in ins.mods else ""
    return f"{{ {wide} t_ = ({wide}){x} {op} {y} {op} cc; {keep}" + g.set(d, f"({utype(ty)})t_") + " }"


@handler("mul")
def h_mul(g, ins):
    ty, mods = last_type(ins), ins.mods
    if ty in FLOATS or ty == "f32x2":
        return float_op(g, ins, "mul", 2, ty, mods)
    d, a, b = ins.ops
    return g.set(d, int_mul(g, ty, mods, g.val(a, ty), g.val(b, ty)))


def int_mul(g, ty, mods, x, y):
    if "wide" in mods:
        w = bits(ty) * 2
        c = f"s{w}" if ty[0] == "s" else f"u{w}"
        return f"(u{w})(({c}){signed(ty, x)} * ({c}){signed(ty, y)})"
    if "hi" in mods:
        return f"mulhi_{ty}({x}, {y})"
    return f"({utype(ty)})((u{max(32, bits(ty))}){x} * {y})"


@handler("mul24", "mad24")
def h_mul24(g, ins):
    ty = last_type(ins)
    v = [g.val(o, ty) for o in ins.ops[1:]]
    expr = f"mul24({v[0]}, {v[1]}, {'true' if ty == 's32' else 'false'}, {'true' if 'hi' in ins.mods else 'false'})"
    return g.set(ins.ops[0], expr + (f" + {v[2]}" if len(v) > 2 else ""))


@handler("mad")
def h_mad(g, ins):
    ty, mods = last_type(ins), ins.mods
    if ty in FLOATS:
        return float_op(g, ins, "fma", 3, ty, mods)
    d, a, b, c = ins.ops
    x, y = g.val(a, ty), g.val(b, ty)
    ct = f"b{bits(ty) * 2}" if "wide" in mods else ty
    z = g.val(c, ct)
    if "cc" in mods:
        wide = "u64" if bits(ct) == 32 else "u128"
        prod = int_mul(g, ty, mods, x, y)
        return (
            f"{{ {wide} t_ = ({wide})({prod}) + {z}; cc = (t_ >> {bits(ct)}) & 1; "
            + g.set(d, f"({utype(ct)})t_")
            + " }"
        )
    if "sat" in mods:
        return g.set(d, f"add_sat({int_mul(g, ty, mods, x, y)}, {z})")
    return g.set(d, f"{int_mul(g, ty, mods, x, y)} + {z}")


@handler("madc")
def h_madc(g, ins):
    ty, mods = last_type(ins), ins.mods
    d, a, b, c = ins.ops
    prod = int_mul(g, ty, mods, g.val(a, ty), g.val(b, ty))
    wide = "u64" if bits(ty) == 32 else "u128"
    keep = f"cc = (t_ >> {bits(ty)}) & 1; " if "cc" in mods else ""
    return f"{{ {wide} t_ = ({wide})({prod}) + {g.val(c, ty)} + cc; {keep}" + g.set(d, f"({utype(ty)})t_") + " }"


@handler("fma")
def h_fma(g, ins):
    return float_op(g, ins, "fma", 3, last_type(ins), ins.mods)


@handler("div")
def h_div(g, ins):
    ty = last_type(ins)
    if ty in FLOATS:
        return float_op(g, ins, "div", 2, ty, ins.mods)
    x, y = (g.val(o, ty) for o in ins.ops[1:])
    return g.set(ins.ops[0], f"div_{ty}({x}, {y})")


@handler("rem")
def h_rem(g, ins):
    ty = last_type(ins)
    x, y = (g.val(o, ty) for o in ins.ops[1:])
    return g.set(ins.ops[0], f"rem_{ty}({x}, {y})")


@handler("min", "max")
def h_minmax(g, ins):
    ty, mods = last_type(ins), ins.mods
    if ty in FLOATS:
        d = ins.ops
        if len(d) == 4:  # three-input form
            x, y, z = (g.val(o, ty) for o in d[1:])
            return g.set(d[0], float_expr(g, ins.base, [float_expr(g, ins.base, [x, y], ty, mods), z], ty, mods))
        return float_op(g, ins, ins.base, 2, ty, mods)
    x, y = (g.val(o, ty) for o in ins.ops[1:])
    op = "<" if ins.base == "min" else ">"
    if ty in ("u16x2", "s16x2"):
        c = "(s16)" if ty[0] == "s" else ""
        sel = [f"({c}{p}({x}) {op} {c}{p}({y}) ? {p}({x}) : {p}({y}))" for p in ("lo", "hi")]
        return g.set(ins.ops[0], f"pack2({sel[0]}, {sel[1]})")
    expr = f"{signed(ty, x)} {op} {signed(ty, y)} ? {x} : {y}"
    if "relu" in mods:
        expr = f"(s32)({expr}) < 0 ? 0u : ({expr})"
    return g.set(ins.ops[0], expr)


@handler("abs", "neg")
def h_absneg(g, ins):
    ty = last_type(ins)
    if ty in FLOATS:
        return float_op(g, ins, ins.base, 1, ty, ins.mods)
    x = g.val(ins.ops[1], ty)
    if ins.base == "neg":
        return g.set(ins.ops[0], f"0 - {x}")
    return g.set(ins.ops[0], f"{signed(ty, x)} < 0 ? 0 - {x} : {x}")


@handler("copysign")
def h_copysign(g, ins):
    return float_op(g, ins, "copysign", 2, last_type(ins), [])


@handler("rcp", "sqrt", "rsqrt")
def h_unary(g, ins):
    ty, name, mods = last_type(ins), ins.base, list(ins.mods)
    if ty == "f64" and "approx" in mods:
        if name == "sqrt":
            g.unsupported()
        return g.set(ins.ops[0], f"{name}_approx_f64({g.val(ins.ops[1], ty)})")
    if ty == "f64" and name == "rsqrt":
        return g.set(ins.ops[0], f"U64(1.0 / sqrt(D({g.val(ins.ops[1], ty)})))")
    if ty == "f64" and name == "rcp" and rounding(mods) != "RN":
        return g.set(ins.ops[0], f"div_f64_dir(U64(1.0), {g.val(ins.ops[1], ty)}, {rounding(mods)})")
    return float_op(g, ins, name, 1, ty, mods)


@handler("ex2", "lg2", "sin", "cos", "tanh")
def h_approx(g, ins):
    return float_op(g, ins, ins.base, 1, last_type(ins), ins.mods)


@handler("testp")
def h_testp(g, ins):
    ty = last_type(ins)
    x = g.val(ins.ops[1], ty)
    v = f"F({x})" if ty == "f32" else f"D({x})"
    expr = {
        "finite": f"std::isfinite({v})",
        "infinite": f"std::isinf({v})",
        "number": f"!isnan({v})",
        "notanumber": f"isnan({v})",
        "normal": f"std::isnormal({v})",
        "subnormal": f"std::fpclassify({v}) == FP_SUBNORMAL",
    }[ins.mods[0]]
    return g.set(ins.ops[0], expr)


for _name, _fmt in {
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "cnot": "{0} == 0 ? 1 : 0",
    "popc": "__builtin_popcountll({0})",
    "clz": "clz{w}({0})",
    "brev": "brev{w}({0})",
}.items():
    HANDLERS[_name] = simple(_fmt)


@handler("sad")
def h_sad(g, ins):
    ty = last_type(ins)
    x, y, z = (g.val(o, ty) for o in ins.ops[1:])
    return g.set(ins.ops[0], f"{z} + ({signed(ty, x)} > {signed(ty, y)} ? {x} - {y} : {y} - {x})")


@handler("not")
def h_not(g, ins):
    ty = last_type(ins)
    return g.set(ins.ops[0], ("!" if ty == "pred" else "~") + g.val(ins.ops[1], ty))


@handler("shl", "shr")
def h_shift(g, ins):
    ty = last_type(ins)
    x, n = g.val(ins.ops[1], ty), g.val(ins.ops[2], "u32")
    if ins.base == "shl":
        return g.set(ins.ops[0], f"shl{bits(ty)}({x}, {n})")
    return g.set(ins.ops[0], f"shr_{'s' if ty[0] == 's' else 'u'}{bits(ty)}({x}, {n})")


@handler("shf")
def h_shf(g, ins):
    mode = "shf_" + ins.mods[0] + ("c" if "clamp" in ins.mods else "")
    return g.set(ins.ops[0], f"{mode}({', '.join(g.val(o, 'u32') for o in ins.ops[1:])})")


@handler("bfe")
def h_bfe(g, ins):
    ty = last_type(ins)
    x, p, n = g.val(ins.ops[1], ty), g.val(ins.ops[2], "u32"), g.val(ins.ops[3], "u32")
    return g.set(ins.ops[0], f"bfe({x}, {p}, {n}, {'true' if ty[0] == 's' else 'false'}, {bits(ty)})")


@handler("bfi")
def h_bfi(g, ins):
    ty = last_type(ins)
    x, y = g.val(ins.ops[1], ty), g.val(ins.ops[2], ty)
    p, n = g.val(ins.ops[3], "u32"), g.val(ins.ops[4], "u32")
    return g.set(ins.ops[0], f"bfi({x}, {y}, {p}, {n}, {bits(ty)})")


@handler("bfind")
def h_bfind(g, ins):
    ty = last_type(ins)
    x = g.val(ins.ops[1], ty)
    if ty[0] == "s":
        x = f"({utype(ty)})({signed(ty, x)} < 0 ? ~{x} : {x})"
    return g.set(ins.ops[0], f"bfind_u({x}, {bits(ty)}, {'true' if 'shiftamt' in ins.mods else 'false'})")


@handler("bmsk")
def h_bmsk(g, ins):
    a, b = (g.val(o, "u32") for o in ins.ops[1:])
    return g.set(ins.ops[0], f"shl32(shl32(1, {b}) - 1, {a})")


@handler("szext")
def h_szext(g, ins):
    ty = last_type(ins)
    a, b = (g.val(o, "u32") for o in ins.ops[1:])
    return g.set(ins.ops[0], f"bfe({a}, 0, {b}, {'true' if ty[0] == 's' else 'false'}, 32)")


@handler("fns")
def h_fns(g, ins):
    g.unsupported()


@handler("lop3")
def h_lop3(g, ins):
    if "or" in ins.mods or "and" in ins.mods:
        g.unsupported("lop3 with a predicate result")
    d, a, b, c, lut = ins.ops[:5]
    return g.set(d, f"lop3({g.val(a, 'u32')}, {g.val(b, 'u32')}, {g.val(c, 'u32')}, {lut.value})")


@handler("prmt")
def h_prmt(g, ins):
    mode = next((m for m in ins.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    a = ", ".join(g.val(o, "u32") for o in ins.ops[1:])
    if mode:
        code = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"].index(mode)
        return g.set(ins.ops[0], f"prmt_mode({a}, {code})")
    return g.set(ins.ops[0], f"prmt({a})")


@handler("dp4a", "dp2a")
def h_dp(g, ins):
    ta, tb = ins.mods[-2], ins.mods[-1]
    a = ", ".join(g.val(o, "u32") for o in ins.ops[1:])
    flags = ", ".join("true" if t[0] == "s" else "false" for t in (ta, tb))
    extra = f", {'true' if 'hi' in ins.mods else 'false'}" if ins.base == "dp2a" else ""
    return g.set(ins.ops[0], f"{ins.base}({a}, {flags}{extra})")


# =============================================================================================
# comparison

CMP = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
CMP_UNORD = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}


def compare(op, ty, x, y, ftz=False):
    if ty in ("f32", "f64", "f16", "bf16"):
        f = {"f32": "F", "f64": "D", "f16": "h2f", "bf16": "b2f"}[ty]
        if ftz and ty in ("f32", "f16"):
            z = "ftz" if ty == "f32" else "ftz_f16"
            x, y = f"{z}({x})", f"{z}({y})"
        fx, fy = f"{f}({x})", f"{f}({y})"
        if op == "num":
            return f"(!isnan({fx}) && !isnan({fy}))"
        if op == "nan":
            return f"(isnan({fx}) || isnan({fy}))"
        if op == "ne":
            return f"({fx} < {fy} || {fx} > {fy})"
        if op in CMP:
            return f"({fx} {CMP[op]} {fy})"
        if op == "neu":
            return f"(!({fx} == {fy}))"
        inverse = {"equ": None, "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[op]
        if inverse:
            return f"(!({fx} {inverse} {fy}))"
        return f"(!({fx} < {fy} || {fx} > {fy}))"
    if op in ("lo", "ls", "hi", "hs"):
        return f"({x} {CMP[op]} {y})"
    return f"({signed(ty, x)} {CMP[op]} {signed(ty, y)})"


@handler("setp")
def h_setp(g, ins):
    ty, mods = last_type(ins), ins.mods
    op = mods[0]
    boolop = next((m for m in mods[1:] if m in ("and", "or", "xor")), None)
    d, a, b = ins.ops[:3]
    c = g.val(ins.ops[3], "pred") if boolop else None
    cc = {"and": "&&", "or": "||", "xor": "!="}.get(boolop)
    x, y = g.val(a, ty), g.val(b, ty)
    ftz = "ftz" in mods

    def combine(e):
        return f"({e} {cc} {c})" if boolop else e

    if ty in ("f16x2", "bf16x2"):
        half = ty[:-2]
        e = [combine(compare(op, half, f"{p}({x})", f"{p}({y})", ftz)) for p in ("lo", "hi")]
        return f"{{ bool p_ = {e[0]}, q_ = {e[1]}; " + g.set(d.first, "p_") + g.set(d.second, "q_") + " }"
    e = compare(op, ty, x, y, ftz)
    if isinstance(d, Pair):
        return (
            f"{{ bool t_ = {e}, p_ = {combine('t_')}, q_ = {combine('!t_')}; "
            + g.set(d.first, "p_")
            + g.set(d.second, "q_")
            + " }"
        )
    return g.set(d, combine(e))


@handler("set")
def h_set(g, ins):
    types = [m for m in ins.mods if m in TYPE_SIZE]
    dt, ty = types[-2], types[-1]
    op = ins.mods[0]
    boolop = next((m for m in ins.mods[1:] if m in ("and", "or", "xor")), None)
    d, a, b = ins.ops[:3]
    x, y = g.val(a, ty), g.val(b, ty)
    cc = {"and": "&&", "or": "||", "xor": "!="}.get(boolop)
    c = g.val(ins.ops[3], "pred") if boolop else None
    ftz = "ftz" in ins.mods

    def combine(e):
        return f"({e} {cc} {c})" if boolop else e

    one = {"f32": "0x3f800000u", "f16": "0x3c00", "bf16": "0x3f80"}
    if ty in ("f16x2", "bf16x2"):
        half = ty[:-2]
        true = one.get(dt[:-2], "0xffff") if dt.endswith("x2") else "0xffff"
        e = [combine(compare(op, half, f"{p}({x})", f"{p}({y})", ftz)) for p in ("lo", "hi")]
        return g.set(d, f"pack2({e[0]} ? {true} : 0, {e[1]} ? {true} : 0)")
    true = one.get(dt, "~0u")
    return g.set(d, f"{combine(compare(op, ty, x, y, ftz))} ? {true} : 0")


# =============================================================================================
# cvt


@handler("cvt")
def h_cvt(g, ins):
    mods = ins.mods
    types = [m for m in mods if m in TYPE_SIZE]
    dt, st = types[-2], types[-1]
    flags = set(mods)
    d = ins.ops[0]
    if "pack" in flags:
        return cvt_pack(g, ins, types)
    if dt in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") or st in ("e4m3x2", "e5m2x2"):
        return g.set(d, cvt_packed(g, ins, dt, st, flags))
    expr = cvt_expr(g, dt, st, g.val(ins.ops[1], st), flags)
    if dt[0] == "s" and d != SINK and bits(d.type) > bits(dt):  # a wider register is sign-extended
        expr = f"(s{bits(d.type)})(s{bits(dt)})({expr})"
    return g.set(d, expr)


def cvt_packed(g, ins, dt, st, flags):
    half = dt[:-2]
    if st == "f32":  # d = {hi: a, lo: b}
        a, b = g.val(ins.ops[1], "f32"), g.val(ins.ops[2], "f32")
        if len(ins.ops) > 3:
            g.unsupported("stochastic rounding")
        if half in ("e4m3", "e5m2"):
            pre = (lambda x: f"F(max_f32({x}, 0u))") if "relu" in flags else (lambda x: f"F({x})")
            return f"(u16)(f_{half}({pre(b)}) | f_{half}({pre(a)}) << 8)"
        b, a = (cvt_expr(g, half, "f32", x, flags) for x in (b, a))
        return f"pack2({b}, {a})"
    x = g.val(ins.ops[1], st)
    if half in ("e4m3", "e5m2"):  # from f16x2
        pre = (lambda h: f"h2f(relu_f16({h}))") if "relu" in flags else (lambda h: f"h2f({h})")
        return f"(u16)(f_{half}({pre(f'lo({x})')}) | f_{half}({pre(f'hi({x})')}) << 8)"
    if st in ("e4m3x2", "e5m2x2") and dt == "f16x2":
        f = st[:-2] + "_f"
        r = "relu_f16" if "relu" in flags else ""
        return f"pack2({r}(f2h({f}((u8){x}))), {r}(f2h({f}((u8)({x} >> 8)))))"
    g.unsupported()


def cvt_pack(g, ins, types):
    dt = types[0]  # cvt.pack.sat.{u16,s16,u8,s8}.s32[.b32] d,a,b[,c]
    a, b = g.val(ins.ops[1], "s32"), g.val(ins.ops[2], "s32")
    w = bits(dt)
    lo_, hi_ = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if dt[0] == "s" else (0, (1 << w) - 1)
    b, a = (
        f"((u32)((s32){x} < {lo_} ? {lo_} : (s32){x} > {hi_} ? {hi_} : (s32){x}) & {(1 << w) - 1}u)" for x in (b, a)
    )
    expr = f"{b} | {a} << {w}"
    if len(ins.ops) > 3:
        expr += f" | {g.val(ins.ops[3], 'u32')} << {2 * w}"
    return g.set(ins.ops[0], expr)


def cvt_expr(g, dt, st, x, flags):
    floats = ("f16", "bf16", "f32", "f64")
    int_round = next((m for m in ("rni", "rzi", "rmi", "rpi") if m in flags), None)
    mode = rounding(flags)
    if dt == "tf32":
        expr = f"f2tf32({x}, {'RNA' if 'rna' in flags else mode}, {'true' if 'satfinite' in flags else 'false'})"
        return f"max_nan_f32({expr}, 0)" if "relu" in flags else expr
    if st in floats:
        if "ftz" in flags and st == "f32":
            x = f"ftz({x})"
        as_double = {
            "f32": f"(double)F({x})",
            "f64": f"D({x})",
            "f16": f"(double)h2f({x})",
            "bf16": f"(double)b2f({x})",
        }[st]
        if dt not in floats:  # float -> int
            m = {"rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}[int_round or "rzi"]
            c = f"{'s' if dt[0] == 's' else 'u'}{bits(dt)}"
            return f"({utype(dt)})f_to_int<{c}>(rint_mode({as_double}, {m}), {'true' if st == 'f64' else 'false'})"
        if int_round:
            m = {"rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}[int_round]
            v = f"rint_mode({as_double}, {m})"
            expr = {"f32": f"U((float){v})", "f64": f"U64({v})", "f16": f"d2h({v})", "bf16": f"d2b({v})"}[dt]
        elif dt == st:
            expr = x
        elif dt == "f64":
            expr = f"U64({as_double})"
        elif dt == "f32":
            if st == "f64":
                expr = f"d2f({as_double})" if mode == "RN" else f"d2f_dir({as_double}, {mode})"
            else:
                expr = f"U(h2f({x}))" if st == "f16" else f"U(b2f({x}))"
        elif mode == "RN" and st == "f32":
            expr = f"f2h(F({x}))" if dt == "f16" else f"f2b(F({x}))"
        else:
            expr = f"{'d2h' if dt == 'f16' else 'd2b'}({as_double}, {mode})"
        if "ftz" in flags and dt == "f32":
            expr = f"ftz({expr})"
        if "satfinite" in flags:
            big = "0x7bff" if dt == "f16" else "0x7f7f"
            expr = f"sat_finite16({expr}, {big})"
        if "sat" in flags:
            expr = f"sat_{dt}({expr})"
        if "relu" in flags:
            expr = f"relu_{dt}({expr})" if dt != "f32" else f"max_nan_f32({expr}, 0)"
        return expr
    sx = f"(s{bits(st)})({x})" if st[0] == "s" else f"({utype(st)})({x})"
    if dt in floats:  # int -> float
        odd = {"s64": "s64_odd", "u64": "u64_odd"}.get(st)
        if dt == "f32" and mode == "RN":
            expr = f"U((float){sx})"
        elif dt == "f64":
            if odd and mode != "RN":
                expr = f"i64_to_f64_dir({x}, {'true' if st[0] == 's' else 'false'}, {mode})"
            else:
                expr = f"U64((double){sx})"
        else:
            v = f"{odd}({sx})" if odd else f"(double){sx}"
            expr = {"f32": f"d2f_dir({v}, {mode})", "f16": f"d2h({v}, {mode})", "bf16": f"d2b({v}, {mode})"}[dt]
        return f"sat_{dt}({expr})" if "sat" in flags else expr
    if "sat" in flags:  # int -> int, saturating
        w = bits(dt)
        lo_, hi_ = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if dt[0] == "s" else (0, (1 << w) - 1)
        wide = f"(__int128)({sx})"
        return (
            f"({utype(dt)})({wide} < (__int128){lo_ if lo_ > -(1 << 63) else '(-9223372036854775807ll-1)'}"
            f" ? (__int128){lo_ if lo_ > -(1 << 63) else '(-9223372036854775807ll-1)'} : {wide} > (__int128){hi_}ull"
            f" ? (__int128){hi_}ull : {wide})"
        )
    return f"({utype(dt)}){sx}"


# =============================================================================================
# memory

SPACES = ("global", "shared", "local", "const", "param")


def mem_space(mods):
    for m in mods:
        s = m.split("::")[0]
        if s in SPACES:
            return s
    return "generic"


def vec_width(mods):
    return next((int(m[1:]) for m in mods if m in ("v2", "v4", "v8")), 1)


def check_call(g, space, addr, size, access):
    fn = {"const": "global"}.get(space, space)
    return f"mem_{fn}(T, {addr}, {size}, {access}, {g.pc})"


PROF_GLOBAL = {"ld": 1, "st": 2, "atom": 3}  # event kinds of profile.cpp
PROF_SHARED = {"ld": 4, "st": 5, "atom": 6, "ldmatrix": 7, "stmatrix": 8}


def profile_access(g, space, op, addr, size):
    """Statement that logs an access (addr: operand or C++) for the profile; empty when profiling is off."""
    if not g.unit.profile or space not in ("global", "shared", "generic"):
        return ""
    addr = addr if isinstance(addr, str) else g.addr(addr)
    fn = "prof_generic" if space == "generic" else "prof_mem"
    kind = (PROF_SHARED if space == "shared" else PROF_GLOBAL)[op]
    return f"{fn}(T, {addr}, {size}, {kind}, {g.pc}); "


def strong(mods):
    return any(m in ("volatile", "relaxed", "acquire", "release", "mmio") for m in mods)


def memory_order(g, space, addr, mods, kind):
    """Call that makes a strong access (kind: 1 load, 2 store, 3 both) take part in ordering."""
    sem = (1 if "acquire" in mods or "acq_rel" in mods else 0) | (2 if "release" in mods or "acq_rel" in mods else 0)
    a = f"WIN_SHARED + (u64)({addr})" if space == "shared" else f"(u64)({addr})"
    return f"mem_order(T, {a}, {kind}, {sem});"


def param_pointer(g, op):
    """C++ pointer expression for a .param operand named by symbol, else None."""
    if not isinstance(op.base, Sym):
        return None
    name = op.base.name
    if name in g.call_params:
        return f"(cp_{cname(name)} + {op.offset})"
    if g.fn.is_entry and name in g.unit.param_addr:
        return f"(T->params + {g.unit.param_addr[name] + op.offset})"
    if name in g.local_params:
        return f"(mem_local(T, lbase + {g.local_params[name] + op.offset}, 1, AC_READ, {g.pc}))"
    if name in g.param_names:
        return f"(p_{cname(name)} + {op.offset})"
    return None


@handler("ld", "ldu")
def h_ld(g, ins):
    mods, ty = ins.mods, last_type(ins)
    d, a = ins.ops[0], ins.ops[1]
    n, size = vec_width(mods), TYPE_SIZE[ty]
    space = mem_space(mods)
    items = d.items if isinstance(d, Vec) else (d,)
    assert len(items) == n
    ptr = param_pointer(g, a) if space == "param" else None
    if ptr is None:
        acc = "AC_ATOMIC | 4" if strong(mods) else "AC_READ"
        ptr = check_call(g, "generic" if space == "param" else space, g.addr(a), size * n, acc)
    out = f"{{ {profile_access(g, space, 'ld', a, size * n)}const u8* p_ = {ptr}; "
    for i, x in enumerate(items):
        if x == SINK:
            continue
        v = f"rd<{utype(ty)}>(p_ + {i * size})"
        if ty[0] == "s" and bits(x.type) > bits(ty):
            v = f"(s{bits(x.type)})(s{bits(ty)}){v}"
        out += g.set(x, v)
    if strong(mods) and space in ("shared", "global", "generic"):
        out = "{ " + f"const u64 a_ = {g.addr(a)}; " + out + " " + memory_order(g, space, "a_", mods, 1) + " }"
    return out + (" mem_strong(T);" if strong(mods) else "") + " }"


@handler("st")
def h_st(g, ins):
    mods, ty = ins.mods, last_type(ins)
    a, v = ins.ops[0], ins.ops[1]
    n, size = vec_width(mods), TYPE_SIZE[ty]
    space = mem_space(mods)
    if "async" in mods:
        g.unsupported()
    items = v.items if isinstance(v, Vec) else (v,)
    assert len(items) == n
    ptr = param_pointer(g, a) if space == "param" else None
    if ptr is None:
        acc = "AC_ATOMIC | 8" if strong(mods) else "AC_WRITE"
        ptr = check_call(g, space, g.addr(a), size * n, acc)
    out = f"{{ {profile_access(g, space, 'st', a, size * n)}u8* p_ = (u8*){ptr}; "
    if strong(mods) and space in ("shared", "global", "generic"):
        out += memory_order(g, space, g.addr(a), mods, 2) + " "
    for i, x in enumerate(items):
        out += f"wr<{utype(ty)}>(p_ + {i * size}, {g.val(x, ty)}); "
    return out + ("mem_strong(T); " if strong(mods) else "") + "}"


@handler("atom", "red")
def h_atom(g, ins):
    mods = ins.mods
    if "async" in mods:
        g.unsupported()
    ty = last_type(ins)
    if ty not in TYPE_SIZE:
        ty = next(m for m in reversed(mods) if m in TYPE_SIZE)
    n = vec_width(mods)
    op = next(m for m in mods if m in ("add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"))
    space = mem_space(mods)
    ops = list(ins.ops)
    d = ops.pop(0) if ins.base == "atom" else SINK
    a, b = ops[0], ops[1]
    c = ops[2] if op == "cas" else None
    size, u = TYPE_SIZE[ty], utype(ty)
    sp = {"global": "SP_GLOBAL", "shared": "SP_SHARED", "local": "SP_LOCAL", "generic": "SP_GENERIC"}[space]
    ds = d.items if isinstance(d, Vec) else (d,) * n
    bs = b.items if isinstance(b, Vec) else (b,)
    log = profile_access(g, space, "atom", a, size * n)
    out = f"{{ {log}u8* p_ = atom_begin(T, {sp}, {g.addr(a)}, {size * n}, {g.pc}); "
    out += memory_order(g, space, g.addr(a), mods, 3) + " "
    tail = ""
    for i, x in enumerate(bs):
        o = f"o{i}_"
        y = g.val(x, ty)
        if op == "cas":
            new = f"{o} == {y} ? {g.val(c, ty)} : {o}"
        elif op == "exch":
            new = y
        elif op in ("and", "or", "xor"):
            new = f"{o} {dict(zip(('and', 'or', 'xor'), '&|^'))[op]} {y}"
        elif op == "inc":
            new = f"{o} >= {y} ? 0 : {o} + 1"
        elif op == "dec":
            new = f"{o} == 0 || {o} > {y} ? {y} : {o} - 1"
        elif ty in FLOATS:
            if ty.endswith("x2"):
                h = ty[:-2]
                new = f"pack2({op}_{h}(lo({o}), lo({y})), {op}_{h}(hi({o}), hi({y})))"
            else:
                new = f"{op}_{ty}({o}, {y})"
        elif op == "add":
            new = f"{o} + {y}"
        else:
            new = f"{signed(ty, o)} {'<' if op == 'min' else '>'} {signed(ty, y)} ? {o} : {y}"
        out += f"{u} {o} = rd<{u}>(p_ + {i * size}); wr<{u}>(p_ + {i * size}, ({u})({new})); "
        if ds[i] != SINK:
            tail += g.set(ds[i], o)
    return out + tail + " atom_end(T); }"


@handler("prefetch", "prefetchu", "discard", "applypriority", "createpolicy", "pmevent")
def h_nop(g, ins):
    if "tensormap" in ins.mods:
        g.unsupported()
    if ins.base == "createpolicy":
        return g.set(ins.ops[0], "0")
    return ";"


@handler("fence", "membar")
def h_fence(g, ins):
    if "proxy" in ins.mods or "mbarrier_init" in ins.mods:
        g.unsupported()
    return "mem_fence(T);"


# =============================================================================================
# control flow


@handler("bra")
def h_bra(g, ins):
    name = ins.ops[0].name
    back = f"BACK({g.pc}); " if name in g.labels_seen else ""
    return f"{back}goto {g.label(name)};"


@handler("brx")
def h_brx(g, ins):
    table = g.fn.tables[ins.ops[1].name]
    cases = " ".join(f"case {i}: goto {g.label(t)};" for i, t in enumerate(table))
    default = f'default: device_trap(T, {g.pc}, "brx.idx index");'
    return f"BACK({g.pc}); switch ({g.val(ins.ops[0], 'u32')}) {{ {cases} {default} }}"


@handler("ret")
def h_ret(g, ins):
    return "goto leave;"


@handler("exit")
def h_exit(g, ins):
    return "thread_exit(T);"


@handler("trap", "brkpt")
def h_trap(g, ins):
    return f'device_trap(T, {g.pc}, "trap instruction executed");'


@handler("nanosleep")
def h_nanosleep(g, ins):
    return "device_yield(T);"


@handler("call")
def h_call(g, ins):
    if not isinstance(ins.callee, Sym):
        g.unsupported("indirect call")
    name = ins.callee.name

    def pointer(op):
        if isinstance(op, Sym):
            return f"cp_{cname(op.name)}"
        g.unsupported("call with register arguments")

    args = [pointer(o) for o in ins.ops]
    rets = [pointer(o) for o in ins.rets]
    if name == "vprintf":
        return f"wr<u32>({rets[0]}, call_vprintf(T, rd<u64>({args[0]}), rd<u64>({args[1]}), {g.pc}));"
    if name == "__assertfail":
        return (
            f"call_assertfail(T, rd<u64>({args[0]}), rd<u64>({args[1]}), rd<u32>({args[2]}), "
            f"rd<u64>({args[3]}), {g.pc});"
        )
    fn = g.unit.ast.functions.get(name)
    if fn is None or fn.declared_only:
        g.unsupported(f"external function {name}")
    return f"f_{cname(name)}({', '.join(['T'] + rets + args)});"


# =============================================================================================
# warp collectives and barriers


def opkey(g, ins):
    return g.unit.op_id(ins.opcode)


@handler("shfl")
def h_shfl(g, ins):
    d, a, b, c, mask = ins.ops
    mode = ["idx", "up", "down", "bfly"].index(ins.mods[1])
    v = [g.val(o, "u32") for o in (a, b, c, mask)]
    dest, pred = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    call = f"warp_shfl(T, {opkey(g, ins)}, {v[0]}, {v[1]}, {v[2]}, {v[3]}, &q_, {mode}, {g.pc})"
    return "{ bool q_; " + f"u32 v_ = {call}; " + g.set(dest, "v_") + (g.set(pred, "q_") if pred else "") + " }"


@handler("vote")
def h_vote(g, ins):
    d, p, mask = ins.ops
    mode = ["all", "any", "uni", "ballot"].index(ins.mods[1])
    return g.set(d, f"warp_vote(T, {opkey(g, ins)}, {g.val(p, 'pred')}, {g.val(mask, 'u32')}, {mode}, {g.pc})")


@handler("match")
def h_match(g, ins):
    d, a, mask = ins.ops
    ty = last_type(ins)
    all_ = "true" if "all" in ins.mods else "false"
    dest, pred = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    call = f"warp_match(T, {opkey(g, ins)}, {g.val(a, ty)}, {g.val(mask, 'u32')}, {all_}, &q_, {g.pc})"
    return "{ bool q_; " + f"u32 v_ = {call}; " + g.set(dest, "v_") + (g.set(pred, "q_") if pred else "") + " }"


@handler("redux")
def h_redux(g, ins):
    d, a, mask = ins.ops
    op, ty = ins.mods[1], last_type(ins)
    if ty == "f32":
        g.unsupported()
    mode = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}[op] + (8 if ty == "s32" else 0)
    return g.set(d, f"warp_redux(T, {opkey(g, ins)}, {g.val(a, 'u32')}, {g.val(mask, 'u32')}, {mode}, {g.pc})")


@handler("activemask")
def h_activemask(g, ins):
    return g.set(ins.ops[0], f"warp_activemask(T, {g.pc})")


@handler("bar", "barrier")
def h_bar(g, ins):
    mods = [m for m in ins.mods if m != "cta"]
    if "cluster" in mods:
        g.unsupported()
    if "warp" in mods:
        return f"warp_sync(T, {opkey(g, ins)}, {g.val(ins.ops[0], 'u32')}, {g.pc});"
    kind = next(m for m in mods if m in ("sync", "arrive", "red"))
    aligned = 4 if ins.base == "bar" or "aligned" in mods else 0
    ops = list(ins.ops)
    if kind == "red":
        d, p = ops.pop(0), ops.pop()
        count = g.val(ops[1], "u32") if len(ops) > 1 else "0"
        op = {"popc": 0, "and": 1, "or": 2}[next(m for m in mods if m in ("popc", "and", "or"))]
        return g.set(
            d, f"bar_red(T, {op + (aligned << 2)}, {g.val(p, 'pred')}, {g.val(ops[0], 'u32')}, {count}, {g.pc})"
        )
    count = g.val(ops[1], "u32") if len(ops) > 1 else "0"
    k = {"sync": 0, "arrive": 1}[kind] | aligned
    return f"bar_op(T, {k}, {g.val(ops[0], 'u32')}, {count}, {g.pc});"


def is_generic(ins):
    return "false" if any(m.startswith("shared") for m in ins.mods) else "true"


def profile_rows(g, ins, addr, num):
    """Log the row addresses of ldmatrix / stmatrix (of the first 8 num lanes)."""
    a = f"(u64){g.addr(addr)}" + (" - WIN_SHARED" if is_generic(ins) == "true" else "")
    log = profile_access(g, "shared", ins.base, a, 16)
    return log and f"if (T->lane < {8 * num}) {{ {log}}} "


@handler("ldmatrix")
def h_ldmatrix(g, ins):
    if "m8n8" not in ins.mods or last_type(ins) != "b16":
        g.unsupported()
    num = int(next(m for m in ins.mods if m in ("x1", "x2", "x4"))[1:])
    d = ins.ops[0].items if isinstance(ins.ops[0], Vec) else (ins.ops[0],)
    trans = "true" if "trans" in ins.mods else "false"
    load = f"warp_ldmatrix(T, {g.addr(ins.ops[1])}, d_, {num}, {trans}, {is_generic(ins)}, {g.pc});"
    out = f"{{ {profile_rows(g, ins, ins.ops[1], num)}u32 d_[4]; {load} "
    return out + " ".join(g.set(x, f"d_[{i}]") for i, x in enumerate(d)) + " }"


@handler("stmatrix")
def h_stmatrix(g, ins):
    if "m8n8" not in ins.mods or last_type(ins) != "b16":
        g.unsupported()
    num = int(next(m for m in ins.mods if m in ("x1", "x2", "x4"))[1:])
    s = ins.ops[1].items if isinstance(ins.ops[1], Vec) else (ins.ops[1],)
    trans = "true" if "trans" in ins.mods else "false"
    vals = ", ".join(g.val(x, "u32") for x in s)
    store = f"warp_stmatrix(T, {g.addr(ins.ops[0])}, s_, {num}, {trans}, {is_generic(ins)}, {g.pc});"
    return f"{{ {profile_rows(g, ins, ins.ops[0], num)}u32 s_[4] = {{{vals}}}; {store} }}"


@handler("movmatrix")
def h_movmatrix(g, ins):
    return g.set(ins.ops[0], f"warp_movmatrix(T, {g.val(ins.ops[1], 'u32')}, {g.pc})")


@handler("mma")
def h_mma(g, ins):
    mods = ins.mods
    if "sp" in mods or "block_scale" in mods:
        g.unsupported()
    shape = next(m for m in mods if re.fullmatch(r"m\d+n\d+k\d+", m))
    m, n, k = map(int, re.findall(r"\d+", shape))
    types = [t for t in mods if t in ELEM_CODE or t in ACC_CODE]
    dt, at, bt, ct = types[-4:]
    if (
        "row" not in mods
        or "col" not in mods
        or n != 8
        or m not in (8, 16)
        or dt != ct
        or (m == 8 and at not in ("f64", "s8", "u8"))
        or "xor" in mods
        or (m == 16 and at == "f64")
    ):
        g.unsupported()
    code = (
        k
        | ELEM_CODE[at] << 8
        | ELEM_CODE[bt] << 12
        | ACC_CODE[dt] << 16
        | (1 << 20 if m == 16 else 0)
        | (1 << 21 if "satfinite" in mods else 0)
    )
    d = ins.ops[0].items
    wide = at == "f64"
    vals = []
    for op in ins.ops[1:4]:
        for x in op.items if isinstance(op, Vec) else (op,):
            if wide:
                v = g.val(x, "u64")
                vals += [f"(u32){v}", f"(u32)({v} >> 32)"]
            else:
                vals.append(g.val(x, "u32"))
    out = f"{{ const u32 s_[] = {{{', '.join(vals)}}}; u32 d_[8]; warp_mma(T, {code}, s_, d_, {g.pc}); "
    if wide:
        return out + " ".join(g.set(x, f"d_[{2 * i}] | (u64)d_[{2 * i + 1}] << 32") for i, x in enumerate(d)) + " }"
    return out + " ".join(g.set(x, f"d_[{i}]") for i, x in enumerate(d)) + " }"
