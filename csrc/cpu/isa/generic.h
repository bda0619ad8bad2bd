// Any CPU: 16-byte vectors (SSE2, NEON). For one file of kernels each.
#pragma once
#define CMF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define CMF_VECTOR_REGISTERS 32
#else
#define CMF_VECTOR_REGISTERS 16
#endif
