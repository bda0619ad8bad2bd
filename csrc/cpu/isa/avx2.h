// AVX2, FMA and F16C. Each translation unit of this instruction set includes this first.
#pragma once
#pragma GCC target("avx2,fma,f16c")
#define CMF_VECTOR_BYTES 32
#define CMF_VECTOR_REGISTERS 16
#define CMF_HAS_AVX 1
#define CMF_HAS_F16C 1
#define CMF_HAS_FMA 1
#define CMF_HAS_AVX512 0
#define CMF_HAS_BF16_DOT 0
