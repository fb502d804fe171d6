// Replays a list of operations over raw buffers on its own threads. Owns neither weights nor activations.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <variant>
#include <vector>

#include "kernels.hpp"

namespace fastdiff {

// Threads that meet at barriers; the caller is one of them. Waiting spins for a moment, then parks.
class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // work(i) on every member, 0 (the caller) to size() - 1; returns when all are done.
  template <class Work>
  void run(Work& work) {
    start([](void* w, int i) { (*static_cast<Work*>(w))(i); }, &work);
  }
  // Within run(): nobody goes on before everybody has come.
  void barrier();

 private:
  void start(void (*call)(void*, int), void* work);
  void serve(int index);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};  // of work handed out
  std::atomic<bool> stop_{false};
  void (*call_)(void*, int) = nullptr;
  void* work_ = nullptr;
  std::atomic<int> arrived_{0};
  std::atomic<uint64_t> phase_{0};
};

struct EmbedArgs {
  RowVectors time, classes;
  int features;
  float* dst;
};

struct ConvOp {
  ConvArgs conv;
  NormArgs norm;  // count 0: none
};

struct PoolOp {
  PoolArgs pool;
  NormArgs norm;
};

struct AttentionOp {
  AttentionArgs attention;
  NormArgs norm;
};

using Op = std::variant<InputArgs, EmbedArgs, ConvOp, PoolOp, AttentionOp>;

// Where the program's operations read what changes from step to step, row by row, and where they leave the result.
struct NetworkInputs {
  float* x;            // [rows, image_size]
  int64_t* timestep;   // [rows]
  int64_t* label;      // [rows]
  float* class_image;  // [rows, image_size]; null: the network has none
  const float* out;    // [rows, out_size]
};

// A batch at its present step. Rows past the images are their unconditional halves.
struct Batch {
  int images;
  bool guided;
  int64_t image_size;  // numbers of an image
  int64_t out_size;    // numbers of a row of the network's output
  const float* x;      // [images, image_size]
  const int64_t* table;
  const int64_t* row;
  const int64_t* entry;  // [tables, entry_rows]: where a timestep's embedding is
  int64_t entry_rows;
  const int64_t* label;      // of every row; null: the network has no labels
  const float* class_image;  // of every row; null: the network has none
  float* net;                // [rows, out_size]
  int rows() const { return guided ? 2 * images : images; }
};

class Engine {
 public:
  // rows: evaluations of the network in a step.
  Engine(const Kernels& kernels, std::shared_ptr<Team> team, int rows);

  void add(const Op& op);
  int size() const { return static_cast<int>(ops_.size()); }
  // Operations `first` to `last` - 1, in order. One caller at a time.
  void run(int first, int last);
  // All operations for every row of the batch, as many at a time as the engine has, and guidance.
  void forward(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide);
  // forward, and one row of the table for every image.
  void step(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide, const UpdateArgs& update);
  // The same as run, with the nanoseconds that each took.
  std::vector<int64_t> profile(int first, int last);
  // Bytes of working space.
  int64_t space() const;

 private:
  // How a convolution is shared: `block` strips at a time by each member for itself, or all strips loaded together and
  // the panels shared.
  struct Split {
    int block;
    bool panels;
  };
  Split split(const ConvArgs& conv) const;
  void run_member(int member, int first, int last, int64_t* times);
  void run_op(int member, const InputArgs& op);
  void run_op(int member, const EmbedArgs& op);
  void run_op(int member, const ConvOp& op);
  void run_op(int member, const PoolOp& op);
  void run_op(int member, const AttentionOp& op);
  // Computes the norm's coefficients and says where they are; leaves both as they were where there is no norm.
  void run_norm(int member, const NormArgs& norm, const float*& scale, const float*& shift);
  float* own(int member) { return own_[member].get(); }

  const Kernels& kernels_;
  std::shared_ptr<Team> team_;
  int rows_;
  std::vector<Op> ops_;
  int64_t own_size_ = 0, common_size_ = 0, norm_size_ = 0;
  std::vector<std::unique_ptr<float[]>> own_;  // a member's working space
  std::unique_ptr<float[]> common_;            // loaded items of a convolution whose panels are shared
  std::unique_ptr<float[]> norm_;              // scale and shift of the operation that runs
  bool ready_ = false;
};

}  // namespace fastdiff
