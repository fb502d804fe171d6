// softmax(q k^T / sqrt(d)) v for one (row, head) at a time, as two products against panels packed on the spot.

// v [width / panel, P, panel]: the head's values, normalised where there is a norm.
static void pack_values(const AttentionArgs& a, int row, int head, float* v) {
  const int d = a.head_dim, P = a.pixels;
  for (int p = 0; p < P; p++) {
    const float* value = a.values + (static_cast<int64_t>(row) * P + p) * a.key_stride + head * d;
    for (int k = 0; k < d; k += lanes) {
      Vec h = load_some(value + k, d - k);
      if (a.scale != nullptr) {
        const int64_t at = static_cast<int64_t>(row) * padded(d) + k;
        h = h * load(a.scale + at) + load(a.shift + at);
      }
      store(v + (static_cast<int64_t>(k / panel) * P + p) * panel + k % panel, h);
    }
  }
}

// kt [keys / panel, d, panel]: the head's keys, transposed and divided by sqrt(d); zeros past the last. Normalised ones
// are the values.
static void pack_keys(const AttentionArgs& a, int row, int head, const float* v, float* kt) {
  constexpr int some = 16;  // depths at a time, whose lines of kt stay in the first-level cache
  const int d = a.head_dim, P = a.pixels;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  if (P % panel != 0)
    std::memset(kt + static_cast<int64_t>(P / panel) * d * panel, 0, sizeof(float) * static_cast<int64_t>(d) * panel);
  for (int first = 0; first < P; first += panel)
    for (int k = 0; k < d; k += some)
      for (int p = first; p < std::min(first + panel, P); p++) {
        const float* key = a.scale != nullptr
                               ? v + (static_cast<int64_t>(k / panel) * P + p) * panel + k % panel
                               : a.keys + (static_cast<int64_t>(row) * P + p) * a.key_stride + head * d + k;
        float* column = kt + (static_cast<int64_t>(first / panel) * d + k) * panel + p % panel;
        for (int i = 0; i < std::min(some, d - k); i++) column[static_cast<int64_t>(i) * panel] = key[i] * scale;
      }
}

// scores [n, keys] -> e^(score - the largest of the row); sums: 1 / their sum. P: how many keys there are.
static void softmax(float* scores, int n, int P, int keys, float* sums) {
  for (int i = 0; i < n; i++) {
    float* s = scores + static_cast<int64_t>(i) * keys;
    for (int p = P; p < keys; p++) s[p] = -1e30f;
    Vec most = load(s);
    for (int p = lanes; p < keys; p += lanes) {
      const Vec x = load(s + p);
      most = x > most ? x : most;
    }
    float top = most[0];
    for (int l = 1; l < lanes; l++) top = most[l] > top ? most[l] : top;
    Vec sum = splat(0);
    for (int p = 0; p < keys; p += lanes) {
      const Vec e = exp(load(s + p) - top);
      store(s + p, e);
      sum += e;
    }
    float total = 0;
    for (int l = 0; l < lanes; l++) total += sum[l];
    // exp() stops at e^-87, not at 0, so the padding has added that much; a sum is at least 1 and does not hear it.
    sums[i] = 1.0f / total;
  }
}

// Units of work are blocks of queries, numbered through pairs: unit = (row * heads + head) * blocks + block.
static void attention(const AttentionArgs& a, Range units, float* space) {
  const int inner = a.heads * a.head_dim, to = padded(inner), d = a.head_dim, P = a.pixels;
  const int keys = ceil_div(P, panel) * panel, width = ceil_div(d, panel) * panel;
  const int blocks = a.blocks();
  constexpr int query_block = AttentionArgs::block;
  float* kt = space;                                                  // [keys / panel, d, panel]
  float* v = kt + static_cast<int64_t>(keys) * d;                     // [width / panel, P, panel]
  float* scores = v + static_cast<int64_t>(width) * P;                // [query_block, keys]
  float* result = scores + static_cast<int64_t>(query_block) * keys;  // [query_block, width]
  int packed = -1;
  for (int unit = units.begin; unit < units.end; unit++) {
    const int pair = unit / blocks, row = pair / a.heads, head = pair % a.heads;
    const float* queries = a.queries + static_cast<int64_t>(row) * P * a.query_stride + head * d;
    if (pair != packed) {
      pack_values(a, row, head, v);
      pack_keys(a, row, head, v, kt);
      packed = pair;
    }
    const int q0 = unit % blocks * query_block, n = std::min(query_block, P - q0);
    for (int p = 0; p < keys; p += panel)
      multiply(n, panel, d, queries + static_cast<int64_t>(q0) * a.query_stride, a.query_stride,
               kt + static_cast<int64_t>(p) * d, scores + p, keys);
    float sums[query_block];
    softmax(scores, n, P, keys, sums);
    for (int k = 0; k < width; k += panel)
      multiply(n, std::min(panel, d - k), P, scores, keys, v + static_cast<int64_t>(k) * P, result + k, width);
    for (int i = 0; i < n; i++) {
      float* pixel = a.dst + (static_cast<int64_t>(row) * P + q0 + i) * to;
      for (int k = 0; k < d; k++) pixel[head * d + k] = result[static_cast<int64_t>(i) * width + k] * sums[i];
      if (head + 1 == a.heads)
        for (int k = inner; k < to; k++) pixel[k] = 0.0f;
    }
  }
}
