// The choice of kernel and tile, for convmixer_fast.explain and the kernel report, through ctypes; explain.py mirrors
// the structs.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "../cuda/depthwise/direct/plan.h"
#include "../cuda/depthwise/mma/plan.h"
#include "../cuda/wgrad/plan.h"

namespace convmixer_fast {
namespace {

struct DepthwiseQuery {  // tensors at 16-byte aligned addresses
  int64_t shape[4], x_stride[4], y_stride[4], kernel[2];
  DType dtype;
  Activation activation;
  bool prologue, residual;
  int32_t device_smem;  // bytes that a block may have
};

struct Choice {
  int64_t items, read_elements;    // pieces of work that blocks share out; of x, with the halo of tiles
  int32_t planes, tile_h, tile_w;  // of one item: maps of one image and channel, outputs of each
  int32_t unrolled, k_steps;       // template arguments: kernel rows (tensor cores) or tap columns (direct); mma depths
  int32_t threads, smem_bytes;     // of a block
};

// Whether the code that chooses can count with these values: all sizes at least 1, tensors and kernels that an int can
// number the tiles of.
bool fits(const DepthwiseQuery& query) {
  constexpr int64_t kMostElements = int64_t(1) << 39;
  const auto countable = [&](std::initializer_list<int64_t> sizes) {
    int64_t elements = 1;
    for (int64_t size : sizes)
      if (size < 1 || __builtin_mul_overflow(elements, size, &elements) || elements >= kMostElements) return false;
    return true;
  };
  const auto within = [](int64_t value, int64_t most) { return 0 <= value && value <= most; };
  const auto& [n, c, h, w] = query.shape;
  const auto& [kernel_h, kernel_w] = query.kernel;
  bool strides_fit = true;
  for (const auto& strides : {query.x_stride, query.y_stride})
    for (int d = 0; d < 4; d++) strides_fit = strides_fit && within(strides[d], kMostElements);
  return countable({n, c, h, w}) && countable({c, kernel_h, kernel_w}) &&
         std::max(kernel_h, kernel_w) <= kLargestKernel && strides_fit &&
         within(int64_t(query.dtype), int64_t(DType::kBFloat16)) &&
         within(int64_t(query.activation), int64_t(Activation::kRelu));
}

DepthwiseParams params_of(const DepthwiseQuery& query) {
  const auto strides = [](const int64_t* s) { return Strides{s[0], s[1], s[2], s[3]}; };
  const void* const vector = reinterpret_cast<const void*>(16);  // any address but null, never followed
  const PointwiseParams pointwise{vector, vector, vector, DType::kFloat32, query.activation};
  DepthwiseParams params{};
  params.batch = query.shape[0], params.channels = query.shape[1];
  params.height = query.shape[2], params.width = query.shape[3];
  params.x_stride = strides(query.x_stride), params.y_stride = strides(query.y_stride);
  params.kernel_h = query.kernel[0], params.kernel_w = query.kernel[1];
  params.pad_top = (params.kernel_h - 1) / 2, params.pad_left = (params.kernel_w - 1) / 2;
  params.dtype = query.dtype, params.has_prologue = query.prologue, params.residual = query.residual;
  params.epilogue = params.prologue = pointwise;
  return params;
}

// The sum over i < count of first + i * step, each clipped to [0, size]. Its terms fit 64 bits, their sum need not.
__int128 sum_clipped(int64_t first, int64_t step, int64_t count, int64_t size) {
  const auto terms_below = [&](int64_t value) {
    return std::clamp<int64_t>((value - first + step - 1) / step, 0, count);
  };
  const __int128 low = terms_below(0), high = std::max<__int128>(low, terms_below(size));
  return (high - low) * first + step * (high * (high - 1) - low * (low - 1)) / 2 + size * (count - high);
}

// Along one dimension: elements that the tiles read, each with its halo clipped to the map.
int64_t read_along(int64_t size, int64_t tiles, int64_t tile, int64_t before, int64_t window) {
  return int64_t(sum_clipped(window - before, tile, tiles, size) - sum_clipped(-before, tile, tiles, size));
}

}  // namespace
}  // namespace convmixer_fast

using convmixer_fast::Choice;
using convmixer_fast::DepthwiseQuery;

// What the tensor-core kernel would do; 0 where it does not apply or the query does not fit.
extern "C" __attribute__((visibility("default"))) int convmixer_fast_choose_mma(const DepthwiseQuery* query,
                                                                                Choice* choice) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const DepthwiseParams params = params_of(*query);
  cuda::MmaPlan plan;
  if (!cuda::choose_mma_plan(params, query->device_smem, plan)) return 0;
  const int tile_h = plan.subtile_rows * cuda::kSubtile, tile_w = plan.subtile_cols * cuda::kSubtile;
  int64_t read = params.height * params.width;
  if (plan.tiled)
    read = read_along(params.height, plan.tiles_h, tile_h, params.pad_top, tile_h + params.kernel_h - 1) *
           read_along(params.width, plan.tiles_w, tile_w, plan.left, plan.pitch);
  *choice = {plan.work_tiles,
             params.batch * params.channels * read,
             plan.images * plan.channels,
             tile_h,
             tile_w,
             cuda::unrolled_rows(params, plan),
             plan.k_steps,
             32 * plan.warps,
             plan.smem_bytes()};
  return 1;
}

