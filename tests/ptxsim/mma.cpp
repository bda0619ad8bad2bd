// mma.sync, rounded as tensor cores round.
//
// A tensor core takes the products of a group of neighbouring k at a time and adds them to the accumulator in fixed
// point. An operand is significand * 2^exponent with 1 <= significand < 2 (below 1 if it is subnormal), a product is
// the product of the significands at the sum of the exponents, not normalised. The greatest exponent of the group, that
// of the accumulator included, tells where the point is: of each term, what lies more than `fraction` bits below it is
// cut off, and the rest is added exactly. The sum is truncated to float32, or rounded to the nearest float16, and is
// the accumulator of the next group. How many k are a group, and how many bits are kept, depends on the architecture.
//
// The rule and its constants are those that MMA-Sim (microsoft/MMA-Sim) found on GPUs; tests/test_mma.py compares the
// two bit by bit.
#include "runtime.h"

#include <algorithm>

// Rows of matrices of 8 columns.
typedef s32 s32x8 __attribute__((vector_size(32)));
typedef u32 u32x8 __attribute__((vector_size(32)));
typedef s64 s64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

enum Type { T_F16, T_BF16, T_TF32, T_E4M3, T_E5M2, T_S8, T_U8, T_F64 };  // ELEM_CODE in codegen.py
enum Accumulator { ACC_F16, ACC_F32, ACC_S32, ACC_F64 };                 // ACC_CODE

// ---- fragments ---------------------------------------------------------------------------------
// With g = lane / 4, t = lane % 4 and e elements per 32-bit register:
//   A reg r elem j: row g + 8 (r & 1), k = e t + j + 4 e (r >> 1)      (m8: row g, one register)
//   B reg r elem j: k = e t + j + 4 e r, column g
//   C elem i:       row g + 8 (i >> 1), column 2 t + (i & 1)

struct Instruction {
  u32 m, k;
  Type a, b;
  Accumulator acc;
  bool saturate;
};

static Instruction decode_instruction(u64 code) {  // as h_mma of codegen.py packs it
  Instruction i;
  i.k = code & 0xff;
  i.a = Type(code >> 8 & 15);
  i.b = Type(code >> 12 & 15);
  i.acc = Accumulator(code >> 16 & 15);
  i.m = code >> 20 & 1 ? 16 : 8;
  i.saturate = code >> 21 & 1;
  return i;
}

struct Matrices {  // the bits of the elements; columns of A that the instruction lacks are zero
  alignas(32) u32 a[16][32], b[32][8], c[16][8];
};

static const u32* lane_in(Warp* w, u32 lane) { return (const u32*)w->lane[lane]->in; }
static u32* lane_out(Warp* w, u32 lane) { return (u32*)w->lane[lane]->out; }

static u32 per_register(Type type) { return type <= T_BF16 ? 2 : type == T_TF32 ? 1 : 4; }

static u32 read_fragments(Warp* w, const Instruction& ins, Matrices& x) {  // returns C's elements per lane
  const u32 e = per_register(ins.a), bits = 32 / e, mask = ~0u >> (32 - bits), wide = ins.m == 16;
  const u32 unused = ins.a == T_TF32 ? 13 : 0;  // low bits
  const u32 na = ins.m * ins.k / (32 * e), nb = 8 * ins.k / (32 * e), nc = ins.m * 8 / 32;
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 *s = lane_in(w, lane), g = lane / 4, t = lane % 4;
    for (u32 r = 0; r < na; r++)
      for (u32 j = 0; j < e; j++)
        x.a[g + (wide ? 8 * (r & 1) : 0)][e * t + j + (wide ? 4 * e * (r >> 1) : 0)] =
            (s[r] >> bits * j & mask) >> unused;
    for (u32 r = 0; r < nb; r++)
      for (u32 j = 0; j < e; j++) x.b[e * t + j + 4 * e * r][g] = (s[na + r] >> bits * j & mask) >> unused;
    const u32* c = s + na + nb;
    for (u32 i = 0; i < nc; i++)
      x.c[g + 8 * (i >> 1)][2 * t + (i & 1)] = ins.acc == ACC_F16 ? c[i / 2] >> 16 * (i & 1) & 0xffff : c[i];
  }
  return nc;
}

