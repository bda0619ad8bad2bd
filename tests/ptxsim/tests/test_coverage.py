"""Every supported instruction form must translate and compile; a few are checked for their values."""

import os
import re
import struct

import numpy as np
import pytest
from ptxsim import Module, Out, UnsupportedInstruction

HERE = os.path.dirname(os.path.abspath(__file__))

DECL = """.reg .pred p<9>; .reg .b16 h<9>; .reg .b32 r<40>; .reg .b64 d<20>; .reg .f32 f<20>; .reg .f64 e<9>;
.reg .b128 q<3>;"""
HEAD = (
    ".version 9.0\n.target sm_90a\n.address_size 64\n.global .align 16 .b8 gbuf[4096];\n"
    ".shared .align 128 .b8 sbuf[8192];\n.const .align 4 .u32 cbuf[4] = {1, 2, 3, 4};\n"
)


def build(lines):
    body = "\n".join(s + ";" for s in lines)
    return Module.from_ptx(
        f"{HEAD}.visible .entry k(.param .u64 out, .param .align 8 .b8 st[16]) {{\n{DECL}\n{body}\nret;\n}}"
    )


FORMS = {
    "moves": """mov.b32 r1, {h1, h2}|mov.b32 {h1, h2}, r1|mov.b64 {r1, r2}, d1|mov.b64 d1, {r1, r2}
        mov.b128 q1, {d1, d2}
        mov.b128 {d1, d2}, q1|mov.b32 {_, h2}, r1|mov.pred p1, p2|mov.u32 r1, sbuf|mov.u64 d1, gbuf|mov.u64 d1, cbuf
        mov.u32 r1, sbuf+16|mov.b64 d1, out|cvta.shared.u64 d1, d2|cvta.to.shared.u64 d1, d2|cvta.to.global.u64 d1, d2
        cvta.local.u64 d1, d2|cvta.param.u64 d1, d2|cvta.const.u64 d1, d2|isspacep.shared p1, d1|isspacep.global p1, d1
        isspacep.shared::cta p1, d1|selp.b32 r1, r2, r3, p1|selp.f64 e1, e2, e3, p1|selp.b16 h1, h2, h3, p1
        slct.f32.s32 f1, f2, f3, r1|mov.f32 f1, 0f3F800000|mov.f64 e1, 0d3FF0000000000000|mov.u32 r1, %laneid
        mov.u32 r1, %lanemask_lt|mov.u64 d1, %clock64|mov.u32 r1, %nctaid.z|mov.u32 r1, %smid
        mov.u64 d1, %globaltimer|mov.u32 r1, %dynamic_smem_size|mov.u32 r1, %total_smem_size""",
    "integer": """add.s32 r1, r2, -5|add.u64 d1, d2, d3|add.s16 h1, h2, h3|add.sat.s32 r1, r2, r3|sub.sat.s32 r1, r2, r3
        add.u16x2 r1, r2, r3|sub.cc.u32 r1, r2, r3|subc.u32 r1, r2, r3|add.cc.u64 d1, d2, d3|addc.cc.u64 d1, d2, d3
        mul.lo.u16 h1, h2, h3|mul.hi.s16 h1, h2, h3|mul.wide.u16 r1, h2, h3|mul.wide.s32 d1, r2, -7
        mul.hi.u64 d1, d2, d3
        mul.hi.s64 d1, d2, d3|mul24.lo.u32 r1, r2, r3|mad.lo.s64 d1, d2, d3, d4|mad.wide.s16 r1, h1, h2, r3
        mad.hi.u32 r1, r2, r3, r4|mad.lo.cc.u32 r1, r2, r3, r4|madc.hi.u32 r1, r2, r3, r4|mad24.lo.s32 r1, r2, r3, r4
        div.s32 r1, r2, r3|div.u64 d1, d2, d3|rem.s64 d1, d2, d3|rem.u16 h1, h2, h3|min.s32 r1, r2, r3
        max.u64 d1, d2, d3
        min.s16 h1, h2, h3|max.s16x2 r1, r2, r3|max.relu.s32 r1, r2, r3|abs.s32 r1, r2|neg.s64 d1, d2|neg.s16 h1, h2
        not.b32 r1, r2|not.pred p1, p2|and.pred p1, p2, p3|or.b64 d1, d2, d3|xor.b16 h1, h2, h3|cnot.b32 r1, r2
        shl.b64 d1, d2, 3|shr.s64 d1, d2, r1|shr.u16 h1, h2, r3|shf.l.wrap.b32 r1, r2, r3, r4
        shf.r.clamp.b32 r1, r2, r3, 7
        bfe.u32 r1, r2, 3, 4|bfe.s64 d1, d2, 3, 4|bfi.b64 d1, d2, d3, 1, 2|bfind.u32 r1, r2|bfind.shiftamt.s64 r1, d2
        popc.b64 r1, d1|clz.b64 r1, d1|brev.b64 d1, d2|lop3.b32 r1, r2, r3, r4, 0x96|prmt.b32 r1, r2, r3, 0x3210
        prmt.b32.f4e r1, r2, r3, r4|sad.s32 r1, r2, r3, r4|dp4a.s32.u32 r1, r2, r3, r4|dp2a.lo.s32.s32 r1, r2, r3, r4
        bmsk.clamp.b32 r1, r2, r3|szext.wrap.s32 r1, r2, r3""",
    "float": """add.rn.f32 f1, f2, f3|add.ftz.f32 f1, f2, 0f3F800000|sub.rm.f32 f1, f2, f3|mul.rz.ftz.sat.f32 f1, f2, f3
        fma.rp.f32 f1, f2, f3, f4|fma.rn.sat.f32 f1, f2, f3, f4|mad.rn.f32 f1, f2, f3, f4|div.full.f32 f1, f2, f3
        div.approx.ftz.f32 f1, f2, f3|div.rz.f32 f1, f2, f3|rcp.rn.f32 f1, f2|rcp.approx.ftz.f32 f1, f2
        rcp.rz.f32 f1, f2
        sqrt.approx.f32 f1, f2|sqrt.rn.f32 f1, f2|sqrt.rm.f32 f1, f2|rsqrt.approx.ftz.f32 f1, f2|min.f32 f1, f2, f3
        max.NaN.f32 f1, f2, f3|min.xorsign.abs.f32 f1, f2, f3|abs.ftz.f32 f1, f2|neg.f32 f1, f2|copysign.f32 f1, f2, f3
        testp.finite.f32 p1, f1|testp.subnormal.f64 p1, e1|ex2.approx.ftz.f32 f1, f2|lg2.approx.f32 f1, f2
        sin.approx.f32 f1, f2|cos.approx.ftz.f32 f1, f2|tanh.approx.f32 f1, f2|add.f64 e1, e2, e3|mul.rm.f64 e1, e2, e3
        fma.rz.f64 e1, e2, e3, e4|div.rn.f64 e1, e2, e3|div.rp.f64 e1, e2, e3|rcp.rn.f64 e1, e2|sqrt.rn.f64 e1, e2
        rcp.approx.ftz.f64 e1, e2|rsqrt.approx.ftz.f64 e1, e2|rsqrt.approx.f64 e1, e2|min.f64 e1, e2, e3|abs.f64 e1, e2
        copysign.f64 e1, e2, e3|add.f16 h1, h2, h3|add.sat.f16 h1, h2, h3|sub.ftz.f16x2 r1, r2, r3|mul.f16x2 r1, r2, r3
        mul.sat.f16x2 r1, r2, r3|fma.rn.f16 h1, h2, h3, h4|fma.rn.relu.f16x2 r1, r2, r3, r4|fma.rn.bf16 h1, h2, h3, h4
        fma.rn.relu.bf16x2 r1, r2, r3, r4|add.bf16 h1, h2, h3|sub.bf16x2 r1, r2, r3|mul.rn.bf16x2 r1, r2, r3
        min.f16 h1, h2, h3|max.NaN.f16x2 r1, r2, r3|min.bf16x2 r1, r2, r3|max.NaN.bf16 h1, h2, h3|neg.f16x2 r1, r2
        abs.bf16x2 r1, r2|neg.bf16 h1, h2|abs.f16 h1, h2|ex2.approx.f16 h1, h2|ex2.approx.ftz.bf16x2 r1, r2
        ex2.approx.f16x2 r1, r2|tanh.approx.f16x2 r1, r2|tanh.approx.bf16 h1, h2|min.xorsign.abs.f16 h1, h2, h3""",
    "compare": """setp.lt.and.s32 p1|p2, r1, r2, p3|setp.hs.u64 p1, d1, d2|setp.neu.ftz.f32 p1, f1, f2
        setp.num.f64 p1, e1, e2
        setp.nan.or.f32 p1, f1, f2, !p2|setp.equ.f32 p1, f1, f2|setp.gtu.f64 p1, e1, e2|setp.ne.xor.b16 p1, h1, h2, p2
        setp.gt.f16 p1, h1, h2|setp.le.f16x2 p1|p2, r1, r2|setp.lt.bf16x2 p1|p2, r1, r2|setp.eq.bf16 p1, h1, h2
        set.gt.u32.f32 r1, f1, f2|set.lt.f32.s32 f1, r1, r2|set.eq.f16x2.f16x2 r1, r2, r3|set.ltu.u32.f16x2 r1, r2, r3
        set.le.bf16x2.bf16x2 r1, r2, r3|set.gt.f16.f16 h1, h2, h3|set.lt.u32.u32 r1, r2, r3
        set.ne.and.s32.s32 r1, r2, r3, p1""",
    "cvt": """cvt.u32.u16 r1, h1|cvt.s64.s32 d1, r1|cvt.u16.u32 h1, r1|cvt.s32.s8 r1, r2|cvt.u8.u32 h1, r1
        cvt.sat.u8.s32 r1, r2
        cvt.sat.s16.s32 h1, r2|cvt.sat.u64.s64 d1, d2|cvt.sat.s64.u64 d1, d2|cvt.rn.f32.s32 f1, r1|cvt.rz.f32.u64 f1, d1
        cvt.rn.f64.u32 e1, r1|cvt.rp.f64.s64 e1, d1|cvt.rn.f16.s32 h1, r1|cvt.rn.bf16.s64 h1, d1|cvt.rn.f16.u16 h1, h2
        cvt.rni.s32.f32 r1, f1|cvt.rzi.u64.f64 d1, e1|cvt.rmi.ftz.s32.f32 r1, f1|cvt.rpi.u16.f16 h1, h2
        cvt.rzi.s32.bf16 r1, h1
        cvt.rni.f32.f32 f1, f2|cvt.rmi.f64.f64 e1, e2|cvt.rzi.f16.f16 h1, h2|cvt.sat.f32.f32 f1, f2|cvt.f64.f32 e1, f1
        cvt.rm.f32.f64 f1, e1|cvt.rn.f16.f32 h1, f1|cvt.rz.f16.f32 h1, f1|cvt.rn.relu.f16.f32 h1, f1
        cvt.rn.f16.f64 h1, e1
        cvt.f32.f16 f1, h1|cvt.f64.f16 e1, h1|cvt.rn.bf16.f32 h1, f1|cvt.rz.bf16.f32 h1, f1|cvt.rn.relu.bf16.f32 h1, f1
        cvt.f32.bf16 f1, h1|cvt.rn.bf16.f16 h1, h2|cvt.rn.f16.bf16 h1, h2|cvt.rn.f16x2.f32 r1, f1, f2
        cvt.rz.relu.f16x2.f32 r1, f1, f2|cvt.rn.bf16x2.f32 r1, f1, f2|cvt.rn.satfinite.f16x2.f32 r1, f1, f2
        cvt.rna.tf32.f32 r1, f1|cvt.rn.tf32.f32 r1, f1|cvt.rn.satfinite.e4m3x2.f32 h1, f1, f2
        cvt.rn.satfinite.relu.e5m2x2.f32 h1, f1, f2|cvt.rn.satfinite.e4m3x2.f16x2 h1, r1|cvt.rn.f16x2.e4m3x2 r1, h1
        cvt.rn.relu.f16x2.e5m2x2 r1, h1|cvt.pack.sat.s8.s32.b32 r1, r2, r3, r4|cvt.pack.sat.u16.s32 r1, r2, r3""",
    "memory": """ld.param.u64 d1, [out]|ld.param.v2.b32 {r1, r2}, [st+8]|ld.global.v4.f32 {f1, f2, f3, f4}, [d1]
        ld.global.nc.L1::no_allocate.L2::128B.v2.u64 {d2, d3}, [d1+16]|ld.global.nc.v4.u16 {h1, h2, h3, h4}, [d1]
        ld.global.L2::cache_hint.u32 r1, [d1], d2|ld.shared.s8 r1, [r2]|ld.shared.v2.f64 {e1, e2}, [sbuf+32]
        ld.volatile.shared.u32 r1, [r2]|ld.acquire.gpu.global.u32 r1, [d1]|ld.relaxed.sys.u64 d2, [d1]|ld.u8 h1, [d1]
        ld.const.u32 r1, [cbuf+4]|ld.global.b128 q1, [d1]|ld.local.u32 r1, [d1]|ldu.global.f32 f1, [d1]
        ld.global.v8.f32 {f1, f2, f3, f4, f5, f6, f7, f8}, [d1]
        ld.shared::cta.u32 r1, [r2]
        st.global.v4.u32 [d1], {r1, r2, r3, r4}|st.shared.u8 [r1+-4], r2|st.global.cs.f64 [d1], e1
        st.release.gpu.global.u32 [d1], r1
        st.global.L1::no_allocate.u16 [d1], h1|st.global.u32 [gbuf], 7|st.volatile.global.f32 [d1], 0f00000000
        st.b128 [d1], q1
        atom.global.add.u32 r1, [d1], 1|atom.add.f64 e1, [d1], e2|atom.shared.cas.b64 d1, [r1], d2, d3
        atom.global.exch.b128 q1, [d1], q2|atom.acq_rel.gpu.global.add.noftz.f16x2 r1, [d1], r2
        atom.global.cas.b16 h1, [d1], h2, h3
        atom.global.add.noftz.bf16 h1, [d1], h2|atom.global.min.s64 d1, [d2], d3|atom.global.dec.u32 r1, [d1], r2
        red.global.add.f32 [d1], f1|red.shared.max.u32 [r1], r2|red.release.gpu.global.add.s32 [d1], 1
        red.global.and.b32 [d1], r1
        red.global.add.noftz.bf16x2 [d1], r1|atom.global.v2.f32.add {f1, f2}, [d1], {f3, f4}|membar.gl|fence.acq_rel.gpu
        fence.sc.cta|prefetch.global.L2 [d1]
        prefetchu.L1 [d1]|discard.global.L2 [d1], 128|createpolicy.fractional.L2::evict_first.b64 d1, 0f3F800000""",
    "sync": """bar.sync 0|barrier.sync.aligned 1, 64|barrier.cta.sync.aligned 2|barrier.sync r1, r2|bar.arrive 1, 64
        bar.warp.sync 0xffffffff
        bar.red.popc.u32 r1, 0, p1|barrier.cta.red.and.pred p1, 0, 64, !p2|bar.red.or.pred p1, 0, p2
        shfl.sync.idx.b32 r1|p1, r2, r3, 0x1f, 0xffffffff|shfl.sync.up.b32 r1, r2, 1, 0, -1
        vote.sync.ballot.b32 r1, p1, -1
        vote.sync.uni.pred p1, !p2, -1|match.any.sync.b64 r1, d1, -1|match.all.sync.b32 r1|p1, r2, -1
        redux.sync.add.s32 r1, r2, -1
        redux.sync.xor.b32 r1, r2, -1|activemask.b32 r1|nanosleep.u32 100""",
    "matrix": """ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r1}, [r2]
        ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {r1, r2, r3, r4}, [r5+64]
        stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [r1], {r2, r3}|movmatrix.sync.aligned.m8n8.trans.b16 r1, r2
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {f1, f2, f3, f4}, {r1, r2}, {r3}, {f5, f6, f7, f8}
        mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {r1, r2}, {r3, r4}, {r5}, {r6, r7}
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {f1, f2, f3, f4}, {r1, r2}, {r3}, {f5, f6, f7, f8}
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {f1, f2, f3, f4}, {r1, r2}, {r3}, {f5, f6, f7, f8}
        mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 \
        {f1, f2, f3, f4}, {r1, r2, r3, r4}, {r5, r6}, {f5, f6, f7, f8}
        mma.sync.aligned.m16n8k16.row.col.satfinite.s32.u8.s8.s32 {r1, r2, r3, r4}, {r5, r6}, {r7}, {r8, r9, r10, r11}
        mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {r1, r2}, {r3}, {r4}, {r5, r6}""",
}


