// The network's entrance, the embedding, and 2 x 2 averages.

static void input(const InputArgs& a, Range strips) {
  const int64_t plane = static_cast<int64_t>(a.map.height) * a.map.width;
  const int width = padded(a.channels * (a.combine == 3 ? 2 : 1)), per_row = a.map.strips();
  for (int s = strips.begin; s < strips.end; s++) {
    const int row = s / per_row, y0 = s % per_row * strip;
    const float* x = a.x + static_cast<int64_t>(row % a.images) * a.channels * plane;
    const float* m = a.class_image.base == nullptr ? nullptr : a.class_image(row);
    const int64_t last = std::min<int64_t>(y0 + strip, a.map.height) * a.map.width;
    for (int64_t p = static_cast<int64_t>(y0) * a.map.width; p < last; p++) {
      float* pixel = a.dst + (row * plane + p) * width;
      int c = 0;
      for (; c < a.channels; c++) {
        float v = x[c * plane + p];
        if (a.center) v = 2.0f * v - 1.0f;
        if (a.combine == 1) v += m[p * a.channels + c];
        if (a.combine == 2) v *= 1.0f + m[p * a.channels + c];
        pixel[c] = v;
      }
      if (a.combine == 3)
        for (int k = 0; k < a.channels; k++) pixel[c++] = m[p * a.channels + k];
      for (; c < width; c++) pixel[c] = 0.0f;
    }
  }
}

// dst [rows, padded features] = silu(time + class)
static void embed(RowVectors time, RowVectors classes, int features, float* dst, Range rows) {
  for (int row = rows.begin; row < rows.end; row++)
    for (int c = 0; c < padded(features); c += lanes) {
      Vec v = splat(0);
      for (int l = 0; l < lanes && c + l < features; l++) v[l] = time(row)[c + l] + classes(row)[c + l];
      store(dst + static_cast<int64_t>(row) * padded(features) + c, silu(v));
    }
}

// space: pool_size() numbers.
static void pool(const PoolArgs& a, Range strips, float* space) {
  const int channels = a.src.all_channels(), per_row = a.map.strips();
  for (int s = strips.begin; s < strips.end; s++) {
    const int row = s / per_row, y0 = s % per_row * strip, rows = std::min(strip, a.map.height - y0);
    for (int c = 0; c < channels; c += lanes) {
      read_pixels(a.src, false, row, 2 * y0, 2 * rows, 0, 2 * a.map.width, c, space);
      for (int y = 0; y < rows; y++)
        for (int x = 0; x < a.map.width; x++) {
          const float* p = space + (4 * y * a.map.width + 2 * x) * lanes;
          const float* q = p + 2 * a.map.width * lanes;
          const Vec sum = (load(p) + load(p + lanes)) + (load(q) + load(q + lanes));
          store(a.dst + ((static_cast<int64_t>(row) * a.map.height + y0 + y) * a.map.width + x) * channels + c,
                sum * 0.25f);
        }
    }
  }
}