static void write_fragments(Warp* w, const Instruction& ins, const Matrices& x, u32 nc) {
  for (u32 lane = 0; lane < 32; lane++) {
    u32 *d = lane_out(w, lane), g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < nc; i++) {
      const u32 value = x.c[g + 8 * (i >> 1)][2 * t + (i & 1)];
      if (ins.acc != ACC_F16) d[i] = value;
      else d[i / 2] = i & 1 ? d[i / 2] | value << 16 : value;
    }
  }
}

// ---- floating point ----------------------------------------------------------------------------

struct Rule {
  u32 group;     // products that are added at once
  int fraction;  // bits of a term that are kept below the greatest exponent of its group
  int kept;      // bits of the fraction of a float32 result that are kept
  int zero;      // the exponent of a zero: the greatest of a group is no less
};

// The rule for a floating-point instruction on a compute capability; false if there is none.
static bool rule_for(u32 capability, const Instruction& ins, Rule& rule) {
  const u32 generation = capability / 10;
  const bool turing = capability == 75, ada = capability == 89, hopper_or_later = generation >= 9;
  const bool bytes = ins.a >= T_E4M3;
  const bool known = turing  ? ins.a == T_F16 && ins.k == 8
                     : bytes ? ada || generation == 12
                             : generation == 8 || generation == 9 || generation == 10 || generation == 12;
  if (!known) return false;
  rule.group = (hopper_or_later ? 32 : 16) / (ins.a == T_TF32 ? 4 : bytes ? 1 : 2);
  rule.fraction = hopper_or_later ? 25 : 24;
  rule.kept = 23;
  rule.zero = (ins.acc == ACC_F16 ? 4 : -108) - rule.fraction;
  if (ada && bytes) rule.fraction = rule.kept = 13;
  return true;
}

struct Format {
  int mantissa;
  u32 exponent;  // the greatest value of the field
};
static const Format kFormats[] = {
    {10, 31}, {7, 255}, {10, 255}, {3, 15}, {2, 31}};  // by Type; tf32 without unused bits
static const Format kFloat32 = {23, 255};

constexpr int kNoExponent = -1000;  // of a zero: below that of every product

struct Row {
  s32x8 significand, exponent;  // the values are significand * 2^(exponent - mantissa)
  s32x8 special;                // 0 if it is neither Inf nor NaN; they have the greatest exponent
};

static Row split(const Format& f, const u32* elements) {
  u32x8 bits;
  memcpy(&bits, elements, sizeof bits);
  const int bias = f.exponent / 2, sign_at = f.mantissa + __builtin_popcount(f.exponent);
  const u32 hidden = 1u << f.mantissa;
  const u32x8 field = bits >> f.mantissa & f.exponent;
  const s32x8 subnormal = field == 0, sign = -s32x8(bits >> sign_at & 1);
  const s32x8 magnitude = s32x8(bits & (hidden - 1)) | (~subnormal & s32(hidden));
  Row r;
  r.significand = (magnitude ^ sign) - sign;
  r.exponent = magnitude == 0 ? s32x8{} + kNoExponent : s32x8(field) - subnormal - bias;
  r.special = field == f.exponent;
  return r;
}

// significand * 2^(up - down), truncated.
static s32x8 shifted(s32x8 significand, int up, s32x8 down) {
  if (up < 0) {
    down -= up;
    up = 0;
  }
  const s32x8 sign = significand >> 31;
  u32x8 magnitude = u32x8((significand ^ sign) - sign);
  magnitude = magnitude << up >> u32x8(down > 31 ? s32x8{} + 31 : down);
  return (s32x8(magnitude) ^ sign) - sign;
}