# Of asynchronous copies, clusters, warp specialisation and warpgroups a form of each family, and one of textures.
REFUSED = """cp.async.ca.shared.global [r1], [d1], 4
    cp.async.wait_all
    mbarrier.init.shared::cta.b64 [r1], 1
    cp.async.bulk.global.shared::cta.bulk_group [d1], [r1], 64
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [r1], [d1, {r2, r3}], [r4]
    cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [d1, {r1, r2}], [r3]
    wgmma.fence.sync.aligned
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {f1, f2, f3, f4}, d1, d2, p1, 1, 1, 0, 0
    ld.shared::cluster.u32 r1, [r2]
    cvta.shared::cluster.u64 d1, d2
    barrier.cluster.arrive.relaxed.aligned
    mapa.u64 d1, d2, r1
    getctarank.shared::cluster.u32 r1, r2
    elect.sync r1|p1, 0xffffffff
    setmaxnreg.inc.sync.aligned.u32 232
    griddepcontrol.wait
    fence.proxy.async
    fence.mbarrier_init.release.cluster
    prefetch.tensormap [d1]
    mov.u32 r1, %cluster_ctaid.x
    red.async.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [r1], r2, [r3]
    tex.2d.v4.f32.s32 {f1, f2, f3, f4}, [d1, {r1, r2}]"""


