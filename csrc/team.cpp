#include "team.hpp"

#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastdiff {

namespace {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins while `waiting` holds. If that takes long, as with more threads than processors, it yields the processor.
template <class Condition>
void spin(Condition waiting) {
  for (int i = 0; waiting(); i++) {
    if (i < 4000)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace

Team::Team(int size) {
  if (size < 1) throw std::invalid_argument("threads: at least 1 is needed");
  for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::barrier() {
  const uint64_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  spin([&] { return phase_.load(std::memory_order_acquire) == phase; });
}

void Team::start(void (*call)(void*, int), void* work) {
  if (!threads_.empty()) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      call_ = call;
      work_ = work;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  call(work, 0);
  if (!threads_.empty()) barrier();
}

void Team::serve(int index) {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < 20000 && round_.load(std::memory_order_acquire) == seen; i++) pause();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || round_.load(std::memory_order_relaxed) != seen; });
      if (stop_) return;
      seen = round_.load(std::memory_order_relaxed);
    }
    call_(work_, index);
    barrier();
  }
}

}  // namespace fastdiff
