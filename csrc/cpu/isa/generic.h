// Any CPU: 16-byte vectors (SSE2, NEON). Each translation unit of this instruction set includes this first.
#pragma once
#define CMF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define CMF_VECTOR_REGISTERS 32
#else
#define CMF_VECTOR_REGISTERS 16
#endif
#define CMF_HAS_AVX 0
#define CMF_HAS_F16C 0
#define CMF_HAS_FMA 0  // AArch64 has it, but no size that depends on it was measured there
#define CMF_HAS_AVX512 0
#define CMF_HAS_BF16_DOT 0
