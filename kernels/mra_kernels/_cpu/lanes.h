// Some queries side by side: one lane each, so that softmax needs no sums across lanes.
#pragma once

#include <cstdint>
#include <limits>
#if defined(__SSSE3__)
#include <immintrin.h>
#endif

// A register of lanes, and how many keys' sums (or value columns') fit the others at once.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 8;
#else
constexpr int LANES = 4, WIDE = 8;
#endif
constexpr uint32_t EVERY_LANE = (1u << LANES) - 1;
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

static inline Lanes all(float x) { return x - Lanes{}; }
static inline Ints all_ints(int32_t x) { return x - Ints{}; }
static inline const Lanes& at(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline Lanes& at(float* p) { return *reinterpret_cast<Lanes*>(p); }
static inline Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }

// -1 where the bit of the lane is set.
static inline Ints lanes_of(uint32_t bits) {
  Ints each;
  for (int i = 0; i < LANES; ++i) each[i] = 1 << i;
  return (all_ints(static_cast<int32_t>(bits)) & each) != 0;
}

// e^x for x <= 0 to 2 ulp; exactly 0 below -87, -inf included.
static inline Lanes exp_of(const Lanes& x) {
  const Lanes scaled = (x < -87.0f ? all(-87.0f) : x) * 1.44269504f;
  const Lanes shifted = scaled + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Lanes whole = shifted - 12582912.0f, part = scaled - whole;
  Lanes power = all(1.5403530e-4f);
  power = power * part + 1.33335581e-3f;
  power = power * part + 9.61812911e-3f;
  power = power * part + 5.55041087e-2f;
  power = power * part + 2.40226507e-1f;
  power = power * part + 6.93147181e-1f;
  power = power * part + 1.0f;
  const Ints exponent = __builtin_convertvector(whole, Ints) << 23;
  return x < -87.0f ? Lanes{} : (Lanes)((Ints)power + exponent);
}

// e^x for x <= 0, off by at most 6e-5 of it; next to 0 below -87, -inf included.
static inline Lanes roughly_exp(const Lanes& x) {
  const Lanes scaled = larger(x, all(-87.0f)) * 1.44269504f;
  const Lanes shifted = scaled + 12582912.0f;
  const Lanes part = scaled - (shifted - 12582912.0f);
  Lanes power = all(9.6181291e-3f);
  power = power * part + 5.5504109e-2f;
  power = power * part + 2.4022651e-1f;
  power = power * part + 6.9314718e-1f;
  power = power * part + 1.0f;
  return (Lanes)((Ints)power + ((Ints)shifted << 23));
}

// Dot products of WIDE keys with the queries in `query` [width][LANES] -> dots [WIDE][LANES].
static inline void dot_products(const float* query, const float* const* keys, int64_t width,
                                float* dots) {
  Lanes sums[WIDE] = {};
  const float* key[WIDE];
  for (int j = 0; j < WIDE; ++j) key[j] = keys[j];
  for (int64_t d = 0; d < width; ++d) {
    const Lanes lanes = at(query + d * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < WIDE; ++j) sums[j] += lanes * key[j][d];
  }
  for (int j = 0; j < WIDE; ++j) at(dots + j * LANES) = sums[j];
}

// Rows of `n` queries turned into lanes: [width][LANES], scaled; missing queries are 0.
static inline void load_queries(const float* rows, int64_t stride, int n, int64_t width,
                                float scale, float* query) {
  for (int64_t d = 0; d < width; ++d) at(query + d * LANES) = Lanes{};
  for (int i = 0; i < n; ++i)
    for (int64_t d = 0; d < width; ++d) query[d * LANES + i] = rows[i * stride + d] * scale;
}

// Dot product of one query and one key: lanes along the features.
static inline float dot_product(const float* query, const float* key, int64_t width) {
  Lanes sums = {};
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) sums += at(query + d) * at(key + d);
  float sum = 0;
  for (; d < width; ++d) sum += query[d] * key[d];
  for (int i = 0; i < LANES; ++i) sum += sums[i];
  return sum;
}

// sums + the products of four bytes each: of keys (0 to 127), a key per lane, and of one query
// (-127 to 127). Seven bits, as two products must fit 16.
static inline Ints add_products(const Ints& sums, const Ints& keys, int32_t query) {
  const Ints queries = all_ints(query);
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)keys, (__m512i)queries);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)keys, (__m512i)queries);
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)keys, (__m256i)queries);
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__SSSE3__) && !defined(__AVX__)
  const __m128i pairs = _mm_maddubs_epi16((__m128i)keys, (__m128i)queries);
  return sums + (Ints)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
#else
  Ints total = sums;
  for (int byte = 0; byte < 32; byte += 8)
    total += (keys >> byte & 255) * static_cast<int8_t>(query >> byte);
  return total;
#endif
}
