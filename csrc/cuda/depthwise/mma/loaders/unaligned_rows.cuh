// Moves whole maps with rows of any width at any address (Loader::kUnalignedRows), a word of two elements at a time.
//
// Neighbouring threads move neighbouring words of a row, so that a warp reads and writes memory from end to end. The
// steps of a thread are spread over rows and images so that their distances are few constants of the launch (loader.h).
//
// If rows are odd (their width, address or distance is), the words that memory is aligned to need not be those of
// shared memory, whose columns start at an even address: a word has columns c and c + 1 with c odd in some rows. Then
// its elements are stored one by one, and at the ends of a row one of the two belongs to something else, which is
// neither read nor written.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../../common/access_vector.cuh"
#include "../../../common/ptx.cuh"
#include "steps.cuh"

namespace convmixer_fast::cuda {

// Whether an element of the map lies at an address that is not a multiple of 4 bytes.
__device__ __forceinline__ bool is_odd(const uint16_t* element) {
  return reinterpret_cast<uintptr_t>(element) % 4 != 0;
}

// In which steps a thread has both elements of its word, or only one of them: a bit per step. In an odd row, word
// `index` starts one column to the left of 2 index.
struct WordSteps {
  uint32_t both;
  uint32_t low;   // only the first
  uint32_t high;  // only the second

  // steps: those in which it has a row; odd_steps: those in which the row is odd.
  __device__ WordSteps(uint32_t steps, uint32_t odd_steps, int index, int width) {
    const auto where = [&](bool even_rows, bool odd_rows) {
      return steps & ((even_rows ? ~odd_steps : 0) | (odd_rows ? odd_steps : 0));
    };
    const int col = 2 * index;  // of the first element in an even row, of the second one in an odd row
    const uint32_t has_low = where(col < width, col > 0 && col - 1 < width);
    const uint32_t has_high = where(col + 1 < width, col < width);
    both = has_low & has_high;
    low = has_low & ~has_high;
    high = has_high & ~has_low;
  }
};

// Loads a word, or one element into the low half of a register: to move it elsewhere would be to wait for it. Under
// predicates, as branches would wait for each other's loads.
__device__ __forceinline__ void load_word_or_element(uint32_t& bits, const uint16_t* word, bool has_word,
                                                     const uint16_t* element, bool has_element) {
  asm volatile(
      "{\n\t"
      ".reg .pred word, element;\n\t"
      "setp.ne.s32 word, %2, 0;\n\t"
      "setp.ne.s32 element, %4, 0;\n\t"
      "@word ld.global.nc.u32 %0, [%1];\n\t"
      "@element ld.global.nc.u16 %0, [%3];\n\t"
      "}"
      : "+r"(bits)
      : "l"(word), "r"(static_cast<int>(has_word)), "l"(element), "r"(static_cast<int>(has_element)));
}

// From memory through registers to shared memory. kZeroMissing: whether images that the channel's last work tile lacks
// become zeros; else they keep what they had.
template <bool kZeroMissing>
class UnalignedRowsReader {
 public:
  __device__ UnalignedRowsReader(const StepsLane& lane, const uint16_t* tensor, const Strides& stride,
                                 const StoredMaps& maps, uint16_t* stored)
      : lane_(lane),
        from_(tensor + lane.image * stride.n + lane.row * stride.h + 2 * lane.index),
        to_(stored + maps.at(lane.image, lane.row, 2 * lane.index)) {}

  // odd: whether there may be odd rows.
  __device__ __forceinline__ void load(const MapOperand& operand, int width, bool odd, bool is_last) {
    const uint32_t steps = lane_.steps_in(is_last);
    odd_steps_ = is_odd(from_) ? ~operand.odd_steps : operand.odd_steps;
    if (odd) load_steps<true>(operand.steps, width, steps);
    else load_steps<false>(operand.steps, width, steps);
  }
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { from_ += tiles.after(is_last); }

  template <class Prologue>
  __device__ __forceinline__ void write(const MapOperand& operand, int width, bool odd, const Prologue& prologue) {
#pragma unroll
    for (int step = 0; step < kUnalignedSteps; step++) prologue(words_[step]);
    if (odd) write_steps<true>(operand.stored_steps, width);
    else write_steps<false>(operand.stored_steps, width);
  }

