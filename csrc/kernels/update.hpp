// One row of the table for every image, guidance, and the noise. The reference is fastdiff/update.py.
//
// An image is worked on in blocks that stay in the first cache: each sum is one loop over the operands that have a
// coefficient, so nothing is decided inside a loop, and only x, the output and what else is needed come from memory.
//
// No two products are added: which of them is fused with the addition would be the compiler's choice, and another one
// in every copy of a loop.

constexpr int chunk = 1024;  // a multiple of 2 lanes: what normals() makes at a time

typedef uint32_t VecU __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef uint64_t VecU64 __attribute__((vector_size(FASTDIFF_LANES * 4)));
typedef double VecD __attribute__((vector_size(FASTDIFF_LANES * 4)));

// Parts of vectors ----------------------------------------------------------------------------------------------------

struct Whole {};  // the count of a vector that is full

static inline Vec load(const float* p, Whole) { return load(p); }
static inline void store(float* p, Vec v, Whole) { store(p, v); }

static inline Vec load(const float* p, int count) {
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
static inline void store(float* p, Vec v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

// body(i, count) for the vectors that cover n floats. The last, where it is not whole, runs through the same
// arithmetic, so that a value does not depend on where it lies.
template <class Body>
static inline void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) body(i, Whole{});
  if (i < n) body(i, n - i);
}

// Noise ---------------------------------------------------------------------------------------------------------------

// The counter's words but the first, and the key, of one image's noise at one row.
struct Stream {
  uint32_t c1, c2, c3, k0, k1;
};

static inline Stream stream_of(int64_t seed, int64_t index, int64_t row, int stream) {
  const uint64_t s = static_cast<uint64_t>(seed), i = static_cast<uint64_t>(index);
  return {static_cast<uint32_t>(row) | static_cast<uint32_t>(stream) << 24, static_cast<uint32_t>(i),
          static_cast<uint32_t>(i >> 32), static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)};
}

constexpr int counters = lanes / 2;  // in a vector: 32-bit words in lanes of 64, where their products are whole

// Words w0..w3 of `counters` counters.
struct Words {
  VecU64 w0, w1, w2, w3;
};

static inline VecU64 splat64(uint64_t x) { return x - VecU64{}; }

// m c for lanes c < 2^32. In AVX2, whose products have 32 bits, GCC does not see that the upper halves are zero.
static inline VecU64 multiply(VecU64 c, uint32_t m) {
#if defined(__AVX2__) && FASTDIFF_LANES == 8 && !defined(__clang__)
  return (VecU64)__builtin_ia32_pmuludq256((VecI)c, (VecI)splat64(m));
#else
  return c * splat64(m);
#endif
}

