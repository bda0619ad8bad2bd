// Moves whatever the other loaders do not: tiles with their halo, maps that registers cannot hold, and in channels_last
// channels that are not octets (Loader::kTiles, Loader::kChannelsLastTiles). Nothing is loaded ahead of its work tile,
// but every thread has several loads in flight.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../../common/access_vector.cuh"
#include "../work_tile.cuh"
#include "channels_last.cuh"

namespace convmixer_fast::cuda {

constexpr int kTileBatch = 4;  // loads of 16 bytes that a thread has in flight; twice as many of 2 or 4 bytes

// What is moved of a work tile. Rows and columns are those of the map; they may lie outside it.
struct TileSpan {
  int row;
  int col;
  int rows;
  int cols;
};

// The copy of one work tile between a tensor and shared memory.
struct TileCopy {
  TilePosition position;
  TileSpan span;
  int height;      // the map's
  int width;       // the map's
  Strides stride;  // the tensor's
  StoredMaps maps;
  int threads_per_row;  // MapOperand::threads_per_row

  __device__ bool has_row(int row) const { return row >= 0 && row < height; }
  __device__ bool has_col(int col) const { return col >= 0 && col < width; }
  // Elements from the work tile's first image to an element in memory, and from the first stored map to it.
  __device__ int64_t at(int image, int row, int col) const {
    return image * stride.n + row * stride.h + col * stride.w;
  }
  __device__ int stored_at(int image, int row, int col) const {
    return maps.at(image, row - position.row, col - position.col);
  }

  // All that is stored: with the halo if a map has several tiles, else the map alone, whose border never changes.
  // halo: the stored part of a tile, from its first row and column on.
  template <class Params>
  __device__ static TileCopy inputs(const Params& params, const TileShape& shape, int index, const TileSpan& halo,
                                    const Strides& stride, const MapOperand& operand) {
    TileCopy copy = make(params, shape, index, stride, operand);
    if (shape.tiled) copy.span = {copy.position.row + halo.row, copy.position.col + halo.col, halo.rows, halo.cols};
    else copy.span = {0, 0, copy.height, copy.width};
    return copy;
  }
  template <class Params>
  __device__ static TileCopy outputs(const Params& params, const TileShape& shape, int index, const Strides& stride,
                                     const MapOperand& operand) {
    TileCopy copy = make(params, shape, index, stride, operand);
    copy.span = {copy.position.row, copy.position.col,
                 min(kSubtile * shape.subtile_rows, copy.height - copy.position.row),
                 min(kSubtile * shape.subtile_cols, copy.width - copy.position.col)};
    return copy;
  }

 private:
  template <class Params>
  __device__ static TileCopy make(const Params& params, const TileShape& shape, int index, const Strides& stride,
                                  const MapOperand& operand) {
    return {TilePosition(params, shape, index),
            {},
            static_cast<int>(params.height),
            static_cast<int>(params.width),
            stride,
            operand.maps,
            operand.threads_per_row};
  }
};

// The rows and columns of a span that one thread moves: threads_per_row of `threads` threads move a row, `access`
// columns each.
struct TileLane {
  int row;
  int row_step;
  int col;
  int col_step;

