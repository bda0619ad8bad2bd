// Functions for both sides, in headers that a C++ compiler reads, too.
#pragma once

#ifdef __CUDACC__
#define CMF_HOST_DEVICE __host__ __device__
#else
#define CMF_HOST_DEVICE
#endif
