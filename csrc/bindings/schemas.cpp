// The schemas of all operators; the other files of this folder register implementations.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(convmixer_fast, m) {
  m.def("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("depthwise_conv2d_dgrad(Tensor gy, Tensor weight) -> Tensor");
  m.def("depthwise_conv2d_wgrad(Tensor x, Tensor gy, SymInt kernel_h, SymInt kernel_w, bool bias) -> (Tensor, Tensor)");
  m.def(
      "fused_depthwise(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int activation, "
      "bool residual, Tensor? prologue_bias, Tensor? prologue_scale, Tensor? prologue_shift) -> Tensor");
  m.def(
      "fused_depthwise.out(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int activation, "
      "bool residual, Tensor? prologue_bias, Tensor? prologue_scale, Tensor? prologue_shift, *, Tensor(a!) out) -> ()");
  m.def("activate_pool(Tensor x, Tensor bias, Tensor scale, Tensor shift, int activation) -> Tensor");
  m.def(
      "activate_pool.out(Tensor x, Tensor bias, Tensor scale, Tensor shift, int activation, *, Tensor(a!) out) -> ()");
  m.def(
      "mixer_pack(Tensor patch, Tensor depthwise, Tensor pointwise, Tensor vectors, Tensor head_weight, "
      "Tensor head_bias) -> Tensor");
  m.def("mixer_workspace_bytes(Tensor x, Tensor patch, Tensor depthwise, Tensor head_weight) -> int");
  m.def("mixer_workspace(Tensor packed, int bytes) -> Tensor");
  m.def(
      "mixer(Tensor x, Tensor patch, Tensor depthwise, Tensor head_weight, Tensor packed, Tensor(a!) workspace, "
      "int activation, bool residual, Tensor(b!)? seconds) -> Tensor");
}