// Philox4x32-10. Ten times, the key growing by (W0, W1) in between:
//
//     (hi0, lo0) = M0 c0;  (hi1, lo1) = M1 c2
//     c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
static inline Words philox(const Stream& stream, VecU64 c0) {
  constexpr uint64_t low = 0xFFFFFFFF;
  VecU64 c1 = splat64(stream.c1), c2 = splat64(stream.c2), c3 = splat64(stream.c3);
  uint32_t k0 = stream.k0, k1 = stream.k1;
  for (int round = 0; round < 10; ++round) {
    const VecU64 p0 = multiply(c0, 0xD2511F53), p1 = multiply(c2, 0xCD9E8D57);
    c0 = (p1 >> 32) ^ c1 ^ splat64(k0);
    c1 = p1 & low;
    c2 = (p0 >> 32) ^ c3 ^ splat64(k1);
    c3 = p0 & low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// Counters first, first + 1, ...
static inline VecU64 count_from(int64_t first) {
  VecU64 c = splat64(static_cast<uint64_t>(first));
  for (int i = 0; i < counters; ++i) c[i] += i;
  return c;
}

// u = ((w >> 9) + 1/2) 2^-23, exact: 1 + (w >> 9) 2^-23 is made of bits, and 1 - 2^-24 subtracted.
static inline Vec uniform(VecU w) { return (Vec)((w >> 9) | 0x3F800000u) - 0.999999940395355224609375f; }

// ln u within 1 ulp for normal u. u = 2^e m with m from sqrt(1/2) to sqrt 2, f = m - 1:
//     ln u = e ln 2 + f + f^2 (f P(f) - 1/2)
static inline Vec log(Vec u) {
  const VecI e = ((VecI)u - 0x3F3504F3) >> 23;
  const Vec f = (Vec)((VecI)u - (e << 23)) - 1.0f;
  const Vec n = __builtin_convertvector(e, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec q = p * f - 0.5f;
  return n * 0.693359375f + ((f + n * -2.12194440e-4f) + f * f * q);
}

static inline Vec sqrt(Vec x) {
  float r[lanes];
  store(r, x);
  for (float& value : r) value = __builtin_sqrtf(value);
  return load(r);
}

struct Pair {
  Vec first, second;
};

// (cos, sin)(2 pi v) within 1.3 ulp for v in [0, 1]. v = q/4 + b with |b| <= 1/8 is exact, which 2 pi v would not be.
//     sin(2 pi b) = b (2 pi + b^2 S(b^2));  cos(2 pi b) = 1 + b^2 C(b^2);  a quarter turn: (cos, sin) -> (-sin, cos)
static inline Pair cos_sin_turns(Vec v) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = v * 4.0f + magic;
  const VecI q = (VecI)shifted;
  const Vec b = v - (shifted - magic) * 0.25f;
  const Vec square = b * b;
  Vec s = splat(41.5895421487f);
  s = s * square - 76.7012858949f;
  s = s * square + 81.6052349923f;
  s = s * square - 41.3417022334f;
  s = b * (6.28318548f + (s * square - 1.74845553e-7f));
  Vec c = splat(59.4241059818f);
  c = c * square - 85.4488200897f;
  c = c * square + 64.9393690514f;
  c = c * square - 19.73920879f;
  c = c * square + 1.0f;
  const VecI odd = (q & 1) != 0;
  const VecI cos_sign = ((q + 1) & 2) << 30, sin_sign = (q & 2) << 30;
  return {(Vec)((VecI)(odd ? s : c) ^ cos_sign), (Vec)((VecI)(odd ? c : s) ^ sin_sign)};
}

// sqrt(-2 ln u) (cos, sin)(2 pi v)
static inline Pair box_muller(Vec u, Vec v) {
  const Vec r = sqrt(-2.0f * log(u));
  const Pair turn = cos_sin_turns(v);
  return {r * turn.first, r * turn.second};
}

// Normals of n numbers, from counter `first` on; z has room for a multiple of 2 lanes.
static void normals(const Stream& stream, int64_t first, int n, float* z) {
  for (int i = 0; i < n; i += 2 * lanes) {
    const Words w = philox(stream, count_from(first + i / 4));
    // Lanes 2j and 2j + 1 hold both pairs of counter j, so z0, z2, z0, z2, ... and z1, z3, z1, z3, ... interleave.
    const Pair pair = box_muller(uniform((VecU)(w.w0 | w.w2 << 32)), uniform((VecU)(w.w1 | w.w3 << 32)));
    float even[lanes], odd[lanes];
    store(even, pair.first);
    store(odd, pair.second);
    for (int j = 0; j < lanes; ++j) {
      z[i + 2 * j] = even[j];
      z[i + 2 * j + 1] = odd[j];
    }
  }
}

static void words(const Stream& stream, int64_t first, int64_t n, uint32_t* dst) {
  for (int64_t i = 0; i < n; i += 4 * counters) {
    const Words w = philox(stream, count_from(first + i / 4));
    for (int64_t j = i; j < std::min<int64_t>(n, i + 4 * counters); ++j) {
      const VecU64& word = j % 4 == 0 ? w.w0 : j % 4 == 1 ? w.w1 : j % 4 == 2 ? w.w2 : w.w3;
      dst[j] = static_cast<uint32_t>(word[(j - i) / 4]);
    }
  }
}

static void noise(const NoiseArgs& args, Range images) {
  alignas(64) float z[chunk];
  for (int i = images.begin; i < images.end; ++i) {
    const Stream stream = stream_of(args.seed[i], args.index[i], args.row[i], args.stream);
    if (args.words) words(stream, args.first, args.size, args.words + i * args.size);
    for (int64_t begin = 0; args.z && begin < args.size; begin += chunk) {
      const int n = static_cast<int>(std::min<int64_t>(chunk, args.size - begin));
      normals(stream, args.first + begin / 4, n, z);
      std::memcpy(args.z + i * args.size + begin, z, n * sizeof(float));
    }
  }
}

// The update ----------------------------------------------------------------------------------------------------------

// A sum of k * operand over the operands that have a coefficient.
struct Terms {
  static constexpr int most = 8;
  int count = 0;
  float k[most];
  const float* operand[most];

  void add(float coefficient, const float* p) {
    if (coefficient == 0.0f || !p) return;
    k[count] = coefficient;
    operand[count++] = p;
  }
};

// The empty sum, as in the reference: x + -0.0 is x for every x. Volatile, or the compiler would leave the addition
// out, and two products be added.
static const volatile float nothing = -0.0f;

template <int count>
static void combine(const Terms& terms, int n, float* dst) {
  const Terms held = terms;  // what is written to dst cannot change this copy, so it may stay in registers
  const Vec none = splat(nothing);
  for_vectors(n, [&](int i, auto part) {
    Vec sum = none;
    for (int j = 0; j < count; ++j) sum = sum + held.k[j] * load(held.operand[j] + i, part);
    store(dst + i, sum, part);
  });
}

// dst may be one of the operands.
static void combine(const Terms& terms, int n, float* dst) {
  switch (terms.count) {
    case 0: combine<0>(terms, n, dst); return;
    case 1: combine<1>(terms, n, dst); return;
    case 2: combine<2>(terms, n, dst); return;
    case 3: combine<3>(terms, n, dst); return;
    case 4: combine<4>(terms, n, dst); return;
    case 5: combine<5>(terms, n, dst); return;
    case 6: combine<6>(terms, n, dst); return;
    case 7: combine<7>(terms, n, dst); return;
    default: combine<8>(terms, n, dst); return;
  }
}

// x = max(min(x, c), -c). Comparisons with NaN are false: NaN stays.
static void clip(float* x, int n, float c) {
  for_vectors(n, [&](int i, auto part) {
    Vec v = load(x + i, part);
    v = v > c ? splat(c) : v;
    v = v < -c ? splat(-c) : v;
    store(x + i, v, part);
  });
}

// dst = exp(sv v) z. The root of the exponential is squared: exp() is clamped where its square already over- or
// underflows. It does not keep every NaN; the comparison does.
static void scale_noise(float sv, const float* v, const float* z, int n, float* dst) {
  for_vectors(n, [&](int i, auto part) {
    const Vec exponent = sv * load(v + i, part);
    const Vec root = exp(0.5f * exponent);
    const Vec scale = exponent == exponent ? root * root : exponent;
    store(dst + i, scale * load(z + i, part), part);
  });
}

// Pointers to one block of one image. Null: there is none.
struct Slice {
  float *x, *xs, *m1, *m2, *m3;
  const float *out, *v, *z;
};

static inline void copy(float* dst, const float* src, int n) { std::memcpy(dst, src, n * sizeof(float)); }

// Whether x' = x and nothing else changes: not even a load and a store are needed.
static inline bool idles(const Coefficients& k) {
  return k.ax == 1.0f && k.ao == 0.0f && k.a0 == 0.0f && k.a1 == 0.0f && k.a2 == 0.0f && k.a3 == 0.0f &&
         k.as_ == 0.0f && k.s == 0.0f && k.push == 0.0f && k.save == 0.0f;
}

static void update_block(const Coefficients& k, const Slice& at, int n) {
  alignas(64) float x0[chunk], h[chunk], next[chunk];
  // x0 = clip(kx x + ko out, -c, c)
  if (k.h0 != 0.0f || k.a0 != 0.0f) {
    Terms terms;
    terms.add(k.kx, at.x);
    terms.add(k.ko, at.out);
    combine(terms, n, x0);
    if (!std::isinf(k.c)) clip(x0, n, k.c);
  }
  // h = hx x + ho out + h0 x0
  const bool push = k.push != 0.0f && at.m1;
  if (push) {
    Terms terms;
    terms.add(k.hx, at.x);
    terms.add(k.ho, at.out);
    terms.add(k.h0, x0);
    combine(terms, n, h);
  }
  // x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
  Terms terms;
  terms.add(k.ax, at.x);
  terms.add(k.ao, at.out);
  terms.add(k.a0, x0);
  terms.add(k.a1, at.m1);
  terms.add(k.a2, at.m2);
  terms.add(k.a3, at.m3);
  terms.add(k.as_, at.xs);
  terms.add(k.s, at.z);
  const bool save = k.save != 0.0f && at.xs;
  combine(terms, n, save ? next : at.x);
  // save: xs = x        push: m3, m2, m1 = m2, m1, h
  if (save) {
    copy(at.xs, at.x, n);
    copy(at.x, next, n);
  }
  if (push) {
    if (at.m2 && at.m3) copy(at.m3, at.m2, n);
    if (at.m2) copy(at.m2, at.m1, n);
    copy(at.m1, h, n);
  }
}

static void update_image(const UpdateArgs& args, const Coefficients& k, int image) {
  alignas(64) float z[chunk];
  const int64_t size = args.channels * args.pixels;
  const bool learned = k.sv != 0.0f && args.out_channels > args.channels;
  const bool drawn = k.s != 0.0f && !args.z;
  const Stream stream =
      drawn ? stream_of(args.seed[image], args.index[image], args.row[image], /*stream: UPDATE*/ 0) : Stream{};
  for (int64_t begin = 0; begin < size; begin += chunk) {
    const int n = static_cast<int>(std::min<int64_t>(chunk, size - begin));
    const auto at = [&](auto* p) { return p ? p + image * size + begin : nullptr; };
    const float* out = args.out ? args.out + image * args.out_channels * args.pixels + begin : nullptr;
    const float* v = learned ? out + size : nullptr;
    Slice slice = {at(args.x), at(args.xs), at(args.m1), at(args.m2), at(args.m3), out, v, at(args.z)};
    if (k.s != 0.0f) {
      if (drawn) {
        normals(stream, begin / 4, n, z);
        slice.z = z;
      }
      if (learned) {
        scale_noise(k.sv, slice.v, slice.z, n, z);
        slice.z = z;
      }
    }
    update_block(k, slice, n);
  }
}

static void update(const UpdateArgs& args, Range images) {
  for (int image = images.begin; image < images.end; ++image) {
    Coefficients k = args.bank(args.table[image], args.row[image]);
    if (args.x0_scale) {
      k.kx *= args.x0_scale[image];
      k.ko *= args.x0_scale[image];
    }
    if (!idles(k)) update_image(args, k, image);
  }
}

// Guidance ------------------------------------------------------------------------------------------------------------

// One channel of n pixels.
static inline void gather(const float* src, int stride, int n, float* dst) {
  for (int i = 0; i < n; ++i) dst[i] = src[static_cast<int64_t>(i) * stride];
}

// body(channel, begin, n) for the blocks of every channel's plane.
template <class Body>
static inline void for_planes(Range channels, int64_t pixels, Body body) {
  for (int channel = channels.begin; channel < channels.end; ++channel)
    for (int64_t begin = 0; begin < pixels; begin += chunk)
      body(channel, begin, static_cast<int>(std::min<int64_t>(chunk, pixels - begin)));
}

// As many floats as there are doubles in a vector, as doubles.
static inline VecD load_double(const float* p) {
  float __attribute__((vector_size(FASTDIFF_LANES * 2))) half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, VecD);
}

// The sum of f(x) over n numbers x, in double, and in an order that depends on n alone.
template <class F>
static double sum_of(const float* x, int n, F f) {
  constexpr int width = lanes / 2;
  VecD sums = {};
  int i = 0;
  for (; i + width <= n; i += width) sums = sums + f(load_double(x + i));
  double sum = 0.0;
  for (int j = 0; j < width; ++j) sum += sums[j];
  for (; i < n; ++i) sum += f(static_cast<double>(x[i]));
  return sum;
}

static double sum_of(const float* x, int n) {
  return sum_of(x, n, [](auto v) { return v; });
}

static double sum_of_squares(const float* x, int n, double mean) {
  return sum_of(x, n, [mean](auto v) { return (v - mean) * (v - mean); });
}

// out = u + w (c - u);    out <- phi out std(c) / std(out) + (1 - phi) out,   std over the image's elements
//
// The deviations take the means first: a mean far above its deviation costs no digits.
static void guide_image(const GuideArgs& args, const float* conditional, const float* unconditional, float w,
                        float* out) {
  alignas(64) float c[chunk], u[chunk];
  const Range guided = {0, args.channels};
  const auto read = [&](const float* row, int channel, int64_t begin, int n, float* dst) {
    gather(row + begin * args.padded + channel, args.padded, n, dst);
  };
  double sum_c = 0.0, sum_out = 0.0;
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    float* dst = out + channel * args.pixels + begin;
    read(conditional, channel, begin, n, c);
    read(unconditional, channel, begin, n, u);
    for_vectors(n, [&](int i, auto part) {
      const Vec without = load(u + i, part);
      store(dst + i, without + w * (load(c + i, part) - without), part);
    });
    if (args.rescale == 0.0f) return;
    sum_c += sum_of(c, n);
    sum_out += sum_of(dst, n);
  });
  if (args.rescale == 0.0f) return;

  const double size = static_cast<double>(args.channels * args.pixels);
  double squares_c = 0.0, squares_out = 0.0;
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    read(conditional, channel, begin, n, c);
    squares_c += sum_of_squares(c, n, sum_c / size);
    squares_out += sum_of_squares(out + channel * args.pixels + begin, n, sum_out / size);
  });
  // phi out ratio + (1 - phi) out, with one product; the sizes cancel
  const float ratio = static_cast<float>(std::sqrt(squares_c / squares_out));
  const float factor = args.rescale * ratio + (1.0f - args.rescale);
  for_planes(guided, args.pixels, [&](int channel, int64_t begin, int n) {
    float* dst = out + channel * args.pixels + begin;
    for_vectors(n, [&](int i, auto part) { store(dst + i, factor * load(dst + i, part), part); });
  });
}

// An image whose weight is 1 keeps its conditional output bit for bit, whatever the unconditional one holds.
static void guide(const GuideArgs& args, Range images) {
  const int64_t row_size = args.pixels * args.padded;
  for (int image = images.begin; image < images.end; ++image) {
    const float* conditional = args.net + image * row_size;
    float* out = args.out + image * args.out_channels * args.pixels;
    const float w =
        args.guided ? guidance_weight(args.bank(args.table[image], args.row[image]).g, args.guidance[image]) : 1.0f;
    if (w != 1.0f) guide_image(args, conditional, args.net + (args.images + image) * row_size, w, out);
    for_planes({w != 1.0f ? args.channels : 0, args.out_channels}, args.pixels, [&](int channel, int64_t begin, int n) {
      gather(conditional + begin * args.padded + channel, args.padded, n, out + channel * args.pixels + begin);
    });
  }
}