  __device__ TileLane(const TileSpan& span, int thread, int threads, int threads_per_row, int access)
      : row(span.row + thread / threads_per_row),
        row_step(threads / threads_per_row),
        col(span.col + thread % threads_per_row * access),
        col_step(threads_per_row * access) {}
};

// Loads contiguous rows, or one channel of pixels (kWidth 1), with zeros for what lies outside the map, and for images
// from the work tile's last up to stored_images. `tensor`: the first image. `thread`: number among the `threads` that
// share the work. prologue(vector) is applied to what lies inside.
template <int kWidth, int kStoredBytes, class Prologue>
__device__ __forceinline__ void load_tile_vectors(const TileCopy& copy, const uint16_t* tensor, int stored_images,
                                                  int thread, int threads, uint16_t* stored, const Prologue& prologue) {
  constexpr int kBatch = kWidth >= 4 ? kTileBatch : 2 * kTileBatch;
  const TileSpan& span = copy.span;
  const TileLane lane(span, thread, threads, copy.threads_per_row, kWidth);
  const int end = span.row + span.rows;
  for (int image = 0; image < stored_images; image++)
    for (int col = lane.col; col < span.col + span.cols; col += lane.col_step) {
      const bool has_col = image < copy.position.images && copy.has_col(col);
      for (int first = lane.row; first < end; first += kBatch * lane.row_step) {
        AccessVector<kWidth> vectors[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int row = first + i * lane.row_step;
          if (has_col && copy.has_row(row) && row < end)
            vectors[i] = load_global<kWidth>(tensor + copy.at(image, row, col));
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int row = first + i * lane.row_step;
          if (row >= end) break;
          if (has_col && copy.has_row(row)) prologue(vectors[i]);
          store_vector<kStoredBytes>(stored + copy.stored_at(image, row, col), vectors[i]);
        }
      }
    }
}

// The opposite way.
template <int kWidth>
__device__ __forceinline__ void store_tile_vectors(const TileCopy& copy, uint16_t* tensor, int thread, int threads,
                                                   const uint16_t* stored) {
  using Vector = AccessVector<kWidth>;
  const TileSpan& span = copy.span;
  const TileLane lane(span, thread, threads, copy.threads_per_row, kWidth);
  for (int image = 0; image < copy.position.images; image++)
    for (int col = lane.col; col < span.col + span.cols; col += lane.col_step)
      for (int row = lane.row; row < span.row + span.rows; row += lane.row_step)
        *reinterpret_cast<Vector*>(tensor + copy.at(image, row, col)) =
            *reinterpret_cast<const Vector*>(stored + copy.stored_at(image, row, col));
}

// Contiguous rows, by all threads. vector: MapOperand::vector.
template <int kStoredBytes, class Prologue>
__device__ __forceinline__ void load_tile(const TileCopy& copy, int vector, const uint16_t* tensor, int stored_images,
                                          int threads, uint16_t* stored, const Prologue& prologue) {
  with_vector_width(vector, [&](auto width) {
    load_tile_vectors<decltype(width)::value, kStoredBytes>(copy, tensor, stored_images, threadIdx.x, threads, stored,
                                                            prologue);
  });
}
__device__ __forceinline__ void store_tile(const TileCopy& copy, int vector, uint16_t* tensor, int threads,
                                           const uint16_t* stored) {
  with_vector_width(vector, [&](auto width) {
    store_tile_vectors<decltype(width)::value>(copy, tensor, threadIdx.x, threads, stored);
  });
}

// Channels that are not octets, in channels_last: eight threads move a pixel, each the channel of its number. `tensor`
// and `stored` are those of this channel.
template <class Prologue>
__device__ __forceinline__ void load_tile_channels(const TileCopy& copy, const uint16_t* tensor, int threads,
                                                   uint16_t* stored, const Prologue& prologue) {
  load_tile_vectors<1, 8>(copy, tensor, copy.position.images, threadIdx.x / kOctet, threads / kOctet, stored, prologue);
}
__device__ __forceinline__ void store_tile_channels(const TileCopy& copy, uint16_t* tensor, int threads,
                                                    const uint16_t* stored) {
  store_tile_vectors<1>(copy, tensor, threadIdx.x / kOctet, threads / kOctet, stored);
}

// Loads an octet of channels of two neighbouring pixels at a time. channel_pitch: elements from one channel to the next
// in shared memory. prologue(c) is the prologue of channel c, a function of a pair.
template <class Prologue>
__device__ __forceinline__ void load_tile_octets(const TileCopy& copy, const uint16_t* tensor, int threads,
                                                 uint16_t* stored, int channel_pitch, const Prologue& prologue) {
  constexpr int kBatch = kTileBatch / 2;
  const TileSpan& span = copy.span;
  const TileLane lane(span, threadIdx.x, threads, copy.threads_per_row, 2);
  for (int image = 0; image < copy.position.images; image++)
    for (int col = lane.col; col < span.col + span.cols; col += lane.col_step) {
      const bool has_col[2] = {copy.has_col(col), copy.has_col(col + 1)};
      const bool is_pair = col + 1 < span.col + span.cols;
      for (int first = lane.row; first < span.row + span.rows; first += kBatch * lane.row_step) {
        AccessVector<kOctet> octets[kBatch][2] = {};
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int row = first + i * lane.row_step;
          const bool has_row = copy.has_row(row) && row < span.row + span.rows;
#pragma unroll
          for (int pixel = 0; pixel < 2; pixel++)
            if (has_row && has_col[pixel])
              octets[i][pixel] = load_global<kOctet>(tensor + copy.at(image, row, col + pixel));
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int row = first + i * lane.row_step;
          if (row >= span.row + span.rows) continue;
          uint16_t* const to = stored + copy.stored_at(image, row, col);
#pragma unroll
          for (int c = 0; c < kOctet; c++) {
            AccessVector<2> pair = pick(octets[i][0], octets[i][1], c);
            prologue(c)(pair);
            if (!copy.has_row(row) || !has_col[0]) pair.values[0] = 0;
            if (!copy.has_row(row) || !has_col[1]) pair.values[1] = 0;
            if (is_pair) *reinterpret_cast<AccessVector<2>*>(to + c * channel_pitch) = pair;
            else to[c * channel_pitch] = pair.values[0];
          }
        }
      }
    }
}

// Stores octets of two neighbouring pixels at a time.
__device__ __forceinline__ void store_tile_octets(const TileCopy& copy, uint16_t* tensor, int threads,
                                                  const uint16_t* stored, int channel_pitch) {
  const TileSpan& span = copy.span;
  const TileLane lane(span, threadIdx.x, threads, copy.threads_per_row, 2);
  for (int image = 0; image < copy.position.images; image++)
    for (int row = lane.row; row < span.row + span.rows; row += lane.row_step)
      for (int col = lane.col; col < span.col + span.cols; col += lane.col_step) {
        AccessVector<kOctet> octets[2];
        load_octets(octets, shared_address(stored + copy.stored_at(image, row, col)), 2 * channel_pitch);
#pragma unroll
        for (int pixel = 0; pixel < 2; pixel++)
          if (col + pixel < span.col + span.cols)
            *reinterpret_cast<AccessVector<kOctet>*>(tensor + copy.at(image, row, col + pixel)) = octets[pixel];
      }
}

}  // namespace convmixer_fast::cuda
