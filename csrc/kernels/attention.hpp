// Attention, softmax(q k^T / sqrt(d)) v, one row and head at a time: two products with panels of keys and of values
// that are packed here, a block of keys after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "kernels/gemm.hpp"
#include "kernels/vec.hpp"

namespace fastdiff {
namespace {

// Reads one vector of a head's channels of key p, from channel k on, and applies the norm, if any. Lanes past the last
// channel are zeros.
inline Vec read_head(const AttentionArgs& a, RowVectors source, int row, int head, int p, int k) {
  Vec h = load_some(source(row) + static_cast<int64_t>(p) * a.key_stride + head * a.head_dim + k, a.head_dim - k);
  if (a.scale == nullptr) return h;
  const int64_t at = static_cast<int64_t>(row) * padded(a.head_dim) + k;
  return h * load(a.scale + at) + load(a.shift + at);
}

// Packs the values of a head's given keys, of which there are P, into v [width / slice, P, slice]; in bfloat16, into
// [width / slice, P / 2, slice, 2].
void pack_values(const AttentionArgs& a, int row, int head, Range given, float* v) {
  for (int p = 0; p < given.size(); p++)
    for (int k = 0; k < a.head_dim; k += lanes)
      store(v + (static_cast<int64_t>(k / slice) * given.size() + p) * slice + k % slice,
            read_head(a, a.values, row, head, given.begin + p, k));
}

void pack_values(const AttentionArgs& a, int row, int head, Range given, BF16* v) {
  constexpr int columns = together<BF16>;
  const int P = even(given.size());
  for (int p = 0; p < P; p += 2)
    for (int k = 0; k < a.head_dim; k += lanes)
      store_pairs(v + (static_cast<int64_t>(k / columns) * P + p) * columns + k % columns * 2,
                  read_head(a, a.values, row, head, given.begin + p, k),
                  p + 1 < given.size() ? read_head(a, a.values, row, head, given.begin + p + 1, k) : splat(0));
}

// Packs a head's given keys, transposed and divided by sqrt(d), into kt [keys / slice, d, slice]; in bfloat16, into
// [keys / slice, d / 2, slice, 2]. Columns past the last key are zeros. The loop over channels encloses the one over the
// keys that lie together, so that the lines of kt that are written stay in the L1 cache.
template <class T>
void pack_keys(const AttentionArgs& a, int row, int head, Range given, T* kt) {
  constexpr int step = step_depth<T>, columns = together<T>;
  const int d = ceil_div(a.head_dim, step) * step, P = given.size();
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  if (P % panel != 0)
    std::memset(kt + static_cast<int64_t>(P / panel) * d * panel, 0, sizeof(T) * static_cast<int64_t>(d) * panel);
  for (int first = 0; first < P; first += columns)
    for (int k = 0; k < d; k += lanes)
      for (int p = first; p < std::min(first + columns, P); p++) {
        T key[lanes];
        store(key, read_head(a, a.keys, row, head, given.begin + p, k) * scale);
        T* column = kt + (static_cast<int64_t>(first / columns) * d + k) * columns + p % columns * step;
        for (int i = 0; i < std::min(lanes, d - k); i += step)
          std::memcpy(column + static_cast<int64_t>(i) * columns, key + i, step * sizeof(T));
      }
}

// What a block of queries has of the keys so far: the largest score of each query, the sum of e^(score - top), and the
// sum of the values weighted by these.
struct Attended {
  float* tops;    // [queries]
  float* sums;    // [queries]
  float* result;  // [queries, width]
  int width, head_dim;
};

// Replaces the scores [n, keys] of a block of keys by e^(score - top), and adds them to what was attended to before,
// unless this is the first block. That is scaled to the new top, but its result does not have this block's values yet.
// Only the first P columns are keys; the rest is padding.
void softmax(float* scores, int n, int P, int keys, bool first, const Attended& so_far) {
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
    if (!first && so_far.tops[i] > top) top = so_far.tops[i];
    Vec sum = splat(0);
    for (int p = 0; p < keys; p += lanes) {
      const Vec e = exp(load(s + p) - top);
      store(s + p, e);
      sum += e;
    }
    // exp() gives e^-87 and not 0 for the padding. The sum is at least 1, so that does not change it.
    float added = total(sum);
    if (!first) {
      const Vec factor = exp(splat(so_far.tops[i] - top));
      added += so_far.sums[i] * factor[0];
      float* result = so_far.result + static_cast<int64_t>(i) * so_far.width;
      for (int k = 0; k < so_far.head_dim; k += lanes) store(result + k, load(result + k) * factor);
    }
    so_far.tops[i] = top;
    so_far.sums[i] = added;
  }
}

// Returns the rows of a matrix as operands of a product: floats as they are, bfloat16 as a rounded, zero-padded copy in
// `space` [n, columns].
const float* as_operand(const float* rows, int64_t, int, int, int, float*) { return rows; }
const BF16* as_operand(const float* rows, int64_t stride, int n, int count, int columns, BF16* space) {
  for (int i = 0; i < n; i++)
    for (int k = 0; k < columns; k += lanes)
      store(space + static_cast<int64_t>(i) * columns + k, load_some(rows + i * stride + k, count - k));
  return space;
}

// Computes the given units. A unit is a block of queries of one head: unit = (row * heads + head) * blocks + block.
template <class T>
void attend(const AttentionArgs& a, Range units, float* space) {
  constexpr bool rounds = step_depth<T> == 2;
  constexpr int query_block = AttentionArgs::block, key_block = AttentionArgs::key_block;
  const int inner = a.heads * a.head_dim, to = padded(inner), d = a.head_dim;
  const int most = std::min(a.keys_count, key_block), most_keys = ceil_div(most, panel) * panel;
  const int width = ceil_div(d, panel) * panel, depth = rounds ? even(d) : d, columns = padded(d);
  const int blocks = a.blocks();
  // Working space. An array of BF16 takes half as many floats as it has numbers.
  T* kt = reinterpret_cast<T*>(space);                                          // [keys / slice, depth, slice]
  T* v = kt + static_cast<int64_t>(most_keys) * depth;                          // [width / slice, last, slice]
  T* operand = v + static_cast<int64_t>(width) * (rounds ? even(most) : most);  // [query_block, keys or columns]
  float* scores = reinterpret_cast<float*>(operand + (rounds ? query_block * std::max(most_keys, columns) : 0));
  float* state = scores + static_cast<int64_t>(query_block) * most_keys;  // [together, query_block, 2 + width]
  int packed = -1;
  for (int begin = units.begin; begin < units.end;) {
    const int pair = begin / blocks, row = pair / a.heads, head = pair % a.heads;
    const int end = std::min({begin + a.together(), units.end, (pair + 1) * blocks});
    const auto attended = [&](int unit) {
      float* own = state + static_cast<int64_t>(unit - begin) * query_block * (2 + width);
      return Attended{own, own + query_block, own + 2 * query_block, width, d};
    };
    const auto first_query = [&](int unit) { return unit % blocks * query_block; };
    for (int from = 0; from < a.keys_count; from += key_block) {
      const Range given{from, std::min(from + key_block, a.keys_count)};
      const int P = given.size(), keys = ceil_div(P, panel) * panel, last = rounds ? even(P) : P;
      if (pair != packed) {
        pack_values(a, row, head, given, v);
        pack_keys(a, row, head, given, kt);
        if (a.keys_count <= key_block) packed = pair;
      }
      for (int unit = begin; unit < end; unit++) {
        const int q0 = first_query(unit), n = std::min(query_block, a.pixels - q0);
        const float* queries = a.queries + (static_cast<int64_t>(row) * a.pixels + q0) * a.query_stride + head * d;
        const T* q = as_operand(queries, a.query_stride, n, d, columns, operand);
        for (int p = 0; p < keys; p += panel)
          multiply(n, panel, depth, q, rounds ? columns : a.query_stride, kt + static_cast<int64_t>(p) * depth,
                   scores + p, keys);
        const Attended so_far = attended(unit);
        softmax(scores, n, P, keys, from == 0, so_far);
        const T* weights = as_operand(scores, keys, n, keys, keys, operand);
        for (int k = 0; k < width; k += panel)
          multiply(n, std::min(panel, d - k), last, weights, keys, v + static_cast<int64_t>(k) * last,
                   so_far.result + k, width, from > 0);
      }
    }
    for (int unit = begin; unit < end; unit++) {
      const Attended done = attended(unit);
      const int q0 = first_query(unit), n = std::min(query_block, a.pixels - q0);
      for (int i = 0; i < n; i++) {
        float* pixel = a.dst + (static_cast<int64_t>(row) * a.pixels + q0 + i) * to;
        const float share = 1.0f / done.sums[i];
        for (int k = 0; k < d; k++) pixel[head * d + k] = done.result[static_cast<int64_t>(i) * width + k] * share;
        if (head + 1 == a.heads)
          for (int k = inner; k < to; k++) pixel[k] = 0.0f;
      }
    }
    begin = end;
  }
}

void attention(const AttentionArgs& a, Range units, float* space) {
  forget_tiles();
  if (a.bf16)
    attend<BF16>(a, units, space);
  else
    attend<float>(a, units, space);
}

}  // namespace
}  // namespace fastdiff
