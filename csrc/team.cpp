#include "team.hpp"

#include <map>
#include <string>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastdiff {

namespace {

int64_t process() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

// The shared teams of one process.
struct Teams {
  const int64_t process = fastdiff::process();
  std::mutex mutex;
  std::map<int, std::weak_ptr<Team>> by_size;
};

// Returns those of this process. A fork may have happened while another thread had the lock, so that the child needs a
// new one; what it inherited is never freed.
Teams& present_teams() {
  static std::atomic<Teams*> present{nullptr};
  Teams* known = present.load(std::memory_order_acquire);
  if (known != nullptr && known->process == process()) return *known;
  auto fresh = std::make_unique<Teams>();
  if (present.compare_exchange_strong(known, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *known;  // that of the thread that came first
}

// Whether this thread is within the work of a team.
thread_local bool working = false;

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

Team::Team(int size) : size_(size), process_(process()) {
  if (size < 1) throw std::invalid_argument("threads: at least 1 is needed");
}

Team::~Team() { dismiss(); }

void Team::share(std::shared_ptr<Team>& team, int size) {
  Teams& teams = present_teams();
  std::lock_guard<std::mutex> lock(teams.mutex);
  if (team && team->process_ == teams.process) return;
  std::weak_ptr<Team>& known = teams.by_size[size];
  std::shared_ptr<Team> found = size > 1 ? known.lock() : nullptr;
  if (!found) {
    // A forked child leaves its parent's teams as they are: the threads that the destructors would wait for are gone.
    found.reset(new Team(size), [](Team* t) {
      if (t->process_ == process()) delete t;
    });
    known = found;
  }
  team = std::move(found);
}

Team::Turn::Turn(Team& team) : team_(team) {
  if (working) throw std::logic_error("the engine was called from within its own work");
  std::unique_lock<std::mutex> lock(team_.turns_);
  const uint64_t mine = team_.requested_++;
  team_.next_.wait(lock, [&] { return team_.ended_ == mine; });
}

Team::Turn::~Turn() {
  {
    std::lock_guard<std::mutex> lock(team_.turns_);
    team_.ended_++;
  }
  team_.next_.notify_all();
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
  if (size_ > 1) {
    recruit();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      call_ = call;
      work_ = work;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  working = true;
  call(work, 0);
  if (size_ > 1) barrier();
  working = false;
}

void Team::recruit() {
  while (static_cast<int>(threads_.size()) + 1 < size_) {
    const int index = static_cast<int>(threads_.size()) + 1;
    try {
      threads_.emplace_back([this, index] { serve(index); });
    } catch (const std::exception& e) {
      dismiss();
      throw ResourceError("thread " + std::to_string(index + 1) + " of " + std::to_string(size_) +
                          " of the engine cannot be started: " + e.what());
    }
  }
}

void Team::dismiss() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  stop_ = false;
}

void Team::serve(int index) {
  working = true;
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
