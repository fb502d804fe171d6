// Matrix products against packed panels: c [items, panel] = a [items, depth] b [depth, panel], in float or in bfloat16
// with sums in float. b of bfloat16 is [depth / 2, panel, 2].

// The widest block of accumulators that, with the row of b and a broadcast a, fits the registers: 6 x 4 vectors where
// there are 32 of them, 6 x 2 where there are 16.
static constexpr int block_items = 6;
static constexpr int block_vectors = lanes == 8 ? 2 : 4;
static constexpr int block_depth = 512;  // rows of b between two looks at c: 128 KB, half of what stays in L2

// sum[i][j] += a[i, k] b[k, j], over one k for float.
template <int items, int vectors>
static inline void multiply_step(Vec (&sum)[items][vectors], const float* a, int64_t lda, const float* b) {
  Vec row[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; j++) row[j] = load(b + j * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < items; i++) {
    const Vec x = splat(a[i * lda]);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] += x * row[j];
  }
}

// The same over two k for bfloat16, which lie side by side in a and in b.
template <int items, int vectors>
static inline void multiply_step(Vec (&sum)[items][vectors], const BF16* a, int64_t lda, const BF16* b) {
#ifdef __AVX512BF16__
  __m512bh row[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; j++) row[j] = (__m512bh)_mm512_loadu_si512(b + j * 2 * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < items; i++) {
    int32_t pair;
    std::memcpy(&pair, a + i * lda, sizeof pair);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = (Vec)_mm512_dpbf16_ps((__m512)sum[i][j], x, row[j]);
  }
#else
  (void)sum, (void)a, (void)lda, (void)b;
#endif
}

// Summands that a step takes.
template <class T>
static constexpr int step_depth = 1;
template <>
constexpr int step_depth<BF16> = 2;

// Of the rows of b behind these ones, which the next call will read, `lines` cache lines a step are asked for, from the
// line `line` on: weights pass by once, and seldom lie nearer than the third-level cache. So are the items behind these,
// which fill the first-level cache while these are multiplied.
template <int items, int vectors, int lines, class T>
static inline void multiply_block(int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc,
                                  bool accumulate, int line = 0) {
  constexpr int step = step_depth<T>, line_size = 64 / sizeof(T);
  Vec sum[items][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * lanes) : Vec{};
  const T* ahead = b + static_cast<int64_t>(depth) * panel + line * line_size;
  for (int k = 0; k < depth; k += step) {
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead + k * panel + l * line_size, 0, 2);
    __builtin_prefetch(a + items * lda + k * items, 0, 3);
    multiply_step(sum, a + k, lda, b + static_cast<int64_t>(k) * panel);
  }
#pragma GCC unroll 8
  for (int i = 0; i < items; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store(c + i * ldc + j * lanes, sum[i][j]);
}

template <int vectors, class T>
static void multiply_rows(int items, int depth, const T* a, int64_t lda, const T* b, float* c, int64_t ldc,
                          bool accumulate) {
  constexpr int lines = vectors * lanes * step_depth<T> * sizeof(T) / 64;
  const bool spread = items >= lines * block_items;  // a line a step in each of the first blocks, or all in the first
  int i = 0;
  if (!spread && items >= block_items) {
    multiply_block<block_items, vectors, lines>(depth, a, lda, b, c, ldc, accumulate);
    i = block_items;
  }
  for (; spread && i < lines * block_items; i += block_items)
    multiply_block<block_items, vectors, 1>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, i / block_items);
  for (; i + block_items <= items; i += block_items)
    multiply_block<block_items, vectors, 0>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  a += i * lda;
  c += i * ldc;
  const auto rest = [&]<int n>() {
    if (i == 0)
      multiply_block<n, vectors, lines>(depth, a, lda, b, c, ldc, accumulate);
    else
      multiply_block<n, vectors, 0>(depth, a, lda, b, c, ldc, accumulate);
  };
  switch (items - i) {
    case 1: return rest.template operator()<1>();
    case 2: return rest.template operator()<2>();
    case 3: return rest.template operator()<3>();
    case 4: return rest.template operator()<4>();
    case 5: return rest.template operator()<5>();
  }
}

// Only the first `width` columns of the panel are wanted. onto: added to what c holds. Every sum runs over k in order,
// whatever `items` is, so an item's bits do not depend on its neighbours.
template <class T>
__attribute__((noinline)) static void multiply(int items, int width, int depth, const T* a, int64_t lda, const T* b,
                                               float* c, int64_t ldc, bool onto = false) {
  for (int k = 0; k < depth; k += block_depth, onto = true) {
    const int part = std::min(block_depth, depth - k);
    for (int j = 0; j < width; j += block_vectors * lanes) {
      const T* rows = b + static_cast<int64_t>(k) * panel + j * step_depth<T>;
      switch (std::min(block_vectors, (width - j + lanes - 1) / lanes)) {
        case 1: multiply_rows<1>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 2: multiply_rows<2>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 3: multiply_rows<std::min(block_vectors, 3)>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
        case 4: multiply_rows<std::min(block_vectors, 4)>(items, part, a + k, lda, rows, c + j, ldc, onto); break;
      }
    }
  }
}

// `rounds` times as many multiply-adds as hide their own latency, on registers alone: what limits everything else. Each
// counts 2 lanes; the result keeps the compiler from leaving them out.
static constexpr int fma_chains = block_items * block_vectors;
static float fma(int64_t rounds) {
  Vec sum[fma_chains];
  for (int i = 0; i < fma_chains; i++) sum[i] = splat(static_cast<float>(i));  // equal chains would become one
  Vec x = splat(0.999f), y = splat(1e-3f);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < fma_chains; i++) sum[i] = sum[i] * x + y;
  }
  Vec total{};
  for (int i = 0; i < fma_chains; i++) total += sum[i];
  return total[0];
}
