// What the choice of a kernel and of its grid depends on.
//
// Terms: docs/glossary.md.
#pragma once

namespace convmixer_fast::cuda {

constexpr int kSystemSmem = 1024;  // bytes of shared memory that the system takes per CTA

struct Device {
  int major;     // compute capability: 9 for sm_90
  int sms;       // streaming multiprocessors
  int cta_smem;  // bytes of dynamic shared memory that a CTA may have
  int sm_smem;   // bytes of shared memory that an SM has
};

}  // namespace convmixer_fast::cuda