// sum * 2^exponent, exact in double, truncated to float32.
static u32x8 truncated_to_float32(s64x8 sum, s32x8 exponent, int kept) {
  const s64x8 sign = sum >> 63;
  s64x8 magnitude = (sum ^ sign) - sign;
  const s32x8 below = -126 - kept - exponent;  // bits below the least that a subnormal result keeps
  const s32x8 cut = below > 0 ? below : s32x8{};
  magnitude >>= __builtin_convertvector(cut, s64x8);
  const s64x8 scale = (__builtin_convertvector(exponent + cut, s64x8) + 1023) << 52;
  const f64x8 value = __builtin_convertvector(magnitude, f64x8) * (f64x8)scale;
  const s64x8 truncated = (s64x8)value & -(s64(1) << (52 - kept));
  const u32x8 bits = (u32x8) __builtin_convertvector((f64x8)truncated, f32x8);  // Inf from 2^128 on
  return bits | u32x8(__builtin_convertvector(magnitude != 0 ? sign : s64x8{}, s32x8) & s32(0x80000000));
}

static double value(Type type, u32 bits) {
  switch (type) {
    case T_F16: return h2f(u16(bits));
    case T_BF16: return b2f(u16(bits));
    case T_TF32: return F(bits << 13);
    case T_E4M3: return e4m3_f(u8(bits));
    default: return e5m2_f(u8(bits));
  }
}

// The result of a group with Inf or NaN among its terms, which decide it.
static void add_special(const Instruction& ins, const Matrices& x, u32 m, u32 n, u32 first, u32 count, u32& result) {
  double sum = ins.acc == ACC_F16 ? h2f(u16(x.c[m][n])) : F(x.c[m][n]);
  bool found = !std::isfinite(sum);
  if (!found) sum = 0;
  for (u32 k = first; k < first + count; k++) {
    const double term = value(ins.a, x.a[m][k]) * value(ins.b, x.b[k][n]);
    if (std::isfinite(term)) continue;
    sum += term;
    found = true;
  }
  const u32 infinity = ins.acc == ACC_F16 ? 0x7c00 : 0x7f800000, sign = ins.acc == ACC_F16 ? 0x8000 : 0x80000000;
  if (found) result = std::isnan(sum) ? sign - 1 : sum < 0 ? sign | infinity : infinity;
}

static bool any(s32x8 x) {
  s32 all = 0;
  for (u32 i = 0; i < 8; i++) all |= x[i];
  return all;
}

