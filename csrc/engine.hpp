// The engine: runs a list of operations over raw buffers on the threads of a Team. It owns neither weights nor
// activations. Calls from several threads take turns, also those of other engines with the same number of threads, if
// that is more than one.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <variant>
#include <vector>

#include "kernels.hpp"
#include "team.hpp"

namespace fastdiff {

// Arguments of the embedding, dst [rows, padded features] = silu(time + classes).
struct EmbedArgs {
  RowVectors time, classes;
  int features;
  float* dst;
};

struct ConvOp {
  ConvArgs conv;
  NormArgs norm;  // count 0: there is no norm
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

// The buffers of the program whose contents change from step to step: its inputs, and the result.
struct NetworkInputs {
  float* x;            // [rows, image_size]
  int64_t* timestep;   // [rows]
  int64_t* label;      // [rows]
  float* class_image;  // [rows, image_size]; null where the network has none
  const float* out;    // [rows, out_size]
};

// A step of a batch: the evaluations of the network, each for an image that takes the step, and their inputs. The first
// `conditional` rows are evaluated with the images' own labels, the others with null labels. A label is the number of a
// class, or of a text.
struct Batch {
  int rows, conditional;
  const int64_t* image_of_row;  // [rows]
  const int64_t* timestep;      // [rows]: index of a timestep's embedding
  const int64_t* label;         // [rows]; null where the network has no labels
  int64_t image_size;           // numbers per image
  int64_t out_size;             // numbers per row of the network's output
  const float* x;               // [images, image_size]
  const float* class_image;     // [images, image_size]; null where the network has none
  const float* null_image;      // [image_size], that of the null label; read for rows that are not conditional
  float* net;                   // [rows, out_size]
};

class Engine {
 public:
  // capacity: the most evaluations of the network that one run of the operations makes. All buffers are [capacity, ...],
  // and a run for fewer rows uses the first ones.
  Engine(const Kernels& kernels, int threads, int capacity);

  // Appends an operation. Throws std::invalid_argument if the instruction set cannot run it, std::logic_error once the
  // engine has run.
  void add(const Op& op);
  int size() const { return static_cast<int>(ops_.size()); }
  // Runs operations `first` to `last` - 1, in order and for all rows, after `begin` if there is one: no other thread uses
  // the engine during either. This and all below throw ResourceError if memory or threads are
  // missing, which leaves the engine as it was.
  void run(int first, int last, const std::function<void()>& begin = nullptr);
  // Runs all operations for every row of the batch, in equal parts that the engine has room for, and then guidance.
  void forward(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide);
  // Runs forward, and then the update of the images by the rows of their tables, which the caller advances.
  void step(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide, const UpdateArgs& update);
  // Runs `begin` and twice the operations, and returns the nanoseconds that each took the second time.
  std::vector<int64_t> profile(int first, int last, const std::function<void()>& begin = nullptr);
  // Returns the size of the working space in bytes.
  int64_t space() const;

 private:
  // How members share a convolution. Either each processes its own strips, `block` at a time, or (`slices`) they load
  // all strips together and each multiplies them with its own slices of weights.
  struct Split {
    int block;
    bool slices;
  };
  Split split(const ConvArgs& conv, int rows) const;
  // What a call has while it runs: the team, and the working space.
  struct Use {
    explicit Use(Engine& engine);
    Team::Turn turn;
  };
  Team& team();
  void allocate();
  void evaluate(const NetworkInputs& inputs, const Batch& batch, const GuideArgs& guide);
  void run_ops(int first, int last);
  void run_member(int member, int first, int last, int64_t* times);
  void run_op(int member, const InputArgs& op);
  void run_op(int member, const EmbedArgs& op);
  void run_op(int member, const ConvOp& op);
  void run_op(int member, const PoolOp& op);
  void run_op(int member, const AttentionOp& op);
  // Computes the coefficients of the norm and points scale and shift to them; does nothing where there is no norm.
  void run_norm(int member, const NormArgs& norm, const float*& scale, const float*& shift);
  float* own(int member) { return own_[member].get(); }

  // Memory of floats at a multiple of a cache line's size, so that no vector that kernels load or store lies in two.
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  using Floats = std::unique_ptr<float[], Free>;
  static Floats floats(int64_t size);

  enum Phase { open, adding, closed };  // whether operations may be added

  const Kernels& kernels_;
  const int threads_, capacity_;
  int rows_;  // of the present run
  std::shared_ptr<Team> team_;
  std::atomic<Phase> phase_{open};
  std::vector<Op> ops_;
  int64_t own_size_ = 0, common_size_ = 0, norm_size_ = 0;
  std::vector<Floats> own_;  // working space of each member
  Floats common_;            // loaded items of a convolution that is split by slices
  Floats norm_;              // scale and shift of the present operation
};

}  // namespace fastdiff
