// Winograd's minimal filtering, y = A^T [(G g G^T) . (B^T d B)] A (Lavin & Gray 2016, arXiv:1509.09308), for 3 x 3
// kernels. With the points p_j and M(x) = prod (x - p_j): row j of B^T holds the coefficients of M(x) / (x - p_j), the
// last row those of M(x); A^T[i][j] = p_j^i and its last column is (0, .., 0, 1); G is in the packing of weights.

// F(2, 3): points 0, 1, -1, inf.
struct Winograd2 {
  static constexpr int in = 4, out = 2;
  static inline void input(const Vec* d, Vec* t) {
    t[0] = d[2] - d[0];
    t[1] = d[2] + d[1];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static inline void output(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

// F(4, 3): points 0, a, -a, b, -b, inf with a = 3/4, b = 3/2, which round less than the usual 1 and 2 do.
struct Winograd4 {
  static constexpr int in = 6, out = 4;
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;
  static inline void input(const Vec* d, Vec* t) {
    t[0] = a2 * b2 * d[0] - (a2 + b2) * d[2] + d[4];
    const Vec even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const Vec even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = a2 * b2 * d[1] - (a2 + b2) * d[3] + d[5];
  }
  static inline void output(const Vec* m, Vec* y) {
    const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4], diff_a = m[1] - m[2], diff_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * diff_a + b * diff_b;
    y[2] = a2 * sum_a + b2 * sum_b;
    y[3] = a * a2 * diff_a + b * b2 * diff_b + m[5];
  }
};

// B^T d of one column of pixels [in, columns, lanes].
template <class F>
static inline void transform_column(const float* pixels, int columns, Vec (&half)[F::in][F::in], int x) {
  Vec d[F::in], t[F::in];
#pragma GCC unroll 6
  for (int y = 0; y < F::in; y++) d[y] = load(pixels + y * columns * lanes);
  F::input(d, t);
#pragma GCC unroll 6
  for (int y = 0; y < F::in; y++) half[y][x] = t[y];
}

// A row of `tiles` tiles side by side, from the first one's pixels on; loaded: where its position 0 goes, `depth` apart
// from the next tile's. Tiles share two columns. Of Winograd2 they are kept: all 16 numbers stay in registers. Of
// Winograd4 they are transformed again: 36 do not, and to move them costs as much.
template <class F, class T>
static inline void transform_input(const float* pixels, int columns, int tiles, T* loaded, int64_t depth,
                                   int64_t stride) {
  constexpr bool keep = F::in == 4;
  constexpr int shared = F::in - F::out;
  Vec half[F::in][F::in];
  if (keep)
#pragma GCC unroll 6
    for (int x = 0; x < shared; x++) transform_column<F>(pixels + x * lanes, columns, half, F::out + x);
  for (int tile = 0; tile < tiles; tile++, pixels += F::out * lanes, loaded += depth) {
    if (keep)
#pragma GCC unroll 6
      for (int y = 0; y < F::in; y++)
#pragma GCC unroll 6
        for (int x = 0; x < shared; x++) half[y][x] = half[y][F::out + x];
#pragma GCC unroll 6
    for (int x = keep ? shared : 0; x < F::in; x++) transform_column<F>(pixels + x * lanes, columns, half, x);
#pragma GCC unroll 6
    for (int y = 0; y < F::in; y++) {
      Vec t[F::in];
      F::input(half[y], t);
#pragma GCC unroll 6
      for (int x = 0; x < F::in; x++) store(loaded + (y * F::in + x) * stride, t[x]);
    }
  }
}

// products: position 0 of the tile; y: [out, out].
template <class F>
static inline void transform_output(const float* products, int64_t stride, Vec* y) {
  Vec half[F::out][F::in];
#pragma GCC unroll 6
  for (int j = 0; j < F::in; j++) {
    Vec m[F::in], t[F::out];
#pragma GCC unroll 6
    for (int i = 0; i < F::in; i++) m[i] = load(products + (i * F::in + j) * stride);
    F::output(m, t);
#pragma GCC unroll 6
    for (int i = 0; i < F::out; i++) half[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < F::out; i++) F::output(half[i], y + i * F::out);
}
