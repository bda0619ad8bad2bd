// CMF_HOST_DEVICE marks functions that host and device call, in headers that a C++ compiler reads as well.
//
// Terms: docs/glossary.md.
#pragma once

#ifdef __CUDACC__
#define CMF_HOST_DEVICE __host__ __device__
#else
#define CMF_HOST_DEVICE
#endif
