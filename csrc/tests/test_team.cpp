// Tests of what engines of one process share, and of what happens when memory or threads are missing or lost.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#endif

#include "engine.hpp"
#include "expect.hpp"
#include "isa.hpp"
#include "team.hpp"

#if defined(__SANITIZE_THREAD__)
#define TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define ASAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TSAN 1
#elif __has_feature(address_sanitizer)
#define ASAN 1
#endif
#endif

using namespace fastdiff;

namespace {

std::atomic<int> allowed{-1};  // allocations until one fails; negative: none does

}  // namespace

void* operator new(size_t size) {
  if (allowed >= 0 && allowed-- == 0) throw std::bad_alloc();
  if (void* p = std::malloc(std::max<size_t>(size, 1))) return p;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

namespace {

// An engine with an operation that takes working space, and the buffers that it reads and writes.
struct Example {
  static constexpr int rows = 4, pixels = 40, heads = 2, depth = 16, stride = 3 * heads * depth;
  std::vector<float> qkv, dst;
  Engine engine;
  AttentionOp op{};

  Example(int threads, int seed)
      : qkv(rows * pixels * stride), dst(rows * pixels * heads * depth), engine(choose_kernels(""), threads, rows) {
    for (size_t i = 0; i < qkv.size(); i++) qkv[i] = std::sin(static_cast<float>(seed + 3 * i));
    op.attention.queries = qkv.data();
    op.attention.keys = {qkv.data() + heads * depth, nullptr, pixels * stride};
    op.attention.values = {qkv.data() + 2 * heads * depth, nullptr, pixels * stride};
    op.attention.query_stride = op.attention.key_stride = stride;
    op.attention.pixels = op.attention.keys_count = pixels;
    op.attention.heads = heads;
    op.attention.head_dim = depth;
    op.attention.dst = dst.data();
  }
  void add() { engine.add(op); }
  std::vector<float> run() {
    std::fill(dst.begin(), dst.end(), -1.0f);
    engine.run(0, 1);
    return dst;
  }
};

std::vector<float> expected(int seed) {
  Example example(1, seed);
  example.add();
  return example.run();
}

// Returns the number of threads of this process, where that can be seen.
int threads_now() {
#if defined(__linux__)
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
#else
  return 0;
#endif
}

// Whether the number of threads becomes `number` soon; one that was joined may still be listed.
bool threads_become(int number) {
  for (int i = 0; i < 200 && threads_now() != number; i++) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return threads_now() == number;
}

void check_one_team() {
  const int before = threads_now(), added = before ? 2 : 0;
  {
    std::vector<std::unique_ptr<Example>> examples;
    for (int i = 0; i < 20; i++) {
      examples.push_back(std::make_unique<Example>(3, i));
      examples.back()->add();
      expect(i > 0 || threads_now() == before, "an engine that has not run has no threads");
      expect(examples.back()->run() == expected(i), "an engine of a shared team computes the same");
      expect(threads_become(before + added), "engines share one team");
    }
  }
  expect(threads_become(before), "a team ends with its last engine");
}

void check_turns() {
  for (int threads : {1, 3}) {
    Example first(threads, 1), second(threads, 2);
    first.add();
    second.add();
    const std::vector<float> right[2] = {expected(1), expected(2)};
    std::atomic<int> wrong{0};
    const auto work = [&](Example& example, const std::vector<float>& result) {
      for (int i = 0; i < 100; i++) wrong += example.run() != result;
    };
    std::thread other(work, std::ref(first), std::cref(right[0]));
    work(second, right[1]);
    other.join();
    expect(wrong == 0, "engines in two threads compute what they compute alone");

    // The same engine from four threads.
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; i++)
      callers.emplace_back([&] {
        for (int j = 0; j < 50; j++) first.engine.run(0, 1);
      });
    for (std::thread& caller : callers) caller.join();
    expect(first.dst == right[0], "an engine may be run by several threads");
  }
}

template <class Error, class Call>
bool raises(Call call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void check_misuse() {
  Example example(2, 1);
  example.add();
  Team team(2);
  std::atomic<int> refused{0};
  auto work = [&](int) { refused += raises<std::logic_error>([&] { example.engine.run(0, 1); }); };
  team.run(work);
  expect(refused == 2, "an engine cannot be called from within the work of a team");
  expect(example.run() == expected(1), "an engine works after it was called from within the work of a team");
  expect(raises<std::logic_error>([&] { example.add(); }), "an engine that has run takes no more operations");
}

// Lets every allocation fail in turn, those of threads included, and checks that the same engine works afterwards.
void check_no_memory() {
  const std::vector<float> right = expected(5);
  const int before = threads_now();
  int failed = 0;
  for (int step = 0; step < 2; step++)  // the team's threads are missing, or they are there
    for (int k = 0;; k++) {
      std::unique_ptr<Example> keeper;
      if (step == 1) {
        keeper = std::make_unique<Example>(4, 9);
        keeper->add();
        keeper->run();
      }
      Example example(4, 5);
      std::string error;
      error.reserve(200);
      allowed = k;
      try {
        example.add();
        example.engine.run(0, 1);
      } catch (const std::bad_alloc&) {
        error = "memory";
      } catch (const ResourceError&) {
        error = "resource";
      }
      allowed = -1;
      if (error.empty()) break;
      failed++;
      expect(step == 1 || threads_become(before), "no thread is left of a team that could not start");
      if (example.engine.size() == 0) example.add();
      expect(example.run() == right, "an engine works after allocation " + std::to_string(k) + " failed");
    }
  expect(failed > 8, "allocations failed");
}

#if defined(__linux__)
// Returns the exit code of a child that does `work`; 255 if it did not end within a minute.
template <class Work>
int exit_code(Work work) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(work());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

void check_fork() {
  auto example = std::make_unique<Example>(3, 7);
  example->add();
  const std::vector<float> right = example->run();
  const auto ends = [&] {
    example.reset();
    return 0;
  };
  const auto runs = [&] {
#if !defined(TSAN)  // which supports no threads after a fork
    if (example->run() != right) return 1;
    Example fresh(3, 7);
    fresh.add();
    if (fresh.run() != right || threads_now() != 3) return 2;
#endif
    return 0;
  };
  expect(exit_code(ends) == 0, "an engine that a child inherits can be destroyed");
  expect(exit_code(runs) == 0, "an engine that a child inherits works");
  expect(exit_code([&] { return runs() + exit_code(runs); }) == 0, "an engine works in a child of a child");
  // While other threads have the team, or wait for it.
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int i = 0; i < 2; i++)
    others.emplace_back([&stop, i] {
      Example other(3, i);
      other.add();
      while (!stop) other.run();
    });
#if !defined(ASAN)  // in a child, its allocator waits for ever for a thread of the parent that was within it
  for (int i = 0; i < 10; i++) expect(exit_code(runs) == 0, "a fork while other threads run engines");
#endif
  stop = true;
  for (std::thread& other : others) other.join();
  expect(example->run() == right, "the parent's engine works after forks");
}
#endif

}  // namespace

void check_sharing() {
  check_one_team();
  check_turns();
  check_misuse();
  check_no_memory();
#if defined(__linux__)
  check_fork();
#endif
}
