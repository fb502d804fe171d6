// Tests of the engine without Python, which run under sanitizers. Every operation runs at shapes that are no multiple
// of any block size, in buffers of exactly the size it needs, and is compared with plain loops in double precision.
// Prints the checks that failed; the exit code is their number.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.hpp"
#include "expect.hpp"
#include "isa.hpp"
#include "team.hpp"

using namespace fastdiff;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED: %s\n", what.c_str());
}

namespace {

std::mt19937 generator(1);

std::vector<float> random(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (float& x : v) x = normal(generator);
  return v;
}

// Returns [pixels, padded channels] of random numbers, whose padding is zeros.
std::vector<float> random_map(int pixels, int channels) {
  std::vector<float> v(static_cast<size_t>(pixels) * padded(channels));
  for (int p = 0; p < pixels; p++) {
    const std::vector<float> x = random(channels);
    std::copy(x.begin(), x.end(), v.begin() + static_cast<size_t>(p) * padded(channels));
  }
  return v;
}

struct Case {
  int rows, height, width;
  std::vector<int> channels;  // of each source
  int outputs, kernel, stride;
  bool upsample, norm, residual;
  Method method;
  bool circular = false, relu = false, bf16 = false;
  std::string name() const {
    std::string s = "conv " + std::to_string(rows) + " x " + std::to_string(height) + "x" + std::to_string(width);
    for (int c : channels) s += " " + std::to_string(c);
    return s + " -> " + std::to_string(outputs) + " kernel " + std::to_string(kernel) + " stride " +
           std::to_string(stride) + " method " + std::to_string(static_cast<int>(method)) + (upsample ? " up" : "") +
           (norm ? " norm" : "") + (residual ? " residual" : "") + (circular ? " circular" : "") +
           (relu ? " relu" : "") + (bf16 ? " bf16" : "");
  }
};

// Returns G for the points of kernels/winograd.hpp.
std::vector<std::vector<double>> winograd_g(Method method) {
  const std::vector<double> points =
      method == Method::winograd2 ? std::vector<double>{0, 1, -1} : std::vector<double>{0, 0.75, -0.75, 1.5, -1.5};
  std::vector<std::vector<double>> g;
  for (double p : points) {
    double n = 1;
    for (double q : points)
      if (q != p) n *= p - q;
    g.push_back({1 / n, p / n, p * p / n});
  }
  g.push_back({0, 0, 1});
  return g;
}

// Returns the place of a row and a column in a panel of floats with `depth` rows, or of bfloat16 before rounded().
size_t in_panel(const Kernels& kernels, bool bf16, int depth, int row, int column) {
  const size_t together = kernels.columns(bf16);
  return (column / together * depth + row) * together + column % together;
}

// Packs weights [outputs, channels of all sources, kernel, kernel] as ConvArgs describes it.
std::vector<float> pack(const Kernels& kernels, const Case& c, const std::vector<float>& weights, const ConvArgs& a) {
  std::vector<float> packed(static_cast<size_t>(a.panels()) * a.positions() * a.depth() * panel);
  int total = 0;
  for (int channels : c.channels) total += channels;
  const auto g = c.method == Method::direct ? std::vector<std::vector<double>>{} : winograd_g(c.method);
  for (int n = 0; n < c.outputs; n++)
    for (int k = 0; k < total; k++) {
      const int place = k < c.channels[0] ? k : padded(c.channels[0]) + k - c.channels[0];
      const float* w = &weights[(static_cast<size_t>(n) * total + k) * c.kernel * c.kernel];
      const auto at = [&](int position, int depth) -> float& {
        return packed[(static_cast<size_t>(n / panel) * a.positions() + position) * a.depth() * panel +
                      in_panel(kernels, a.bf16, a.depth(), depth, n % panel)];
      };
      if (c.method == Method::direct) {
        for (int tap = 0; tap < c.kernel * c.kernel; tap++) at(0, tap * a.src.all_channels() + place) = w[tap];
        continue;
      }
      const int size = static_cast<int>(g.size());
      for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
          double sum = 0;
          for (int y = 0; y < 3; y++)
            for (int x = 0; x < 3; x++) sum += g[i][y] * w[3 * y + x] * g[j][x];
          at(i * size + j, place) = static_cast<float>(sum);
        }
    }
  return packed;
}

