// AVX-512 F, BW, DQ, VL and BF16. Each translation unit of this instruction set includes this first.
#pragma once
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define CMF_VECTOR_BYTES 64
#define CMF_VECTOR_REGISTERS 32
#define CMF_HAS_AVX 1
#define CMF_HAS_F16C 1
#define CMF_HAS_FMA 1
#define CMF_HAS_AVX512 1
#define CMF_HAS_BF16_DOT 1
