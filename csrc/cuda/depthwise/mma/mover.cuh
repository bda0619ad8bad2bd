// What the tensor-core kernel asks of a loader, one class per Loader:
//   load(tile)                       starts to load a work tile into registers, if the loader works ahead
//   write_inputs(tile, elementwise)  brings the work tile, through the prologue, to shared memory
//   store_outputs(tile)              copies its outputs from shared memory to memory
// Each of them must be given the CTA's work tiles in order: readers and writers advance from one to the next.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/activation.cuh"
#include "loaders/aligned_rows.cuh"
#include "loaders/channels_last.cuh"
#include "loaders/tiles.cuh"
#include "loaders/unaligned_rows.cuh"
#include "work_tile.cuh"

namespace convmixer_fast::cuda {

// Calls f(apply), where apply(vector) is the prologue of a channel, or does nothing if there is none.
template <class Fast, class F>
__device__ __forceinline__ void with_prologue(const DepthwiseParams& params, const Fast* elementwise, const F& f) {
  if (params.has_prologue) {
    const Fast prologue = elementwise[0];
    f([prologue](auto& vector) { prologue.apply(vector); });
  } else {
    f([](auto&) {});
  }
}

// The same for an octet: f(prologue), where prologue(c) is the prologue of its channel c.
template <class Fast, class F>
__device__ __forceinline__ void with_octet_prologue(const DepthwiseParams& params, const Fast* elementwise,
                                                    const F& f) {
  if (params.has_prologue) {
    f([elementwise](int c) {
      const Fast prologue = elementwise[2 * c];
      return [prologue](auto& value) { prologue.apply(value); };
    });
  } else {
    f([](int) { return [](auto&) {}; });
  }
}

// What a loader of tiles brings of x, and takes to y.
__device__ __forceinline__ TileCopy copy_inputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
  const int rows = kSubtile * plan.shape.subtile_rows + static_cast<int>(params.kernel_h) - 1;
  const TileSpan halo = {-static_cast<int>(params.pad_top), -plan.left, rows, plan.x.maps.pitch};
  return TileCopy::inputs(params, plan.shape, tile.index, halo, params.x_stride, plan.x);
}
__device__ __forceinline__ TileCopy copy_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                 const WorkTile& tile) {
  return TileCopy::outputs(params, plan.shape, tile.index, params.y_stride, plan.y);
}

template <class Traits, Loader kLoader = Traits::kLoader>
class Mover;

// Reader and writer of contiguous rows. `lane`: which of them the thread moves.
template <class Reader, class Writer>
struct RowMover {
  template <class Lane>
  __device__ RowMover(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& first, const Lane& lane,
                      uint16_t* inputs, uint16_t* outputs)
      : reader(lane, first.in(static_cast<const uint16_t*>(params.x), params.x_stride, plan), params.x_stride,
               plan.x.maps, inputs),
        writer(lane, first.in(static_cast<uint16_t*>(params.y), params.y_stride, plan), params.y_stride, plan.y.maps,
               outputs) {}

  Reader reader;
  Writer writer;
};

template <class Traits>
class Mover<Traits, Loader::kAlignedRows> {
 public:
  using Fast = typename Traits::Fast;
  static constexpr bool kAhead = true;

  __device__ Mover(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& first, uint16_t* inputs,
                   uint16_t* outputs)
      : rows_(params, plan, first, AlignedRowsLane(params, plan.shape, plan.tiles_per_channel), inputs, outputs) {}

  __device__ __forceinline__ void load(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile) {
    rows_.reader.load(params.x_stride, tile.is_last(plan));
    rows_.reader.advance(plan.x.tiles, tile.is_last(plan));
  }
  __device__ __forceinline__ void write_inputs(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile&,
                                               const Fast* elementwise) {
    with_prologue(params, elementwise, [&](const auto& apply) { rows_.reader.write(Traits::in_pitch(plan), apply); });
  }
  __device__ __forceinline__ void store_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
    rows_.writer.store(params.y_stride, Traits::out_pitch(plan), tile.is_last(plan));
    rows_.writer.advance(plan.y.tiles, tile.is_last(plan));
  }

 private:
  RowMover<AlignedRowsReader<8, false>, AlignedRowsWriter> rows_;
};

template <class Traits>
class Mover<Traits, Loader::kUnalignedRows> {
 public:
  using Fast = typename Traits::Fast;
  static constexpr bool kAhead = true;

  __device__ Mover(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& first, uint16_t* inputs,
                   uint16_t* outputs)
      : rows_(params, plan, first,
              StepsLane::make<kUnalignedSteps>(params, plan.shape, plan.steps, plan.tiles_per_channel, threadIdx.x),
              inputs, outputs) {}

  __device__ __forceinline__ void load(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile) {
    rows_.reader.load(plan.x, static_cast<int>(params.width), plan.odd, tile.is_last(plan));
    rows_.reader.advance(plan.x.tiles, tile.is_last(plan));
  }
  __device__ __forceinline__ void write_inputs(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile&,
                                               const Fast* elementwise) {
    with_prologue(params, elementwise, [&](const auto& apply) {
      rows_.reader.write(plan.x, static_cast<int>(params.width), plan.odd, apply);
    });
  }
  __device__ __forceinline__ void store_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
    rows_.writer.store(plan.y, static_cast<int>(params.width), plan.odd, tile.is_last(plan));
    rows_.writer.advance(plan.y.tiles, tile.is_last(plan));
  }

 private:
  RowMover<UnalignedRowsReader<false>, UnalignedRowsWriter> rows_;
};

template <class Traits>
class Mover<Traits, Loader::kTiles> {
 public:
  using Fast = typename Traits::Fast;
  static constexpr bool kAhead = false;