// Returns the bits of the nearest bfloat16 number, and the number that bits are of.
uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float of_bf16(uint16_t upper) {
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds packed weights to bfloat16 [.., depth / 2, columns, 2].
std::vector<uint16_t> rounded(const Kernels& kernels, const std::vector<float>& packed, int depth) {
  const size_t columns = kernels.columns(true);
  std::vector<uint16_t> pairs(packed.size());
  for (size_t i = 0; i < packed.size(); i++) {
    const size_t block = i / columns / depth, k = i / columns % depth, n = i % columns;
    pairs[((block * depth + k / 2 * 2) * columns) + 2 * n + k % 2] = nearest_bf16(packed[i]);
  }
  return pairs;
}

void check_conv(const Kernels& kernels, int threads, const Case& c) {
  const int in_h = c.height, in_w = c.width, up = c.upsample ? 2 : 1, before = c.kernel / 2;
  const int H = (in_h * up + 2 * before - c.kernel) / c.stride + 1;
  const int W = (in_w * up + 2 * before - c.kernel) / c.stride + 1;
  int total = 0;
  for (int channels : c.channels) total += channels;
  const int groups = total % 3 == 0 ? 3 : 1;

  ConvOp op{};
  ConvArgs& a = op.conv;
  std::vector<std::vector<float>> sources, statistics;
  a.src.count = static_cast<int>(c.channels.size());
  for (int s = 0; s < a.src.count; s++) {
    sources.push_back(random_map(c.rows * in_h * in_w, c.channels[s]));
    a.src.data[s] = sources[s].data();
    a.src.channels[s] = padded(c.channels[s]);
  }
  a.src.map = {in_h, in_w};
  a.src.silu = c.norm;
  a.map = {H, W};
  a.kernel = c.kernel;
  a.stride = c.stride;
  a.padding = before;
  a.circular = c.circular;
  a.upsample = c.upsample;
  a.method = c.method;
  a.relu = c.relu;
  a.outputs = padded(c.outputs);
  a.inverse_divide = 0.5f;
  const std::vector<float> weights = random(static_cast<size_t>(c.outputs) * total * c.kernel * c.kernel);
  std::vector<float> bias = random(c.outputs), emb = random(static_cast<size_t>(c.rows) * c.outputs);
  a.bf16 = c.bf16;
  const std::vector<float> packed = pack(kernels, c, weights, a);
  const std::vector<uint16_t> halves = rounded(kernels, packed, a.depth());
  bias.resize(a.outputs);
  if (c.bf16)
    a.weights = halves.data();
  else
    a.weights = packed.data();
  a.bias = bias.data();
  a.emb = {emb.data(), nullptr, c.outputs};
  a.emb_channels = c.outputs;
  const std::vector<float> residual = random_map(c.rows * H * W, c.outputs);
  if (c.residual) a.residual = residual.data();
  std::vector<float> dst(residual.size(), std::numeric_limits<float>::quiet_NaN());
  std::vector<float> measured(static_cast<size_t>(c.rows) * a.map.strips() * 2 * a.outputs);
  a.dst = dst.data();
  a.statistics = measured.data();

  // Compute the norm's inputs, the statistics of each strip, from their definition.
  std::vector<float> gamma = random(total), beta = random(total);
  if (c.norm) {
    NormArgs& n = op.norm;
    n.count = a.src.count;
    n.map = {in_h, in_w};
    n.groups = groups;
    n.eps = 1e-5f;
    n.gamma = gamma.data();
    n.beta = beta.data();
    for (int s = 0; s < n.count; s++) {
      const int stride = padded(c.channels[s]), strips = n.map.strips();
      statistics.emplace_back(static_cast<size_t>(c.rows) * strips * 2 * stride);
      n.channels[s] = c.channels[s];
      for (int row = 0; row < c.rows; row++)
        for (int t = 0; t < strips; t++)
          for (int k = 0; k < stride; k++) {
            const int first = t * strip * in_w, last = std::min((t + 1) * strip, in_h) * in_w;
            const float* x = &sources[s][static_cast<size_t>(row) * in_h * in_w * stride + k];
            double mean = 0, squares = 0;
            for (int p = first; p < last; p++) mean += x[static_cast<size_t>(p) * stride] / (last - first);
            for (int p = first; p < last; p++) squares += std::pow(x[static_cast<size_t>(p) * stride] - mean, 2);
            float* to = &statistics[s][(static_cast<size_t>(row) * strips + t) * 2 * stride + k];
            to[0] = static_cast<float>(mean);
            to[stride] = static_cast<float>(squares);
          }
      n.statistics[s] = statistics[s].data();
    }
  }

  Engine engine(kernels, threads, c.rows);
  engine.add(op);
  engine.run(0, 1);

  // Compute the same in double. h [rows, in_h, in_w, total] is the normalised input of the convolution.
  std::vector<double> h(static_cast<size_t>(c.rows) * in_h * in_w * total);
  for (int p = 0; p < c.rows * in_h * in_w; p++)
    for (int k = 0, s = 0, local = 0; k < total; k++, local++) {
      if (local == c.channels[s]) s++, local = 0;
      h[static_cast<size_t>(p) * total + k] = sources[s][static_cast<size_t>(p) * padded(c.channels[s]) + local];
    }
  if (c.norm)
    for (int row = 0; row < c.rows; row++)
      for (int g = 0; g < groups; g++) {
        const int size = total / groups, pixels = in_h * in_w;
        double mean = 0, var = 0;
        const auto at = [&](int p, int k) -> double& {
          return h[(static_cast<size_t>(row) * pixels + p) * total + g * size + k];
        };
        for (int p = 0; p < pixels; p++)
          for (int k = 0; k < size; k++) mean += at(p, k) / (pixels * size);
        for (int p = 0; p < pixels; p++)
          for (int k = 0; k < size; k++) var += std::pow(at(p, k) - mean, 2) / (pixels * size);
        for (int p = 0; p < pixels; p++)
          for (int k = 0; k < size; k++) {
            const double y = (at(p, k) - mean) / std::sqrt(var + 1e-5) * gamma[g * size + k] + beta[g * size + k];
            at(p, k) = y / (1 + std::exp(-y));
          }
      }
  double error = 0, norm = 0, rest = 0;
  for (int row = 0; row < c.rows; row++)
    for (int y = 0; y < H; y++)
      for (int x = 0; x < W; x++) {
        const size_t pixel = (static_cast<size_t>(row) * H + y) * W + x;
        for (int n = 0; n < c.outputs; n++) {
          double sum = bias[n] + emb[static_cast<size_t>(row) * c.outputs + n];
          for (int ky = 0; ky < c.kernel; ky++)
            for (int kx = 0; kx < c.kernel; kx++) {
              int sy = y * c.stride + ky - before, sx = x * c.stride + kx - before;
              if (c.circular) {
                sy = (sy + in_h * up) % (in_h * up);
                sx = (sx + in_w * up) % (in_w * up);
              }
              if (sy < 0 || sx < 0 || sy >= in_h * up || sx >= in_w * up) continue;
              const double* from = &h[((static_cast<size_t>(row) * in_h + sy / up) * in_w + sx / up) * total];
              for (int k = 0; k < total; k++)
                sum += from[k] * weights[((static_cast<size_t>(n) * total + k) * c.kernel + ky) * c.kernel + kx];
            }
          if (c.residual) sum += residual[pixel * a.outputs + n];
          const double got = dst[pixel * a.outputs + n], wanted = c.relu ? std::max(0.5 * sum, 0.0) : 0.5 * sum;
          error += std::pow(got - wanted, 2);
          norm += std::pow(wanted, 2);
        }
        for (int n = c.outputs; n < a.outputs; n++) rest += std::fabs(dst[pixel * a.outputs + n]);
      }
  // bfloat16 has 8 bits, and Winograd's transforms amplify what is rounded.
  const double most = c.method == Method::direct ? 4e-3 : c.method == Method::winograd2 ? 7e-3 : 2e-2;
  expect(std::sqrt(error / norm) < (c.bf16 ? most : 5e-6),
         std::string(kernels.name) + " " + c.name() + ": relative error " + std::to_string(std::sqrt(error / norm)));
  expect(rest == 0, c.name() + ": padding is not zero");
}

// Replaces denormal numbers by zeros.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Checks each bit of products on tiles, of numbers that are exact in bfloat16 and partly denormal: as the processor's
// manual has it, products of even k and of odd k are summed apart by fused multiply-adds, then both are added to the sum
// of the 32 values of k before; denormal numbers are zeros, those that are read and those that result.
void check_tiles(const Kernels& kernels) {
  constexpr int pixels = 45, channels = 144, outputs = 80;
  const auto numbers = [](size_t n) {
    std::vector<float> v = random(n);
    for (size_t i = 0; i < n; i++) {
      if (i % 5 == 0) v[i] *= 1e-30f;
      if (i % 11 == 0) v[i] = std::ldexp(v[i], -130);  // denormal, or nearly
      v[i] = of_bf16(nearest_bf16(v[i]));
    }
    return v;
  };
  const Case c{1, 5, 9, {channels}, outputs, 1, 1, false, false, false, Method::direct};
  ConvOp op{};
  ConvArgs& a = op.conv;
  const std::vector<float> x = numbers(pixels * channels), weights = numbers(outputs * channels);
  a.src.count = 1;
  a.src.data[0] = x.data();
  a.src.channels[0] = channels;
  a.src.map = a.map = {5, 9};
  a.kernel = a.stride = 1;
  a.bf16 = true;
  a.outputs = padded(outputs);
  a.inverse_divide = 1.0f;
  const std::vector<uint16_t> packed = rounded(kernels, pack(kernels, c, weights, a), channels);
  const std::vector<float> bias(a.outputs);
  std::vector<float> dst(pixels * a.outputs);
  a.weights = packed.data();
  a.bias = bias.data();
  a.dst = dst.data();
  Engine engine(kernels, 1, 1);
  engine.add(op);
  engine.run(0, 1);
  int different = 0;
  for (int p = 0; p < pixels; p++)
    for (int n = 0; n < outputs; n++) {
      float sum = 0;
      for (int k = 0; k < channels;) {
        float even = 0, odd = 0;
        for (const int end = std::min(k + 32, channels); k < end; k += 2) {
          const float* from = &x[p * channels + k];
          const float* w = &weights[n * channels + k];
          even = flushed(std::fma(flushed(from[0]), flushed(w[0]), even));
          odd = flushed(std::fma(flushed(from[1]), flushed(w[1]), odd));
        }
        sum = flushed(sum + flushed(even + odd));
      }
      different += dst[static_cast<size_t>(p) * a.outputs + n] != sum;
    }
  expect(different == 0, std::string(kernels.name) + ": " + std::to_string(different) + " products have other bits");
}

// Steps `rows` evaluations of the images that `image_of_row` names, the last `guided` of them unconditional, on an engine
// for `capacity` rows whose buffers have exactly that many, and returns the images and `net` one after the other.
std::vector<float> step_some(const Kernels& kernels, int threads, int capacity, Method method,
                             const std::vector<int64_t>& image_of_row, int guided) {
  constexpr int images = 6, C = 3, H = 9, W = 7, outputs = 70, pixels = H * W;
  const int rows = static_cast<int>(image_of_row.size()), taking = rows - guided;
  generator.seed(7);
  std::vector<float> inputs_x(static_cast<size_t>(capacity) * C * pixels), x = random(images * C * pixels);
  std::vector<float> map(static_cast<size_t>(capacity) * pixels * padded(C)),
      out(static_cast<size_t>(capacity) * pixels * padded(C)),
      middle(static_cast<size_t>(capacity) * pixels * padded(outputs));
  std::vector<int64_t> timestep(capacity), label(capacity), timesteps(rows);
  const auto conv = [&](int from, int to, std::vector<float>& src, std::vector<float>& dst, std::vector<float>& packed,
                        std::vector<float>& bias) {
    const Case c{capacity, H, W, {from}, to, 3, 1, false, false, false, method};
    ConvOp op{};
    ConvArgs& a = op.conv;
    a.src.count = 1;
    a.src.data[0] = src.data();
    a.src.channels[0] = padded(from);
    a.src.map = a.map = {H, W};
    a.kernel = 3;
    a.stride = a.padding = 1;
    a.method = method;
    a.outputs = padded(to);
    a.inverse_divide = 1.0f;
    packed = pack(kernels, c, random(static_cast<size_t>(to) * from * 9), a);
    bias = random(to);
    bias.resize(a.outputs);
    a.weights = packed.data();
    a.bias = bias.data();
    a.dst = dst.data();
    return op;
  };
  std::vector<float> weights, more_weights, bias, more_bias;
  Engine engine(kernels, threads, capacity);
  engine.add(InputArgs{inputs_x.data(), RowVectors{}, capacity, C, {H, W}, false, 0, map.data()});
  engine.add(conv(C, outputs, map, middle, weights, bias));
  engine.add(conv(outputs, C, middle, out, more_weights, more_bias));

  std::vector<float> net(static_cast<size_t>(rows) * pixels * padded(C)), guided_out(images * C * pixels);
  Batch batch{};
  batch.rows = rows;
  batch.conditional = taking;
  batch.image_of_row = image_of_row.data();
  batch.timestep = timesteps.data();
  batch.image_size = C * pixels;
  batch.out_size = pixels * padded(C);
  batch.x = x.data();
  batch.net = net.data();
  Coefficients k{};
  k.ax = 0.5f, k.ao = 0.25f, k.g = 1.0f, k.c = 1.0f;
  const std::vector<int64_t> zeros(images);
  std::vector<int> pair(taking, -1);
  for (int i = taking; i < rows; i++)
    pair[std::find(image_of_row.begin(), image_of_row.begin() + taking, image_of_row[i]) - image_of_row.begin()] = i;
  std::vector<float> scale(images, 2.0f), rescale(images, 0.5f);
  GuideArgs guide;
  guide.bank = {&k.t, 1};
  guide.table = guide.row = zeros.data();
  guide.guidance = scale.data();
  guide.rescale = rescale.data();
  guide.taking = {image_of_row.data(), taking};
  guide.pair = pair.data();
  guide.channels = guide.out_channels = C;
  guide.padded = padded(C);
  guide.pixels = pixels;
  guide.net = net.data();
  guide.out = guided_out.data();
  UpdateArgs update;
  update.bank = guide.bank;
  update.taking = guide.taking;
  update.table = update.row = update.seed = update.index = zeros.data();
  update.channels = update.out_channels = C;
  update.pixels = pixels;
  update.x = x.data();
  update.out = guided_out.data();
  engine.step({inputs_x.data(), timestep.data(), label.data(), nullptr, out.data()}, batch, guide, update);
  x.insert(x.end(), net.begin(), net.end());
  return x;
}

// Checks that fewer rows than an engine has room for, and more, have the bits that they have on an engine of their own,
// and that images that take no step stay as they are.
void check_some_rows(const Kernels& kernels, int threads, Method method) {
  const std::vector<std::pair<std::vector<int64_t>, int>> steps = {{{0}, 0},
                                                                   {{5}, 0},
                                                                   {{1, 4}, 0},
                                                                   {{2, 3, 3}, 1},
                                                                   {{0, 1, 2, 3, 4, 5}, 0},
                                                                   {{0, 2, 5, 0, 5}, 2},
                                                                   {{0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5}, 6}};
  for (const auto& [rows, guided] : steps) {
    const std::vector<float> own = step_some(kernels, threads, static_cast<int>(rows.size()), method, rows, guided);
    for (int capacity : {1, 2, 5, 12})
      expect(step_some(kernels, threads, capacity, method, rows, guided) == own,
             std::string(kernels.name) + ": " + std::to_string(rows.size()) + " rows on an engine for " +
                 std::to_string(capacity));
    generator.seed(7);
    const std::vector<float> before = random(6 * 3 * 63);
    for (int64_t image = 0; image < 6; image++) {
      const bool taking = std::find(rows.begin(), rows.end(), image) != rows.end();
      const bool same =
          std::equal(before.begin() + image * 189, before.begin() + (image + 1) * 189, own.begin() + image * 189);
      expect(same != taking, "image " + std::to_string(image) + " takes a step, or does not");
    }
  }
}

// Checks attention of pixels to each other, or where keys > 0 to the keys of each row's text.
void check_attention(const Kernels& kernels, int threads, int rows, int pixels, int heads, int d, int keys = 0) {
  const int inner = heads * d, stride = padded(3 * inner), texts = 3;
  const int count = keys ? keys : pixels, key_stride = keys ? 2 * inner : stride;
  std::vector<float> qkv = random_map(rows * pixels, 3 * inner);
  for (size_t q = 0; q < qkv.size(); q++)  // so that the attention is far from uniform
    if (q % stride < static_cast<size_t>(inner)) qkv[q] *= 3;
  const std::vector<float> bank = random(static_cast<size_t>(texts) * keys * 2 * inner);
  std::vector<int64_t> text_of_row(rows);
  for (int row = 0; row < rows; row++) text_of_row[row] = (row + 2) % texts;
  std::vector<float> dst(static_cast<size_t>(rows) * pixels * padded(inner), std::numeric_limits<float>::quiet_NaN());
  AttentionOp op{};
  AttentionArgs& a = op.attention;
  a.queries = qkv.data();
  const int64_t apart = static_cast<int64_t>(count) * key_stride;
  a.keys = {keys ? bank.data() : qkv.data() + inner, keys ? text_of_row.data() : nullptr, apart};
  a.values = {a.keys.base + inner, a.keys.index, apart};
  a.query_stride = stride;
  a.key_stride = key_stride;
  a.pixels = pixels;
  a.keys_count = count;
  a.heads = heads;
  a.head_dim = d;
  a.dst = dst.data();
  Engine engine(kernels, threads, rows);
  engine.add(op);
  engine.run(0, 1);
  double error = 0, norm = 0, rest = 0;
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < pixels; i++) {
      const size_t pixel = static_cast<size_t>(row) * pixels + i;
      for (int head = 0; head < heads; head++) {
        const float* query = &qkv[pixel * stride + head * d];
        std::vector<double> weight(count);
        double sum = 0;
        for (int j = 0; j < count; j++) {
          const float* key = a.keys(row) + static_cast<size_t>(j) * key_stride + head * d;
          double score = 0;
          for (int k = 0; k < d; k++) score += static_cast<double>(query[k]) * key[k];
          sum += weight[j] = std::exp(score / std::sqrt(d));
        }
        for (int k = 0; k < d; k++) {
          double value = 0;
          for (int j = 0; j < count; j++)
            value += weight[j] / sum * a.values(row)[static_cast<size_t>(j) * key_stride + head * d + k];
          error += std::pow(dst[pixel * padded(inner) + head * d + k] - value, 2);
          norm += value * value;
        }
      }
      for (int k = inner; k < padded(inner); k++) rest += std::fabs(dst[pixel * padded(inner) + k]);
    }
  const std::string name = std::string(kernels.name) + " attention of " + std::to_string(pixels) + " pixels to " +
                           std::to_string(count) + " keys, " + std::to_string(heads) + " heads of " + std::to_string(d);
  expect(std::sqrt(error / norm) < 5e-6, name + ": relative error " + std::to_string(std::sqrt(error / norm)));
  expect(rest == 0, name + ": padding is not zero");
}

