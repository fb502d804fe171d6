#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>

namespace fastdiff {

namespace {

// Numbers of loaded items and products that a member processes at a time: about what fits into a core's L2 cache.
// Because the products prefetch, neither two thirds nor twice as many are faster.
constexpr int64_t block_numbers = 256 * 1024;

// The least number of items per member for which it pays that every member reads all weights.
constexpr int slice_items = 24;

// More threads than a machine has cores; counts of items per member stay within an int.
constexpr int most_threads = 4096;

}  // namespace

Engine::Engine(const Kernels& kernels, int threads, int capacity)
    : kernels_(kernels), threads_(threads), capacity_(capacity), rows_(capacity) {
  if (threads < 1 || threads > most_threads)
    throw std::invalid_argument("threads: from 1 to " + std::to_string(most_threads) + " is needed");
  if (capacity < 1) throw std::invalid_argument("rows: at least 1 is needed");
}

Engine::Split Engine::split(const ConvArgs& conv, int rows) const {
  const int strips = rows * conv.map.strips(), members = threads_, mine = ceil_div(strips, members);
  const int64_t numbers = conv.load_size(1) + conv.product_size(1);  // of a strip
  // Among the blocks that fit, take the largest one whose number of items nearly fills the last group of six that a
  // product computes at a time. The weights of a 1x1 convolution fit into the cache, so that its blocks may be smaller.
  const int64_t space = conv.kernel == 1 ? block_numbers / 4 : block_numbers;
  const int most = static_cast<int>(std::clamp<int64_t>(space / numbers, 1, strips));
  int block = 1;
  const auto waste = [&](int b) { return static_cast<double>(ceil_div(b * conv.items(), 6) * 6) / (b * conv.items()); };
  for (int b = 1; b <= most; b++)
    if (waste(b) <= waste(block) + 0.02) block = b;
  // Weights are read once per block. If members have few strips each, it costs more that every member reads all weights
  // than that every member reads all items.
  if (members > 1 && kernels_.slices(conv) >= members && (mine * conv.items() < slice_items || strips < members))
    return {strips, true};
  return {std::min(block, mine), false};
}

void Engine::add(const Op& given) {
  Op op = given;
  if (auto* products = std::get_if<ConvOp>(&op)) {
    ConvArgs& a = products->conv;
    a.windows = kernels_.windows && a.bf16 && a.method == Method::direct && a.kernel == 3;
  }
  const auto* products = std::get_if<ConvOp>(&op);
  const auto* attends = std::get_if<AttentionOp>(&op);
  if (!kernels_.bf16 && ((products && products->conv.bf16) || (attends && attends->attention.bf16)))
    throw std::invalid_argument(std::string(kernels_.name) + " does not multiply bfloat16");
  Phase was = open;
  if (!phase_.compare_exchange_strong(was, adding))
    throw std::logic_error("operations are added by one thread at a time, and before the engine runs");
  const auto reopen = [this](void*) { phase_ = open; };
  const std::unique_ptr<void, decltype(reopen)> added(this, reopen);
  const auto wants = [this](int64_t size) { own_size_ = std::max(own_size_, size); };
  const auto wants_norm = [this](const NormArgs& norm) {
    int width = 0;
    for (int s = 0; s < norm.count; s++) width += padded(norm.channels[s]);
    norm_size_ = std::max<int64_t>(norm_size_, static_cast<int64_t>(capacity_) * width);
  };
  if (const auto* conv = std::get_if<ConvOp>(&op)) {
    // Fewer rows may be split otherwise, and then need more space than all of them.
    for (int rows = 1; rows <= capacity_; rows++) {
      const Split how = split(conv->conv, rows);
      const int64_t loaded = conv->conv.load_size(how.block);
      if (how.slices) common_size_ = std::max(common_size_, loaded);
      wants(conv->conv.space() + conv->conv.product_size(how.block) + (how.slices ? 0 : loaded));
    }
    wants_norm(conv->norm);
  } else if (const auto* pool = std::get_if<PoolOp>(&op)) {
    wants(pool->pool.space());
    wants_norm(pool->norm);
  } else if (const auto* attention = std::get_if<AttentionOp>(&op)) {
    wants(attention->attention.space());
    wants_norm(attention->norm);
  }
  ops_.push_back(op);
}

int64_t Engine::space() const {
  return static_cast<int64_t>(sizeof(float)) * (own_size_ * threads_ + common_size_ + 2 * norm_size_);
}

Engine::Use::Use(Engine& engine) : turn(engine.team()) {
  Phase was = open;
  if (!engine.phase_.compare_exchange_strong(was, closed) && was == adding)
    throw std::logic_error("the engine was run while an operation was added");
  if (engine.own_.empty()) engine.allocate();
}

Team& Engine::team() {
  Team::share(team_, threads_);
  return *team_;
}

Engine::Floats Engine::floats(int64_t size) {
  Floats memory(static_cast<float*>(::operator new(sizeof(float) * size, std::align_val_t{64})));
  std::fill_n(memory.get(), size, 0.0f);
  return memory;
}

void Engine::allocate() try {
  std::vector<Floats> own;
  for (int i = 0; i < threads_; i++) own.push_back(floats(own_size_));
  common_ = floats(common_size_);
  norm_ = floats(2 * norm_size_);
  own_ = std::move(own);
} catch (const std::bad_alloc&) {
  throw ResourceError("there is no memory for " + std::to_string(space()) + " bytes of the engine's working space");
}

void Engine::run(int first, int last, const std::function<void()>& begin) {
  const Use use(*this);
  rows_ = capacity_;
  if (begin) begin();
  run_ops(first, last);
}

void Engine::forward(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide) {
  const Use use(*this);
  evaluate(inputs, batch, guide);
}

void Engine::step(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide, const UpdateArgs& update) {
  const Use use(*this);
  evaluate(inputs, batch, guide);
  auto work = [&](int member) { kernels_.update(update, share({0, update.taking.count}, member, threads_)); };
  team_->run(work);
}

std::vector<int64_t> Engine::profile(int first, int last, const std::function<void()>& begin) {
  const Use use(*this);
  rows_ = capacity_;
  if (begin) begin();
  run_ops(first, last);
  std::vector<int64_t> times(last - first);
  auto work = [&](int member) { run_member(member, first, last, member == 0 ? times.data() : nullptr); };
  team_->run(work);
  return times;
}

void Engine::run_ops(int first, int last) {
  if (first < 0 || last > size() || first > last) throw std::invalid_argument("run: no such operations");
  auto work = [&](int member) { run_member(member, first, last, nullptr); };
  team_->run(work);
}

void Engine::evaluate(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide) {
  const int parts = ceil_div(batch.rows, capacity_);
  for (int part = 0; part < parts; part++) {
    const Range rows = share({0, batch.rows}, part, parts);
    rows_ = rows.size();
    for (int i = 0; i < rows_; i++) {
      const int row = rows.begin + i;
      const int64_t image = batch.image_of_row[row];
      std::copy_n(batch.x + image * batch.image_size, batch.image_size, inputs.x + i * batch.image_size);
      inputs.timestep[i] = batch.timestep[row];
      if (batch.label != nullptr) inputs.label[i] = batch.label[row];
      if (batch.class_image != nullptr) {
        const float* from = row < batch.conditional ? batch.class_image + image * batch.image_size : batch.null_image;
        std::copy_n(from, batch.image_size, inputs.class_image + i * batch.image_size);
      }
    }
    run_ops(0, size());
    std::copy_n(inputs.out, rows_ * batch.out_size, batch.net + rows.begin * batch.out_size);
  }
  auto work = [&](int member) { kernels_.guide(guide, share({0, guide.taking.count}, member, threads_)); };
  team_->run(work);
}

void Engine::run_member(int member, int first, int last, int64_t* times) {
  auto then = std::chrono::steady_clock::now();
  for (int i = first; i < last; i++) {
    std::visit([&](const auto& op) { run_op(member, op); }, ops_[i]);
    team_->barrier();
    if (times != nullptr) {
      const auto now = std::chrono::steady_clock::now();
      times[i - first] = std::chrono::duration_cast<std::chrono::nanoseconds>(now - then).count();
      then = now;
    }
  }
}

void Engine::run_norm(int member, const NormArgs& norm, const float*& scale, const float*& shift) {
  if (norm.count == 0) return;
  NormArgs args = norm;
  scale = args.scale = norm_.get();
  shift = args.shift = norm_.get() + norm_size_;
  kernels_.norm(args, share({0, rows_}, member, threads_));
  team_->barrier();
}

void Engine::run_op(int member, const InputArgs& op) {
  kernels_.input(op, share({0, rows_ * op.map.strips()}, member, threads_));
}

void Engine::run_op(int member, const EmbedArgs& op) {
  kernels_.embed(op.time, op.classes, op.features, op.dst, share({0, rows_}, member, threads_));
}

void Engine::run_op(int member, const ConvOp& op) {
  ConvArgs conv = op.conv;
  run_norm(member, op.norm, conv.src.scale, conv.src.shift);
  const Split how = split(conv, rows_);
  const Range strips{0, rows_ * conv.map.strips()}, slices{0, kernels_.slices(conv)};
  float* space = own(member);
  float* products = space + conv.space();
  const Range mine = share(strips, member, threads_);
  if (how.slices) {
    kernels_.conv_load(conv, strips, mine, common_.get(), space);
    team_->barrier();
    kernels_.conv_store(conv, strips, share(slices, member, threads_), common_.get(), products);
    return;
  }
  float* loaded = products + conv.product_size(how.block);
  for (int s = mine.begin; s < mine.end; s += how.block) {
    const Range block{s, std::min(s + how.block, mine.end)};
    kernels_.conv_load(conv, block, block, loaded, space);
    kernels_.conv_store(conv, block, slices, loaded, products);
  }
}

void Engine::run_op(int member, const PoolOp& op) {
  PoolArgs pool = op.pool;
  run_norm(member, op.norm, pool.src.scale, pool.src.shift);
  kernels_.pool(pool, share({0, rows_ * pool.map.strips()}, member, threads_), own(member));
}

void Engine::run_op(int member, const AttentionOp& op) {
  AttentionArgs attention = op.attention;
  run_norm(member, op.norm, attention.scale, attention.shift);
  const Range units{0, rows_ * attention.heads * attention.blocks()};
  kernels_.attention(attention, share(units, member, threads_), own(member));
}

}  // namespace fastdiff
