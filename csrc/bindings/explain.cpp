// The choice of kernel and launch geometry (cuda/select.h) for convmixer_fast.explain and the kernel report, through
// ctypes. convmixer_fast/diagnostics.py mirrors the structs, and checks their sizes.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <string>

#include "../cuda/describe.h"
#include "../cuda/pool/plan.h"
#include "../cuda/select.h"

namespace convmixer_fast {
namespace {

struct DepthwiseQuery {  // tensors lie at addresses that are multiples of 16 bytes
  int64_t shape[4];      // (batch, channels, height, width)
  int64_t x_stride[4];   // in elements
  int64_t y_stride[4];   // in elements
  int64_t kernel[2];     // (rows, columns)
  DType dtype;
  Activation activation;
  bool prologue;
  bool residual;
  cuda::Device device;
};

struct Choice {
  int64_t work_tiles;       // work tiles that the CTAs share
  int64_t x_elements_read;  // elements of x that are read, including halo re-reads
  int32_t tensor_cores;     // 1 for the tensor-core kernel, 0 for the direct kernel
  int32_t maps_per_tile;    // maps, each of one image and channel, per work tile
  int32_t tile_h;           // output rows per map and work tile
  int32_t tile_w;           // output columns per map and work tile
  int32_t threads;          // threads per CTA
  int32_t smem_bytes;       // dynamic shared memory per CTA
  int32_t registers;        // registers per thread that the launch bounds allow; 0 if not told
  char name[128];           // the kernel in C++, without namespaces
  char reason[128];         // why it is the direct kernel; empty for the tensor-core kernel
};

// Whether the code that chooses can count with these values: all sizes at least 1, tensors and kernels whose tiles an
// int can number.
bool fits(const DepthwiseQuery& query) {
  constexpr int64_t kMaxElements = int64_t(1) << 39;
  const auto countable = [&](std::initializer_list<int64_t> sizes) {
    int64_t elements = 1;
    for (int64_t size : sizes)
      if (size < 1 || __builtin_mul_overflow(elements, size, &elements) || elements >= kMaxElements) return false;
    return true;
  };
  const auto within = [](int64_t value, int64_t most) { return 0 <= value && value <= most; };
  const auto& [n, c, h, w] = query.shape;
  const auto& [kernel_h, kernel_w] = query.kernel;
  bool strides_fit = true;
  for (const auto& strides : {query.x_stride, query.y_stride})
    for (int d = 0; d < 4; d++) strides_fit = strides_fit && within(strides[d], kMaxElements);
  return countable({n, c, h, w}) && countable({c, kernel_h, kernel_w}) &&
         std::max(kernel_h, kernel_w) <= kLargestKernel && strides_fit &&
         within(int64_t(query.dtype), int64_t(DType::kBFloat16)) &&
         within(int64_t(query.activation), int64_t(std::size(kActivationNames)) - 1);
}

DepthwiseParams params_of(const DepthwiseQuery& query) {
  const auto strides = [](const int64_t* s) { return Strides{s[0], s[1], s[2], s[3]}; };
  const void* const address = reinterpret_cast<const void*>(16);  // any address but null, never followed
  DepthwiseParams params{};
  params.batch = query.shape[0];
  params.channels = query.shape[1];
  params.height = query.shape[2];
  params.width = query.shape[3];
  params.x_stride = strides(query.x_stride);
  params.y_stride = strides(query.y_stride);
  params.kernel_h = query.kernel[0];
  params.kernel_w = query.kernel[1];
  params.pad_top = (params.kernel_h - 1) / 2;
  params.pad_left = (params.kernel_w - 1) / 2;
  params.dtype = query.dtype;
  params.has_prologue = query.prologue;
  params.residual = query.residual;
  params.prologue = {address, address, address, DType::kFloat32, query.activation};
  params.epilogue = params.prologue;
  return params;
}

// y's strides are gy's.
WgradParams wgrad_params_of(const DepthwiseQuery& query, void* address) {
  const DepthwiseParams forward = params_of(query);
  WgradParams params{};
  params.gweight = address;
  params.gbias = address;
  params.workspace = address;
  params.batch = forward.batch;
  params.channels = forward.channels;
  params.height = forward.height;
  params.width = forward.width;
  params.x_stride = forward.x_stride;
  params.gy_stride = forward.y_stride;
  params.kernel_h = forward.kernel_h;
  params.kernel_w = forward.kernel_w;
  params.pad_top = forward.pad_top;
  params.pad_left = forward.pad_left;
  params.dtype = forward.dtype;
  return params;
}

PoolParams pool_params_of(const DepthwiseQuery& query, void* y) {
  const DepthwiseParams forward = params_of(query);
  PoolParams params{};
  params.x = forward.prologue.bias;
  params.y = y;
  params.batch = forward.batch;
  params.channels = forward.channels;
  params.height = forward.height;
  params.width = forward.width;
  params.x_stride = forward.x_stride;
  params.dtype = forward.dtype;
  params.prologue = forward.prologue;
  return params;
}

// The sum over i < count of first + i * step, each clipped to [0, size]. Its terms fit 64 bits, their sum need not.
__int128 sum_clipped(int64_t first, int64_t step, int64_t count, int64_t size) {
  const auto terms_below = [&](int64_t value) {
    return std::clamp<int64_t>((value - first + step - 1) / step, 0, count);
  };
  const __int128 low = terms_below(0);
  const __int128 high = std::max<__int128>(low, terms_below(size));
  return (high - low) * first + step * (high * (high - 1) - low * (low - 1)) / 2 + size * (count - high);
}

// Along one dimension: elements that the tiles read, each with its halo clipped to the map.
int64_t read_along(int64_t size, int64_t tiles, int64_t tile, int64_t before, int64_t window) {
  return int64_t(sum_clipped(window - before, tile, tiles, size) - sum_clipped(-before, tile, tiles, size));
}

template <size_t kSize>
void copy_text(const std::string& text, char (&to)[kSize]) {
  const size_t length = std::min(text.size(), kSize - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

// What the plans of both tensor-core kernels have. channels: per work tile.
template <class Plan>
void fill_tile(const Plan& plan, int channels, Choice& choice) {
  choice.maps_per_tile = plan.shape.images * channels;
  choice.tile_h = plan.shape.subtile_rows * cuda::kSubtile;
  choice.tile_w = plan.shape.subtile_cols * cuda::kSubtile;
  choice.threads = 32 * plan.warps;
  choice.smem_bytes = plan.smem_bytes();
}

void fill(const DepthwiseParams& params, const cuda::MmaPlan& plan, Choice& choice) {
  choice.work_tiles = plan.work_tiles;
  fill_tile(plan, plan.channels, choice);
  int64_t read = params.height * params.width;
  if (plan.shape.tiled) {
    const int64_t rows = choice.tile_h + params.kernel_h - 1;
    read = read_along(params.height, plan.shape.tiles_h, choice.tile_h, params.pad_top, rows) *
           read_along(params.width, plan.shape.tiles_w, choice.tile_w, plan.left, plan.x.maps.pitch);
  }
  choice.x_elements_read = params.batch * params.channels * read;
}

// False if 64 bits cannot hold the number of elements that are read: a map is read once for each tap block.
bool fill(const DepthwiseParams& params, const cuda::DirectPlan& plan, Choice& choice) {
  choice.work_tiles = plan.work_tiles();
  choice.maps_per_tile = plan.slots;
  choice.tile_h = plan.height;
  choice.tile_w = plan.width;
  choice.threads = plan.threads;
  choice.smem_bytes = plan.smem_bytes(cuda::bytes_of(params.dtype), cuda::arithmetic_bytes_of(params.dtype));
  int64_t rows = 0;
  for (int tap = 0; tap < plan.taps_h; tap += plan.tap_rows)
    rows +=
        read_along(params.height, plan.tiles_h, plan.height, params.pad_top - plan.first_tap_row - tap, plan.in_rows);
  int64_t cols = 0;
  for (int tap = 0; tap < plan.taps_w; tap += plan.tap_cols)
    cols +=
        read_along(params.width, plan.tiles_w, plan.width, params.pad_left - plan.first_tap_col - tap, plan.in_cols);
  choice.x_elements_read = params.batch * params.channels;
  return !__builtin_mul_overflow(choice.x_elements_read, rows, &choice.x_elements_read) &&
         !__builtin_mul_overflow(choice.x_elements_read, cols, &choice.x_elements_read);
}

// The selected kernel; false if the query does not fit.
bool answer(const DepthwiseQuery& query, cuda::DepthwiseChoice& selected, Choice& choice) {
  if (!fits(query)) return false;
  const DepthwiseParams params = params_of(query);
  selected = cuda::select(params, query.device);
  choice.tensor_cores = selected.tensor_cores;
  choice.registers = selected.bounds.registers();
  copy_text(cuda::kernel_name(params, selected), choice.name);
  copy_text(cuda::describe(selected.obstacle, params, query.device, cuda::kDepthwiseLimits), choice.reason);
  if (!selected.tensor_cores) return fill(params, selected.direct, choice);
  fill(params, selected.mma, choice);
  return true;
}

// A kernel's two parameters as they lie in its constant memory. Returns their size; 0 if the capacity does not suffice.
template <class Params, class Plan>
int copy_arguments(const Params& params, const Plan& plan, unsigned char* bytes, int capacity) {
  static_assert(sizeof(Params) % alignof(Plan) == 0, "no gap between the two");
  constexpr int kSize = sizeof(Params) + sizeof(Plan);
  if (capacity < kSize) return 0;
  std::memcpy(bytes, &params, sizeof(params));
  std::memcpy(bytes + sizeof(params), &plan, sizeof(plan));
  return kSize;
}

}  // namespace
}  // namespace convmixer_fast

#define CMF_EXPORT extern "C" __attribute__((visibility("default")))

using convmixer_fast::Choice;
using convmixer_fast::DepthwiseQuery;

CMF_EXPORT int convmixer_fast_query_bytes() { return sizeof(DepthwiseQuery); }
CMF_EXPORT int convmixer_fast_choice_bytes() { return sizeof(Choice); }

// Which kernel runs; returns 0 if the query does not fit.
CMF_EXPORT int convmixer_fast_select(const DepthwiseQuery* query, Choice* choice) {
  convmixer_fast::cuda::DepthwiseChoice selected;
  return convmixer_fast::answer(*query, selected, *choice);
}

// The tensor-core kernel's parameters as they lie in its constant memory. Returns their size; 0 if it is the direct
// kernel, the query does not fit or the capacity does not suffice.
CMF_EXPORT int convmixer_fast_mma_arguments(const DepthwiseQuery* query, Choice* choice, unsigned char* bytes,
                                            int capacity) {
  using namespace convmixer_fast;
  cuda::DepthwiseChoice selected;
  if (!answer(*query, selected, *choice) || !selected.tensor_cores) return 0;
  return copy_arguments(params_of(*query), selected.mma, bytes, capacity);
}

// The same for the direct kernel, as on a GPU whose tensor cores are not used.
CMF_EXPORT int convmixer_fast_direct_arguments(const DepthwiseQuery* query, Choice* choice, unsigned char* bytes,
                                               int capacity) {
  using namespace convmixer_fast;
  DepthwiseQuery old_gpu = *query;
  old_gpu.device.major = cuda::kMmaMajor - 1;
  cuda::DepthwiseChoice selected;
  if (!answer(old_gpu, selected, *choice)) return 0;
  return copy_arguments(params_of(old_gpu), selected.direct, bytes, capacity);
}

// The same for the tensor-core kernel of the weight's gradient, as one CTA that does all the work.
CMF_EXPORT int convmixer_fast_wgrad_arguments(const DepthwiseQuery* query, Choice* choice, unsigned char* bytes,
                                              int capacity) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const WgradParams params = wgrad_params_of(*query, bytes);
  cuda::Device one_cta = query->device;
  one_cta.sms = 1;
  one_cta.sm_smem = 0;
  cuda::WgradMmaPlan plan;
  const cuda::Obstacle obstacle = cuda::plan_tensor_cores(params, one_cta, plan);
  copy_text(cuda::describe(obstacle, params, one_cta, cuda::kWgradLimits), choice->reason);
  // Otherwise select() would plan the direct kernel, whose ints overflow for the largest kernels that fits() allows.
  if (obstacle != cuda::Obstacle::kNone) return 0;
  const cuda::WgradShare share = cuda::select(params, one_cta).share;
  constexpr int kPlan = sizeof(params);
  constexpr int kShare = int(round_up(kPlan + sizeof(plan), alignof(cuda::WgradShare)));
  constexpr int kSize = kShare + sizeof(share);
  static_assert(kPlan % alignof(cuda::WgradMmaPlan) == 0, "no gap before the plan");
  if (capacity < kSize) return 0;
  choice->tensor_cores = 1;
  choice->work_tiles = share.work_tiles;
  choice->x_elements_read = params.batch * params.channels * params.height * params.width;
  fill_tile(plan, 1, *choice);
  copy_text(cuda::kernel_name(params, plan), choice->name);
  std::memcpy(bytes, &params, kPlan);
  std::memcpy(bytes + kPlan, &plan, sizeof(plan));
  std::memcpy(bytes + kShare, &share, sizeof(share));
  return kSize;
}

// The same for the pooling kernel, whose CTAs share its work tiles, however many CTAs there are.
CMF_EXPORT int convmixer_fast_pool_arguments(const DepthwiseQuery* query, Choice* choice, unsigned char* bytes,
                                             int capacity) {
  using namespace convmixer_fast;
  if (!fits(*query)) return 0;
  const PoolParams params = pool_params_of(*query, bytes);
  const cuda::PoolPlan plan = cuda::choose_pool_plan(params);
  const cuda::PoolShape shape = cuda::pool_shape(plan.access, plan.small_maps);
  choice->work_tiles = params.batch * plan.channel_blocks;
  choice->x_elements_read = params.batch * params.channels * params.height * params.width;
  choice->maps_per_tile = shape.maps();
  choice->tile_h = static_cast<int>(params.height);
  choice->tile_w = static_cast<int>(params.width);
  choice->threads = shape.threads;
  copy_text(cuda::kernel_name(params, plan), choice->name);
  return copy_arguments(params, plan, bytes, capacity);
}