// Checks a product behind a LayerNorm, if `normed`, whose result is gated, if `geglu`.
void check_layer(const Kernels& kernels, int threads, int rows, Map map, int channels, int outputs, bool normed,
                 bool geglu, float mean) {
  const int pixels = rows * map.height * map.width, layers = geglu ? 2 * outputs : outputs;
  std::vector<float> source = random_map(pixels, channels), gamma = random(channels), beta = random(channels);
  for (int p = 0; p < pixels; p++)
    for (int k = 0; k < channels; k++) source[static_cast<size_t>(p) * padded(channels) + k] += mean;
  const std::vector<float> weights = random(static_cast<size_t>(layers) * channels), bias = random(layers);
  gamma.resize(padded(channels));
  beta.resize(padded(channels));
  std::vector<float> dst(static_cast<size_t>(pixels) * padded(outputs), std::numeric_limits<float>::quiet_NaN());
  ConvOp op{};
  ConvArgs& a = op.conv;
  a.src.count = 1;
  a.src.data[0] = source.data();
  a.src.channels[0] = padded(channels);
  a.src.map = a.map = map;
  if (normed) {
    a.src.gamma = gamma.data();
    a.src.beta = beta.data();
    a.src.eps = 1e-5f;
    a.src.norm_channels = channels;
  }
  a.kernel = a.stride = 1;
  a.method = Method::direct;
  a.geglu = geglu;
  a.outputs = padded(outputs);
  a.inverse_divide = 1.0f;
  std::vector<float> packed(static_cast<size_t>(a.panels()) * a.depth() * panel);
  std::vector<float> packed_bias(static_cast<size_t>(a.panels()) * panel);
  for (int n = 0; n < layers; n++) {
    const int output = n % outputs, column = output % a.per_panel() + (n < outputs ? 0 : panel / 2);
    const size_t p = output / a.per_panel();
    packed_bias[p * panel + column] = bias[n];
    for (int k = 0; k < channels; k++)
      packed[p * a.depth() * panel + in_panel(kernels, false, a.depth(), k, column)] =
          weights[static_cast<size_t>(n) * channels + k];
  }
  a.weights = packed.data();
  a.bias = packed_bias.data();
  a.dst = dst.data();
  Engine engine(kernels, threads, rows);
  engine.add(op);
  engine.run(0, 1);
  double error = 0, norm = 0, rest = 0;
  for (int p = 0; p < pixels; p++) {
    std::vector<double> h(source.begin() + static_cast<size_t>(p) * padded(channels),
                          source.begin() + static_cast<size_t>(p) * padded(channels) + channels);
    if (normed) {
      double centre = 0, var = 0;
      for (double x : h) centre += x / channels;
      for (double x : h) var += (x - centre) * (x - centre) / channels;
      for (int k = 0; k < channels; k++) h[k] = (h[k] - centre) / std::sqrt(var + 1e-5) * gamma[k] + beta[k];
    }
    const auto result = [&](int n) {
      double sum = bias[n];
      for (int k = 0; k < channels; k++) sum += h[k] * weights[static_cast<size_t>(n) * channels + k];
      return sum;
    };
    const float* got = &dst[static_cast<size_t>(p) * padded(outputs)];
    for (int n = 0; n < outputs; n++) {
      double value = result(n);
      if (geglu) {
        const double gate = result(outputs + n);
        value *= gate * 0.5 * std::erfc(-gate / std::sqrt(2.0));
      }
      error += std::pow(got[n] - value, 2);
      norm += value * value;
    }
    for (int n = outputs; n < padded(outputs); n++) rest += std::fabs(got[n]);
  }
  const std::string name = std::string(kernels.name) + " layer of " + std::to_string(channels) + " channels, " +
                           std::to_string(outputs) + " outputs" + (normed ? " norm" : "") + (geglu ? " geglu" : "");
  expect(std::sqrt(error / norm) < 5e-6, name + ": relative error " + std::to_string(std::sqrt(error / norm)));
  expect(rest == 0, name + ": padding is not zero");
}

