// Moves whole maps whose rows are vectors of 8 elements, each on a 16-byte address (Loader::kAlignedRows).
//
// Two threads share a subtile: one moves its even rows, the other its odd rows, four vectors each. Neighbouring threads
// have neighbouring columns, then the other row of the pair, then the next subtile row. So if a map is 32 wide, eight
// threads read and write whole lines of memory, and sixteen write to shared memory with conflicts of two ways. There a
// vector is written in halves, which fill every other 8 bytes, so it cannot be less; rows 8 apart, with one gap between
// them, are 64 bytes apart modulo 128.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../../common/access_vector.cuh"
#include "../loader.h"

namespace convmixer_fast::cuda {

// What one thread moves, in a work tile of all images and in the channel's last one, which may have fewer.
struct AlignedRowsLane {
  int image;
  int row;           // the first of its rows
  int col;           // the first of its columns
  int rows;          // how many rows it has, two apart
  int rows_in_last;  // in the channel's last work tile

  template <class Params>
  __device__ AlignedRowsLane(const Params& params, const TileShape& shape, int tiles_per_channel) {
    const int thread = threadIdx.x;
    const int rest = thread / shape.subtile_cols / 2;
    image = rest / shape.subtile_rows;
    row = rest % shape.subtile_rows * kSubtile + thread / shape.subtile_cols % 2;
    col = thread % shape.subtile_cols * kSubtile;
    const int rows_below = (static_cast<int>(params.height) - row + 1) / 2;
    const int rows_of_map = max(0, min(kAlignedVectors, rows_below));
    const int images_in_last = shape.images_in_last(static_cast<int>(params.batch), tiles_per_channel);
    rows = image < shape.images ? rows_of_map : 0;
    rows_in_last = image < images_in_last ? rows : 0;
  }
};

// From memory through registers to shared memory. kStoredBytes: the alignment there, 8 behind a border of 4 columns and
// 16 without one. kZeroMissing: whether images that the channel's last work tile lacks become zeros; else they keep
// what they had.
template <int kStoredBytes, bool kZeroMissing>
class AlignedRowsReader {
 public:
  // `tensor`: the first image and channel of the CTA's first work tile. `stored`: its maps in shared memory.
  __device__ AlignedRowsReader(const AlignedRowsLane& lane, const uint16_t* tensor, const Strides& stride,
                               const StoredMaps& maps, uint16_t* stored)
      : from_(tensor + lane.image * stride.n + lane.row * stride.h + lane.col),
        to_(stored + maps.at(lane.image, lane.row, lane.col)),
        rows_(lane.rows),
        rows_in_last_(lane.rows_in_last) {}

  // Loads the work tile at which the reader stands. is_last: it is the channel's last.
  __device__ __forceinline__ void load(const Strides& stride, bool is_last) {
    const int rows = is_last ? rows_in_last_ : rows_;
    const int distance = 2 * static_cast<int>(stride.h);
#pragma unroll
    for (int i = 0; i < kAlignedVectors; i++) {
      if constexpr (kZeroMissing) vectors_[i] = {};
      if (i < rows) vectors_[i] = load_global<kSubtile>(from_ + i * distance);
    }
  }
  // Goes on to the CTA's next work tile.
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { from_ += tiles.after(is_last); }

  // Writes what was loaded. `pitch`: that of the stored rows. prologue(vector) is applied before.
  template <class Prologue>
  __device__ __forceinline__ void write(int pitch, const Prologue& prologue) {
#pragma unroll
    for (int i = 0; i < kAlignedVectors; i++) {
      prologue(vectors_[i]);
      if (i < rows_) store_vector<kStoredBytes>(to_ + i * 2 * pitch, vectors_[i]);
    }
  }

 private:
  const uint16_t* from_;  // this thread's first vector in memory
  uint16_t* to_;          // and in shared memory
  int rows_;
  int rows_in_last_;
  AccessVector<kSubtile> vectors_[kAlignedVectors];
};

// From shared memory to memory. The functions are the reader's.
class AlignedRowsWriter {
 public:
  __device__ AlignedRowsWriter(const AlignedRowsLane& lane, uint16_t* tensor, const Strides& stride,
                               const StoredMaps& maps, const uint16_t* stored)
      : to_(tensor + lane.image * stride.n + lane.row * stride.h + lane.col),
        from_(stored + maps.at(lane.image, lane.row, lane.col)),
        rows_(lane.rows),
        rows_in_last_(lane.rows_in_last) {}

  __device__ __forceinline__ void store(const Strides& stride, int pitch, bool is_last) {
    const int rows = is_last ? rows_in_last_ : rows_;
    const int distance = 2 * static_cast<int>(stride.h);
#pragma unroll
    for (int i = 0; i < kAlignedVectors; i++)
      if (i < rows)
        *reinterpret_cast<AccessVector<kSubtile>*>(to_ + i * distance) =
            *reinterpret_cast<const AccessVector<kSubtile>*>(from_ + i * 2 * pitch);
  }
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { to_ += tiles.after(is_last); }

 private:
  uint16_t* to_;
  const uint16_t* from_;
  int rows_;
  int rows_in_last_;
};

}  // namespace convmixer_fast::cuda
