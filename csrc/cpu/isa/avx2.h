// AVX2, FMA and F16C. For one file of kernels each: what the pragma brings, in macros of ours.
#pragma once
#pragma GCC target("avx2,fma,f16c")
#define CMF_VECTOR_BYTES 32
#define CMF_VECTOR_REGISTERS 16
#define CMF_F16C