// What the direct kernel would do; 0 where the query does not fit.
extern "C" __attribute__((visibility("default"))) int convmixer_fast_choose_direct(const DepthwiseQuery* query,
                                                                                   Choice* choice) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const DepthwiseParams params = params_of(*query);
  const cuda::DirectPlan plan = cuda::choose_direct_plan(params);
  int64_t rows = 0, cols = 0;  // read of one map: once for each block of taps
  for (int tap = 0; tap < plan.taps_h; tap += plan.tap_rows)
    rows +=
        read_along(params.height, plan.tiles_h, plan.height, params.pad_top - plan.first_tap_row - tap, plan.in_rows);
  for (int tap = 0; tap < plan.taps_w; tap += plan.tap_cols)
    cols +=
        read_along(params.width, plan.tiles_w, plan.width, params.pad_left - plan.first_tap_col - tap, plan.in_cols);
  int64_t read = params.batch * params.channels;
  if (__builtin_mul_overflow(read, rows, &read) || __builtin_mul_overflow(read, cols, &read)) return 0;
  const int element = cuda::bytes_of(params.dtype), real = cuda::arithmetic_bytes_of(params.dtype);
  *choice = {plan.work_tiles(),
             read,
             plan.slots,
             plan.height,
             plan.width,
             cuda::direct_exact_taps(params),
             0,
             plan.threads,
             plan.smem_bytes(element, real)};
  return 1;
}

// The parameters of that kernel as they lie in its constant memory; returns their size, 0 where it does not apply or
// the capacity does not suffice.
extern "C" __attribute__((visibility("default"))) int convmixer_fast_mma_arguments(const DepthwiseQuery* query,
                                                                                   unsigned char* bytes, int capacity) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const DepthwiseParams params = params_of(*query);
  cuda::MmaPlan plan;
  constexpr int kSize = sizeof(params) + sizeof(plan);
  static_assert(sizeof(params) % alignof(cuda::MmaPlan) == 0, "no gap between the two");
  if (!cuda::choose_mma_plan(params, query->device_smem, plan) || capacity < kSize) return 0;
  std::memcpy(bytes, &params, sizeof(params));
  std::memcpy(bytes + sizeof(params), &plan, sizeof(plan));
  return kSize;
}

// The tensor-core kernel of the weight's gradient, as one block that does all the work: its launch, and its parameters
// as they lie in its constant memory, of which the size is returned; 0 where it does not apply or the capacity does not
// suffice. y's strides are gy's.
extern "C" __attribute__((visibility("default"))) int convmixer_fast_wgrad_arguments(const DepthwiseQuery* query,
                                                                                     Choice* choice,
                                                                                     unsigned char* bytes,
                                                                                     int capacity) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const DepthwiseParams forward = params_of(*query);
  WgradParams params{};
  params.gweight = params.gbias = params.workspace = bytes;  // any address but null, never followed
  params.batch = forward.batch, params.channels = forward.channels;
  params.height = forward.height, params.width = forward.width;
  params.x_stride = forward.x_stride, params.gy_stride = forward.y_stride;
  params.kernel_h = forward.kernel_h, params.kernel_w = forward.kernel_w;
  params.pad_top = forward.pad_top, params.pad_left = forward.pad_left;
  params.dtype = forward.dtype;
  cuda::WgradMmaPlan chosen;
  if (!cuda::choose_wgrad_mma_plan(params, chosen)) return 0;  // rather than plan for the direct kernel
  const cuda::WgradPlan plan = cuda::plan_wgrad(params, {8, 1, query->device_smem, 0});
  const cuda::WgradMmaPlan& tile = plan.mma;
  constexpr int kTile = sizeof(params), kAlign = alignof(cuda::WgradShare);
  constexpr int kShare = (kTile + sizeof(tile) + kAlign - 1) / kAlign * kAlign, kSize = kShare + sizeof(plan.share);
  static_assert(kTile % alignof(cuda::WgradMmaPlan) == 0, "no gap before the tile");
  if (capacity < kSize) return 0;
  *choice = {plan.share.work_tiles,
             params.batch * params.channels * params.height * params.width,
             tile.shape.images,
             tile.shape.subtile_rows * cuda::kSubtile,
             tile.shape.subtile_cols * cuda::kSubtile,
             tile.taps.fixed ? tile.taps.tap_rows : 0,
             tile.taps.k_steps,
             32 * tile.warps,
             plan.smem_bytes};
  std::memcpy(bytes, &params, kTile);
  std::memcpy(bytes + kTile, &tile, sizeof(tile));
  std::memcpy(bytes + kShare, &plan.share, sizeof(plan.share));
  return kSize;
}