  __device__ Mover(const DepthwiseParams&, const MmaPlan&, const WorkTile&, uint16_t* inputs, uint16_t* outputs)
      : inputs_(inputs), outputs_(outputs) {}

  __device__ __forceinline__ void write_inputs(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile,
                                               const Fast* elementwise) {
    const TileCopy copy = copy_inputs(params, plan, tile);
    const uint16_t* const x = tile.at(static_cast<const uint16_t*>(params.x), params.x_stride, copy.position);
    with_prologue(params, elementwise, [&](const auto& apply) {
      load_tile<8>(copy, plan.x.vector, x, copy.position.images, 32 * plan.warps, inputs_, apply);
    });
  }
  __device__ __forceinline__ void store_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
    const TileCopy copy = copy_outputs(params, plan, tile);
    uint16_t* const y = tile.at(static_cast<uint16_t*>(params.y), params.y_stride, copy.position);
    store_tile(copy, plan.y.vector, y, 32 * plan.warps, outputs_);
  }

 private:
  uint16_t* inputs_;
  const uint16_t* outputs_;
};

template <class Traits>
class Mover<Traits, Loader::kChannelsLast> {
 public:
  using Fast = typename Traits::Fast;
  static constexpr bool kAhead = true;

  __device__ Mover(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& first, uint16_t* inputs,
                   uint16_t* outputs)
      : lane_(params, plan),
        reader_(lane_, first.in(static_cast<const uint16_t*>(params.x), params.x_stride, plan), params.x_stride, plan.x,
                inputs),
        writer_(lane_, first.in(static_cast<uint16_t*>(params.y), params.y_stride, plan), params.y_stride, plan.y,
                outputs) {}

  __device__ __forceinline__ void load(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile) {
    const int pixel_stride = static_cast<int>(params.x_stride.w);
    if (has_octet(params, tile))
      with_pairs(plan, [&](auto pairs) {
        reader_.template load<decltype(pairs)::value>(lane_, plan.x.steps, pixel_stride, tile.is_last(plan));
      });
    reader_.advance(plan.x.tiles, tile.is_last(plan));
  }
  __device__ __forceinline__ void write_inputs(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile,
                                               const Fast* elementwise) {
    if (!has_octet(params, tile)) return;
    with_octet_prologue(params, elementwise, [&](const auto& prologue) {
      with_pairs(plan, [&](auto pairs) { reader_.template write<decltype(pairs)::value>(lane_, plan.x, prologue); });
    });
  }
  __device__ __forceinline__ void store_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
    const int pixel_stride = static_cast<int>(params.y_stride.w);
    if (has_octet(params, tile))
      with_pairs(plan, [&](auto pairs) {
        writer_.template store<decltype(pairs)::value>(lane_, plan.y, pixel_stride, tile.is_last(plan));
      });
    writer_.advance(plan.y.tiles, tile.is_last(plan));
  }

 private:
  // Calls f with the compile-time constant that says whether every pixel has its second one.
  template <class F>
  __device__ static __forceinline__ void with_pairs(const MmaPlan& plan, const F& f) {
    if (plan.odd) f(std::false_type{});
    else f(std::true_type{});
  }
  // The second of two siblings may have none at the end.
  __device__ static bool has_octet(const DepthwiseParams& params, const WorkTile& tile) {
    return tile.channel < static_cast<int>(params.channels);
  }

  ChannelsLastLane lane_;
  ChannelsLastReader reader_;
  ChannelsLastWriter writer_;
};

template <class Traits>
class Mover<Traits, Loader::kChannelsLastTiles> {
 public:
  using Fast = typename Traits::Fast;
  static constexpr bool kAhead = false;
  static constexpr int kThreads = 32 * kOctet;

  __device__ Mover(const DepthwiseParams&, const MmaPlan&, const WorkTile&, uint16_t* inputs, uint16_t* outputs)
      : inputs_(inputs), outputs_(outputs) {}

  __device__ __forceinline__ void write_inputs(const DepthwiseParams& params, const MmaPlan& plan, const WorkTile& tile,
                                               const Fast* elementwise) {
    const TileCopy copy = copy_inputs(params, plan, tile);
    const int channel = first_channel(plan);
    if (tile.channel + channel >= static_cast<int>(params.channels)) return;
    const uint16_t* const x = tile.at(static_cast<const uint16_t*>(params.x), params.x_stride, copy.position) + channel;
    if (plan.x.vector == kOctet)
      with_octet_prologue(params, elementwise, [&](const auto& apply) {
        load_tile_octets(copy, x, kThreads, inputs_, plan.x.channel_pitch, apply);
      });
    else
      with_prologue(params, elementwise + 2 * channel, [&](const auto& apply) {
        load_tile_channels(copy, x, kThreads, inputs_ + channel * plan.x.channel_pitch, apply);
      });
  }
  __device__ __forceinline__ void store_outputs(const DepthwiseParams& params, const MmaPlan& plan,
                                                const WorkTile& tile) {
    const TileCopy copy = copy_outputs(params, plan, tile);
    const int channel = first_channel(plan);
    if (tile.channel + channel >= static_cast<int>(params.channels)) return;
    uint16_t* const y = tile.at(static_cast<uint16_t*>(params.y), params.y_stride, copy.position) + channel;
    if (plan.y.vector == kOctet) store_tile_octets(copy, y, kThreads, outputs_, plan.y.channel_pitch);
    else store_tile_channels(copy, y, kThreads, outputs_ + channel * plan.y.channel_pitch);
  }

 private:
  // The thread's first channel in the work tile, or its only one.
  __device__ static int first_channel(const MmaPlan& plan) {
    return plan.x.vector == kOctet ? 0 : threadIdx.x % kOctet;
  }

  uint16_t* inputs_;
  const uint16_t* outputs_;
};

}  // namespace convmixer_fast::cuda