// Checks that no member of a team passes a barrier before the others have reached it.
void check_team(int threads) {
  Team team(threads);
  std::vector<int> seen(threads);
  std::atomic<int> early{0};
  for (int round = 0; round < 50; round++) {
    auto work = [&](int i) {
      for (int phase = 0; phase < 20; phase++) {
        seen[i] = phase;
        team.barrier();
        for (int other : seen) early += other != phase;
        team.barrier();
      }
    };
    team.run(work);
  }
  expect(early == 0, "a member of a team of " + std::to_string(threads) + " went past a barrier");
}

// Compares with Random123's published answer for Philox4x32-10 with counter and key 0, and with normals made of its
// words.
void check_noise(const Kernels& kernels) {
  const int64_t zero = 0;
  uint32_t words[4];
  float z[4];
  NoiseArgs a;
  a.seed = a.index = a.row = &zero;
  a.size = 4;
  a.words = words;
  a.z = z;
  kernels.noise(a, {0, 1});
  const uint32_t known[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int i = 0; i < 4; i++) expect(words[i] == known[i], std::string(kernels.name) + " Philox word");
  for (int i = 0; i < 4; i += 2) {
    const double u0 = ((words[i] >> 9) + 0.5) / (1 << 23), u1 = ((words[i + 1] >> 9) + 0.5) / (1 << 23);
    const double r = std::sqrt(-2 * std::log(u0)), angle = 2 * std::acos(-1.0) * u1;
    expect(std::fabs(z[i] - r * std::cos(angle)) < 2e-6, std::string(kernels.name) + " normal, cosine");
    expect(std::fabs(z[i + 1] - r * std::sin(angle)) < 2e-6, std::string(kernels.name) + " normal, sine");
  }
}

