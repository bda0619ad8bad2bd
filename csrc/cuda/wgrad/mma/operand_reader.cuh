// What the kernel of the weight's gradient asks of a loader, for each of its two tensors:
//   load(tile)   starts to load a work tile into registers, if the loader works ahead
//   write(tile)  brings the work tile to shared memory; images beyond the last become zeros
// Both must be given the CTA's work tiles in order.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../depthwise/mma/loaders/aligned_rows.cuh"
#include "../../depthwise/mma/loaders/tiles.cuh"
#include "../../depthwise/mma/loaders/unaligned_rows.cuh"
#include "../../depthwise/mma/work_tile.cuh"
#include "plan.h"

namespace convmixer_fast::cuda {

// Stands in for a prologue: wgrad has none.
struct NoPrologue {
  template <class Vector>
  __device__ __forceinline__ void operator()(Vector&) const {}
};

// kStoredBytes: the alignment of vectors in shared memory.
template <Loader kLoader, int kStoredBytes>
class WgradOperandReader;

template <int kStoredBytes>
class WgradOperandReader<Loader::kAlignedRows, kStoredBytes> {
 public:
  static constexpr bool kAhead = true;

  // `tile`: the first of the CTA.
  __device__ WgradOperandReader(const WgradParams& params, const WgradMmaPlan& plan, const void* tensor,
                                const Strides& stride, const WgradOperand& operand, const WorkTile& tile,
                                uint16_t* stored)
      : reader_(AlignedRowsLane(params, plan.shape, plan.tiles_per_channel),
                tile.in(static_cast<const uint16_t*>(tensor), stride, plan), stride, operand.map.maps, stored) {}

  __device__ __forceinline__ void load(const WgradParams&, const WgradMmaPlan& plan, const Strides& stride,
                                       const WgradOperand& operand, const WorkTile& tile) {
    reader_.load(stride, tile.is_last(plan));
    reader_.advance(operand.map.tiles, tile.is_last(plan));
  }
  __device__ __forceinline__ void write(const WgradParams&, const WgradMmaPlan&, const Strides&, const WgradOperand&,
                                        int pitch, const WorkTile&) {
    reader_.write(pitch, NoPrologue{});
  }

 private:
  AlignedRowsReader<kStoredBytes, true> reader_;
};

template <int kStoredBytes>
class WgradOperandReader<Loader::kUnalignedRows, kStoredBytes> {
 public:
  static constexpr bool kAhead = true;

  __device__ WgradOperandReader(const WgradParams& params, const WgradMmaPlan& plan, const void* tensor,
                                const Strides& stride, const WgradOperand& operand, const WorkTile& tile,
                                uint16_t* stored)
      : reader_(StepsLane::make<kUnalignedSteps>(params, plan.shape, plan.steps, plan.tiles_per_channel, threadIdx.x),
                tile.in(static_cast<const uint16_t*>(tensor), stride, plan), stride, operand.map.maps, stored) {}

  __device__ __forceinline__ void load(const WgradParams& params, const WgradMmaPlan& plan, const Strides&,
                                       const WgradOperand& operand, const WorkTile& tile) {
    reader_.load(operand.map, static_cast<int>(params.width), plan.odd, tile.is_last(plan));
    reader_.advance(operand.map.tiles, tile.is_last(plan));
  }
  __device__ __forceinline__ void write(const WgradParams& params, const WgradMmaPlan& plan, const Strides&,
                                        const WgradOperand& operand, int, const WorkTile&) {
    reader_.write(operand.map, static_cast<int>(params.width), plan.odd, NoPrologue{});
  }

 private:
  UnalignedRowsReader<true> reader_;
};

template <int kStoredBytes>
class WgradOperandReader<Loader::kTiles, kStoredBytes> {
 public:
  static constexpr bool kAhead = false;

  __device__ WgradOperandReader(const WgradParams&, const WgradMmaPlan&, const void* tensor, const Strides&,
                                const WgradOperand&, const WorkTile&, uint16_t* stored)
      : tensor_(static_cast<const uint16_t*>(tensor)), stored_(stored) {}

  __device__ __forceinline__ void write(const WgradParams& params, const WgradMmaPlan& plan, const Strides& stride,
                                        const WgradOperand& operand, int, const WorkTile& tile) {
    const TileSpan halo = {-operand.top, -operand.left, operand.rows, operand.map.maps.pitch};
    const TileCopy copy = TileCopy::inputs(params, plan.shape, tile.index, halo, stride, operand.map);
    load_tile<kStoredBytes>(copy, operand.map.vector, tile.at(tensor_, stride, copy.position), plan.shape.images,
                            32 * plan.warps, stored_, NoPrologue{});
  }

 private:
  const uint16_t* tensor_;
  uint16_t* stored_;
};

}  // namespace convmixer_fast::cuda