static void multiply_floats(const Instruction& ins, const Rule& rule, Matrices& x) {
  constexpr u32 kRows = 16, kDepth = 32;
  constexpr u32 kSafe = 16;  // products, each at most (2 - 2^-10)^2 2^25, whose sum 32 bits hold
  const Format &fa = kFormats[ins.a], &fb = kFormats[ins.b], &fc = ins.acc == ACC_F16 ? kFormats[T_F16] : kFloat32;
  alignas(32) s32 significand[kRows][kDepth], exponent[kRows][kDepth];  // of A
  Row b[kDepth];
  s32x8 special = {};
  for (u32 k = 0; k < ins.k; k++) {
    b[k] = split(fb, x.b[k]);
    special |= b[k].special;
  }
  for (u32 m = 0; m < kRows; m++)
    for (u32 k = 0; k < ins.k; k += 8) {
      const Row r = split(fa, &x.a[m][k]);
      memcpy(&significand[m][k], &r.significand, sizeof r.significand);
      memcpy(&exponent[m][k], &r.exponent, sizeof r.exponent);
      special |= r.special;
    }
  const bool specials = any(special);
  const u32 count = std::min(rule.group, ins.k);
  for (u32 first = 0; first < ins.k; first += count)
    for (u32 m = 0; m < kRows; m++) {
      const Row c = split(fc, x.c[m]);
      s32x8 top = c.exponent > rule.zero ? c.exponent : s32x8{} + rule.zero;
      for (u32 k = first; k < first + count; k++) {
        const s32x8 e = b[k].exponent + exponent[m][k];
        top = e > top ? e : top;
      }
      s64x8 sum = __builtin_convertvector(shifted(c.significand, rule.fraction - fc.mantissa, top - c.exponent), s64x8);
      for (u32 begin = first; begin < first + count; begin += kSafe) {
        s32x8 part = {};
        for (u32 k = begin; k < std::min(begin + kSafe, first + count); k++)
          part += shifted(b[k].significand * significand[m][k], rule.fraction - fa.mantissa - fb.mantissa,
                          top - b[k].exponent - exponent[m][k]);
        sum += __builtin_convertvector(part, s64x8);
      }
      // The sum is that of the group times 2^(fraction - top).
      u32x8 result;
      if (ins.acc == ACC_F32) {
        result = truncated_to_float32(sum, top - rule.fraction, rule.kept);
      } else {
        for (u32 n = 0; n < 8; n++) result[n] = sum[n] ? d2h(std::ldexp(double(sum[n]), top[n] - rule.fraction)) : 0;
        result = (result & 0x7fff) == 0 ? u32x8{} : result;  // zeros are positive
      }
      if (specials || any(c.special))
        for (u32 n = 0; n < 8; n++) {
          u32 bits = result[n];
          add_special(ins, x, m, n, first, count, bits);
          result[n] = bits;
        }
      memcpy(x.c[m], &result, sizeof result);
    }
}

// ---- integers and double -----------------------------------------------------------------------

static void multiply_integers(const Instruction& ins, Matrices& x) {
  auto integer = [](Type type, u32 bits) { return type == T_S8 ? s32(s8(bits)) : s32(bits); };
  for (u32 m = 0; m < ins.m; m++)
    for (u32 n = 0; n < 8; n++) {
      s64 sum = s32(x.c[m][n]);
      for (u32 k = 0; k < ins.k; k++) sum += integer(ins.a, x.a[m][k]) * integer(ins.b, x.b[k][n]);
      if (ins.saturate) sum = std::clamp<s64>(sum, -0x80000000ll, 0x7fffffff);
      x.c[m][n] = u32(sum);
    }
}

static void multiply_doubles(Warp* w) {  // m8n8k4: a chain of fused multiply-adds
  double a[8][4], b[4][8], c[8][8];
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 *s = lane_in(w, lane), g = lane / 4, t = lane % 4;
    memcpy(&a[g][t], s, 8);
    memcpy(&b[t][g], s + 2, 8);
    memcpy(&c[g][2 * t], s + 4, 16);
  }
  for (u32 m = 0; m < 8; m++)
    for (u32 k = 0; k < 4; k++)
      for (u32 n = 0; n < 8; n++) c[m][n] = fma(a[m][k], b[k][n], c[m][n]);
  for (u32 lane = 0; lane < 32; lane++) memcpy(lane_out(w, lane), &c[lane / 4][2 * (lane % 4)], 16);
}

// ---- the collective ----------------------------------------------------------------------------

void mma(Warp* w, u32, u64 code, u32 pc) {
  const Instruction ins = decode_instruction(code);
  if (ins.acc == ACC_F64) return multiply_doubles(w);
  Matrices x = {};
  const u32 nc = read_fragments(w, ins, x);
  if (ins.acc == ACC_S32) {
    multiply_integers(ins, x);
  } else {
    TS* t = w->lane[0];
    Rule rule;
    if (!rule_for(t->L->capability, ins, rule))
      fail(t, pc, "unsupported", 0, "how sm_%u rounds this mma is not known", t->L->capability);
    multiply_floats(ins, rule, x);
  }
  write_fragments(w, ins, x, nc);
}