void check_refusals() {
  const auto refused = [](auto&& call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  expect(refused([] { choose_kernels("sse9"); }), "an unknown instruction set is refused");
  expect(refused([] { Team team(0); }), "a team of nobody is refused");
  Engine engine(choose_kernels(""), 1, 1);
  expect(refused([&] { engine.run(0, 1); }), "operations that are not there are refused");
}

}  // namespace

int main() {
  const std::vector<Method> methods = {Method::direct, Method::winograd2, Method::winograd4};
  for (const Kernels* kernels : available_kernels()) check_noise(*kernels);
  for (const Kernels* kernels : available_kernels())
    for (int threads : {1, 3}) {
      for (Method method : methods) {
        check_conv(*kernels, threads, {3, 5, 7, {33}, 20, 3, 1, false, true, true, method});
        check_conv(*kernels, threads, {2, 9, 6, {20, 7}, 70, 3, 1, false, true, false, method});
        check_conv(*kernels, threads, {5, 3, 5, {6}, 17, 3, 1, true, false, true, method});
        check_conv(*kernels, threads, {1, 1, 1, {3}, 1, 3, 1, false, false, false, method});
        check_conv(*kernels, threads, {1, 24, 40, {18}, 130, 3, 1, false, true, true, method});
        check_conv(*kernels, threads, {3, 5, 7, {33}, 20, 3, 1, false, true, true, method, true});
        check_conv(*kernels, threads, {2, 9, 3, {20, 7}, 70, 3, 1, true, false, false, method, true});
        check_conv(*kernels, threads, {1, 1, 1, {3}, 1, 3, 1, false, false, false, method, true});
        check_conv(*kernels, threads, {2, 9, 7, {20}, 40, 3, 1, false, false, true, method, false, true});
      }
      for (Method method : methods) check_some_rows(*kernels, threads, method);
      check_conv(*kernels, threads, {3, 6, 10, {33}, 20, 3, 2, false, false, false, Method::direct});
      check_conv(*kernels, threads, {3, 6, 10, {33}, 20, 3, 2, false, true, false, Method::direct, true});
      check_conv(*kernels, threads, {3, 5, 7, {33}, 200, 1, 1, false, true, true, Method::direct});
      check_conv(*kernels, threads, {3, 5, 7, {33, 15}, 100, 1, 1, false, false, true, Method::direct});
      check_conv(*kernels, threads, {7, 1, 1, {40}, 300, 1, 1, false, false, false, Method::direct});
      check_attention(*kernels, threads, 2, 35, 3, 5);
      check_attention(*kernels, threads, 1, 130, 1, 96);
      check_attention(*kernels, threads, 3, 1, 2, 16);
      check_attention(*kernels, threads, 1, 64, 2, 70);
    }
  for (const Kernels* kernels : available_kernels())
    for (int threads : {1, 3}) {
      check_attention(*kernels, threads, 2, 600, 2, 40);
      check_attention(*kernels, threads, 1, 1030, 1, 7);
      check_attention(*kernels, threads, 2, 35, 2, 80, 77);
      check_attention(*kernels, threads, 4, 1, 3, 5, 1);
      check_attention(*kernels, threads, 3, 50, 1, 160, 7);
      check_attention(*kernels, threads, 1, 400, 1, 16, 1025);
      for (bool geglu : {false, true}) {
        check_layer(*kernels, threads, 2, {5, 7}, 40, 100, true, geglu, 0);
        check_layer(*kernels, threads, 3, {1, 1}, 33, 17, true, geglu, 3);
        check_layer(*kernels, threads, 1, {9, 3}, 128, 512, true, geglu, 0);
        check_layer(*kernels, threads, 7, {2, 2}, 5, 160, false, geglu, 0);
      }
      check_layer(*kernels, threads, 2, {3, 3}, 70, 33, true, false, 1e4f);
    }
  std::vector<const Kernels*> every = available_kernels();
  for (const Kernels* kernels : emulated_kernels()) every.push_back(kernels);
  for (const Kernels* kernels : every) {
    if (!kernels->bf16) continue;
    for (Method method : methods) {
      check_conv(*kernels, 3, {3, 5, 7, {33}, 20, 3, 1, false, true, true, method, false, false, true});
      check_conv(*kernels, 1, {2, 9, 6, {20, 7}, 70, 3, 1, false, true, false, method, false, false, true});
      check_conv(*kernels, 2, {1, 24, 40, {18}, 130, 3, 1, false, true, true, method, false, false, true});
    }
    check_conv(*kernels, 1, {3, 6, 10, {33}, 20, 3, 2, false, false, false, Method::direct, false, false, true});
    check_conv(*kernels, 2, {7, 1, 1, {40}, 300, 1, 1, false, false, false, Method::direct, false, false, true});
    if (std::string(kernels->name).rfind("amx", 0) == 0) check_tiles(*kernels);
  }
  for (int threads : {1, 2, 5}) check_team(threads);
  check_refusals();
  check_sharing();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures;
}