@pytest.mark.parametrize("instruction", [line.strip() for line in REFUSED.split("\n")])
def test_an_unsupported_instruction_is_named_with_its_line(instruction):
    line = HEAD.count("\n") + 1 + DECL.count("\n") + 1 + 2  # the second of the kernel's instructions
    opcode = instruction.split()[0]
    with pytest.raises(UnsupportedInstruction, match=f"PTX line {line}: unsupported instruction '{re.escape(opcode)}'"):
        build(["mov.u32 r1, 0", instruction])


def test_a_kernel_of_clusters_is_refused():
    text = HEAD + ".visible .entry k() .explicitcluster .reqnctapercluster 2, 1, 1 { ret; }"
    with pytest.raises(UnsupportedInstruction, match="k: unsupported directive '.explicitcluster'"):
        Module.from_ptx(text)


@pytest.mark.slow
@pytest.mark.parametrize("group", FORMS)
def test_forms_compile(group):
    lines = [s.strip() for row in FORMS[group].split("\n") for s in re.split(r"\|(?=[a-z]\w+[. ])", row) if s.strip()]
    build([f"@p8 {s}" for s in lines]).compile("k")


def run(lines, out):
    """Run one thread; the lines leave their result in registers and store to [d0+...]."""
    m = build(["ld.param.u64 d0, [out]"] + lines)
    m.launch("k", 1, 1, [Out(out), bytes(16)])
    return out


