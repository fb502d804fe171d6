// softmax(q k^T / sqrt(d)) v for one (row, head) at a time, as two products against panels packed on the spot.

// Units of work are blocks of queries, numbered through pairs: unit = (row * heads + head) * blocks + block.
static void attention(const AttentionArgs& a, Range units, float* space) {
  const int inner = a.heads * a.head_dim, to = padded(inner), d = a.head_dim, P = a.pixels;
  const int keys = ceil_div(P, panel) * panel, width = ceil_div(d, panel) * panel;
  const int blocks = a.blocks();
  constexpr int query_block = AttentionArgs::block;
  float* kt = space;                                         // [keys / panel, d, panel]
  float* v = kt + static_cast<int64_t>(keys) * d;            // [width / panel, P, panel]
  float* scores = v + static_cast<int64_t>(width) * P;       // [query_block, keys]
  float* result = scores + static_cast<int64_t>(query_block) * keys;  // [query_block, width]
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  int packed = -1;
  for (int unit = units.begin; unit < units.end; unit++) {
    const int pair = unit / blocks, row = pair / a.heads, head = pair % a.heads;
    const float* queries = a.queries + static_cast<int64_t>(row) * P * a.query_stride + head * d;
    if (pair != packed) {
      std::memset(kt, 0, sizeof(float) * (static_cast<int64_t>(keys) * d + static_cast<int64_t>(width) * P));
      for (int p = 0; p < P; p++) {
        const int64_t pixel = (static_cast<int64_t>(row) * P + p) * a.key_stride + head * d;
        const float *key = a.keys + pixel, *value = a.values + pixel;
        float* column = kt + static_cast<int64_t>(p / panel) * d * panel + p % panel;
        if (a.scale == nullptr) {
          for (int k = 0; k < d; k++) column[static_cast<int64_t>(k) * panel] = key[k] * scale;
          for (int k = 0; k < d; k += panel)
            std::memcpy(v + (static_cast<int64_t>(k / panel) * P + p) * panel, value + k,
                        sizeof(float) * std::min(panel, d - k));
          continue;
        }
        const float *by = a.scale + static_cast<int64_t>(row) * padded(d), *to = a.shift + (by - a.scale);
        for (int k = 0; k < d; k++) {
          const float h = key[k] * by[k] + to[k];
          column[static_cast<int64_t>(k) * panel] = h * scale;
          v[(static_cast<int64_t>(k / panel) * P + p) * panel + k % panel] = h;
        }
      }
      packed = pair;
    }
    const int q0 = unit % blocks * query_block, n = std::min(query_block, P - q0);
    for (int p = 0; p < keys; p += panel)
      multiply(n, panel, d, queries + static_cast<int64_t>(q0) * a.query_stride, a.query_stride, kt + static_cast<int64_t>(p) * d, scores + p,
               keys);
    float sums[query_block];
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
    for (int k = 0; k < width; k += panel)
      multiply(n, panel, P, scores, keys, v + static_cast<int64_t>(k) * P, result + k, width);
    for (int i = 0; i < n; i++) {
      float* pixel = a.dst + (static_cast<int64_t>(row) * P + q0 + i) * to;
      for (int k = 0; k < d; k++) pixel[head * d + k] = result[static_cast<int64_t>(i) * width + k] * sums[i];
      if (head + 1 == a.heads)
        for (int k = inner; k < to; k++) pixel[k] = 0.0f;
    }
  }
}
