// A vector of FASTDIFF_LANES floats, and the elementary functions on it. Included once per instruction set.

static constexpr int lanes = FASTDIFF_LANES;
typedef float Vec __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(FASTDIFF_LANES * 4)));

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// The first `count` numbers, zeros behind them.
static inline Vec load_some(const float* p, int count) {
  if (count >= lanes) return load(p);
  Vec v{};
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}
static inline Vec splat(float x) { return x - Vec{}; }  // (a - 0 keeps every a, -0 included)

// Elements of products: float, or bfloat16 as its bits where the instruction set multiplies those.
struct BF16 {
  uint16_t bits;
};
static inline void store(BF16* p, Vec v) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  (void)p, (void)v;
#endif
}

// even[0], odd[0], even[1], odd[1], ...
static inline void store_pairs(BF16* p, Vec even, Vec odd) {
#ifdef __AVX512BF16__
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  (void)p, (void)even, (void)odd;
#endif
}

// The whole number nearest to t, for |t| < 2^22; `code` is for power().
static inline Vec nearest(Vec t, Vec& code) {
#ifdef __AVX512F__
  return code = (Vec)_mm512_roundscale_ps((__m512)t, 8);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds, and leaves the number in the low bits
  code = t + magic;
  return code - magic;
#endif
}

// 2^n 2^f for |f| <= 1/2, within 2e-7, n being what nearest() coded.
static inline Vec power(Vec f, Vec code) {
  Vec p = splat(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)code);
#else
  return (Vec)((VecI)p + ((VecI)code << 23));
#endif
}

static constexpr float log2_e = 1.44269504f;

// e^x within 3e-7 of itself; x is clamped to [-87, 88], NaN stays.
static inline Vec exp(Vec x) {
  Vec clamped = x < -87.0f ? splat(-87.0f) : x, code;
  clamped = clamped > 88.0f ? splat(88.0f) : clamped;
  const Vec n = nearest(clamped * log2_e, code);
  const Vec r = clamped - n * 0.693359375f - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  const Vec e = power(r * log2_e, code);
  return x == x ? e : x;  // the bits of a NaN may have become a number
}

// x sigmoid(x) = x / (1 + 2^(-x log2 e)). The exponent is rounded, which costs |x| 2^-24 of the exponential: nothing
// where that is small beside 1, and where it is large the result is small.
static inline Vec silu(Vec x) {
  Vec t = x * -log2_e, code;
#ifndef __AVX512F__
  t = t < -126.0f ? splat(-126.0f) : t;
  t = t > 126.0f ? splat(126.0f) : t;
#endif
  const Vec n = nearest(t, code);
  const Vec y = x / (1.0f + power(t - n, code));
  return x == x ? y : x;
}
