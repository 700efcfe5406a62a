// What the C of every kernel starts with: types, arithmetic as GPUs do it, checked memory.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct { uint16_t bits; } bf16;

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float of_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE float from_bf16(bf16 x) { return of_bits((uint32_t)x.bits << 16); }
INLINE bf16 to_bf16(float x) {  // to nearest, ties to even
  uint32_t u = bits_of(x);
  bf16 out = {x != x ? 0x7FC0 : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
  return out;
}
INLINE float to_tf32(float x) { return of_bits((bits_of(x) + 0x1000) & 0xFFFFE000u); }
INLINE float tf32x3(float x, float y, float sum) {
  float a = to_tf32(x), b = to_tf32(y);
  return sum + to_tf32(x - a) * b + a * to_tf32(y - b) + a * b;
}

INLINE double maxnum(double a, double b) { return b != b ? a : (a > b ? a : b); }
INLINE double minnum(double a, double b) { return b != b ? a : (a < b ? a : b); }
INLINE float maxnumf_(float a, float b) { return b != b ? a : (a > b ? a : b); }
INLINE float minnumf_(float a, float b) { return b != b ? a : (a < b ? a : b); }
INLINE float maximumf_(float a, float b) { return a != a || b != b ? NAN : (a > b ? a : b); }
INLINE float minimumf_(float a, float b) { return a != a || b != b ? NAN : (a < b ? a : b); }
INLINE int64_t max_s(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t min_s(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE uint64_t max_u(uint64_t a, uint64_t b) { return a > b ? a : b; }
INLINE uint64_t min_u(uint64_t a, uint64_t b) { return a < b ? a : b; }
// Undefined on GPUs, where it doesn't end the process.
INLINE int64_t div_s(int64_t a, int64_t b) { return b == 0 ? 0 : b == -1 ? -a : a / b; }
INLINE int64_t rem_s(int64_t a, int64_t b) { return b == 0 || b == -1 ? 0 : a % b; }
INLINE uint64_t div_u(uint64_t a, uint64_t b) { return b == 0 ? 0 : a / b; }
INLINE uint64_t rem_u(uint64_t a, uint64_t b) { return b == 0 ? 0 : a % b; }

INLINE float exp2_(float x) {  // polynomial, so that gcc makes vectors of it
  float c = x < -150.f ? -150.f : (x > 129.f ? 129.f : x);
  float whole = __builtin_rintf(c);
  int n = (int)whole, half = n >> 1;
  float r = c - whole, p = 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  float y = p * of_bits((uint32_t)(half + 127) << 23) * of_bits((uint32_t)(n - half + 127) << 23);
  return x != x ? x : y;
}

#define MAX_ARGS 96

typedef struct { uint64_t begin, end; } Range;

typedef struct {
  uint64_t loaded[MAX_ARGS], stored[MAX_ARGS];  // bytes, by argument
  uint64_t outside, address;                    // accesses out of bounds; one of them
} Counts;

typedef struct {
  const Range* ranges;
  int n_ranges;
  Counts counts;
} Memory;

// Which argument the bytes [begin, end) lie in; -1, and counted, if in none.
static int owner(Memory* memory, uint64_t begin, uint64_t end, uint64_t elements) {
  for (int i = 0; i < memory->n_ranges; i++)
    if (begin >= memory->ranges[i].begin && end <= memory->ranges[i].end) return i;
  memory->counts.outside += elements;
  memory->counts.address = begin;
  return -1;
}
