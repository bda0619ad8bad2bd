// AVX-512 F, BW, DQ and VL. For one file of kernels each: what the pragma brings, in macros of ours.
#pragma once
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define CMF_VECTOR_BYTES 64
#define CMF_VECTOR_REGISTERS 32
#define CMF_F16C