def f32(x):
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


def test_min_max_nan_and_zero():
    o = run(
        [
            f"mov.f32 f1, {f32(float('nan'))}",
            f"mov.f32 f2, {f32(2)}",
            f"mov.f32 f3, {f32(-0.0)}",
            f"mov.f32 f4, {f32(0)}",
            "min.f32 f5, f1, f2",
            "st.global.f32 [d0], f5",
            "max.NaN.f32 f5, f1, f2",
            "st.global.f32 [d0+4], f5",
            "min.f32 f5, f4, f3",
            "st.global.f32 [d0+8], f5",
            "max.f32 f5, f3, f4",
            "st.global.f32 [d0+12], f5",
        ],
        np.zeros(4, np.float32),
    )
    assert o[0] == 2 and np.isnan(o[1]) and np.signbit(o[2]) and not np.signbit(o[3])


def test_ftz():
    o = run(
        [
            f"mov.f32 f1, {f32(1e-40)}",
            f"mov.f32 f2, {f32(1.0)}",
            "mul.ftz.f32 f3, f1, f2",
            "st.global.f32 [d0], f3",
            "mul.f32 f3, f1, f2",
            "st.global.f32 [d0+4], f3",
        ],
        np.zeros(2, np.float32),
    )
    assert o[0] == 0 and o[1] == np.float32(1e-40)