 private:
  template <bool kOdd>
  __device__ __forceinline__ void load_steps(const StepDistances& distances, int width, uint32_t steps) {
    const WordSteps has(steps, odd_steps_, lane_.index, width);
    const uint16_t* from = from_;
#pragma unroll
    for (int step = 0; step < kUnalignedSteps; step++) {
      if constexpr (kZeroMissing) words_[step] = {};
      if constexpr (kOdd) {
        const uint16_t* const word = from - (odd_steps_ >> step & 1);
        const bool has_high = has.high >> step & 1;
        load_word_or_element(reinterpret_cast<uint32_t&>(words_[step]), word, has.both >> step & 1, word + has_high,
                             (has.low | has.high) >> step & 1);
      } else {
        if (steps >> step & 1) words_[step] = load_global<2>(from);
      }
      from += distance_after<kUnalignedSteps>(distances, step);
    }
  }
  template <bool kOdd>
  __device__ __forceinline__ void write_steps(const StepDistances& distances, int width) const {
    const WordSteps has(lane_.steps, odd_steps_, lane_.index, width);
    // The addresses of all steps must not be computed ahead and kept in registers, which the ring does not leave.
    uint16_t* to = to_ + opaque(0);
#pragma unroll
    for (int step = 0; step < kUnalignedSteps; step++) {
      if constexpr (kOdd) {
        uint16_t* const word = to - (odd_steps_ >> step & 1);
        const AccessVector<2>& values = words_[step];
        const bool is_high = has.high >> step & 1;  // in the low half
        if ((has.both | has.low) >> step & 1) word[0] = values.values[0];
        if ((has.both | has.high) >> step & 1) word[1] = is_high ? values.values[0] : values.values[1];
      } else {
        if (lane_.steps >> step & 1) *reinterpret_cast<AccessVector<2>*>(to) = words_[step];
      }
      to += distance_after<kUnalignedSteps>(distances, step);
    }
  }

  StepsLane lane_;
  const uint16_t* from_;  // this thread's first word in memory, were the row even
  uint16_t* to_;          // and in shared memory
  uint32_t odd_steps_;    // bit s: whether the row loaded in step s is odd
  AccessVector<2> words_[kUnalignedSteps];
};

// From shared memory to memory. The functions are the reader's.
class UnalignedRowsWriter {
 public:
  __device__ UnalignedRowsWriter(const StepsLane& lane, uint16_t* tensor, const Strides& stride, const StoredMaps& maps,
                                 const uint16_t* stored)
      : lane_(lane),
        to_(tensor + lane.image * stride.n + lane.row * stride.h + 2 * lane.index),
        from_(stored + maps.at(lane.image, lane.row, 2 * lane.index)) {}

  __device__ __forceinline__ void store(const MapOperand& operand, int width, bool odd, bool is_last) {
    const uint32_t steps = lane_.steps_in(is_last);
    if (odd) store_steps<true>(operand, width, steps);
    else store_steps<false>(operand, width, steps);
  }
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { to_ += tiles.after(is_last); }

 private:
  template <bool kOdd>
  __device__ __forceinline__ void store_steps(const MapOperand& operand, int width, uint32_t steps) const {
    const uint16_t* from = from_ + opaque(0);  // as in write_steps
    uint16_t* to = to_;
    const uint32_t odd_steps = is_odd(to) ? ~operand.odd_steps : operand.odd_steps;
    const WordSteps has(steps, odd_steps, lane_.index, width);
#pragma unroll
    for (int step = 0; step < kUnalignedSteps; step++) {
      if constexpr (kOdd) {
        const int odd_row = odd_steps >> step & 1;
        const uint32_t low = (has.both | has.low) >> step & 1 ? from[-odd_row] : 0;
        const uint32_t high = (has.both | has.high) >> step & 1 ? from[1 - odd_row] : 0;
        if (has.both >> step & 1) *reinterpret_cast<uint32_t*>(to - odd_row) = low | high << 16;
        if (has.low >> step & 1) to[-odd_row] = static_cast<uint16_t>(low);
        if (has.high >> step & 1) to[1 - odd_row] = static_cast<uint16_t>(high);
      } else {
        if (steps >> step & 1)
          *reinterpret_cast<AccessVector<2>*>(to) = *reinterpret_cast<const AccessVector<2>*>(from);
      }
      to += distance_after<kUnalignedSteps>(operand.steps, step);
      from += distance_after<kUnalignedSteps>(operand.stored_steps, step);
    }
  }

  StepsLane lane_;
  uint16_t* to_;
  const uint16_t* from_;
};

}  // namespace convmixer_fast::cuda