def test_wide_cvt():
    o = run(
        [
            "mov.u64 d1, 18446744073709551615",
            "cvt.rn.f32.u64 f1, d1",
            "st.global.f32 [d0], f1",
            "cvt.rz.f32.u64 f1, d1",
            "st.global.f32 [d0+4], f1",
            f"mov.f32 f2, {f32(-3.7)}",
            "cvt.rzi.u32.f32 r1, f2",
            "st.global.u32 [d0+8], r1",
            "cvt.rzi.s32.f32 r1, f2",
            "st.global.u32 [d0+12], r1",
        ],
        np.zeros(4, np.float32),
    )
    assert o[0] == 2.0**64 and o[1] == np.nextafter(np.float32(2.0**64), np.float32(0))
    assert list(o[2:].view(np.int32)) == [0, -3]


def test_fp8():
    """A large value saturates, and -1.3 becomes its nearest neighbour."""
    o = np.zeros(4, np.uint16)
    for enc, big in (("e4m3", 448.0), ("e5m2", 57344.0)):
        run(
            [
                f"mov.f32 f1, {f32(big * 4)}",
                f"mov.f32 f2, {f32(-1.3)}",
                f"cvt.rn.satfinite.{enc}x2.f32 h1, f1, f2",
                f"cvt.rn.f16x2.{enc}x2 r1, h1",
                "st.global.u32 [d0], r1",
                "st.global.u32 [d0+4], r1",
            ],
            o,
        )
        v = o.view(np.float16)
        assert v[1] == big and v[0] == -1.25


def test_carry():
    o = run(
        [
            "mov.u32 r1, 0xffffffff",
            "mov.u32 r2, 2",
            "add.cc.u32 r3, r1, r2",
            "addc.u32 r4, 5, 0",
            "sub.cc.u32 r5, 1, 2",
            "subc.u32 r6, 10, 0",
            "st.global.v4.u32 [d0], {r3, r4, r5, r6}",
        ],
        np.zeros(4, np.uint32),
    )
    assert list(o) == [1, 6, 0xFFFFFFFF, 9]
