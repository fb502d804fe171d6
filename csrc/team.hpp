// The threads of an engine.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace fastdiff {

// Threads that work together and meet at barriers. The thread that calls run() is one of them. A thread that waits for
// work spins for a moment and then sleeps.
class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls work(i) on every member, 0 (the caller) to size() - 1, and returns when all have finished.
  template <class Work>
  void run(Work& work) {
    start([](void* w, int i) { (*static_cast<Work*>(w))(i); }, &work);
  }
  // Called by every member within run(): returns when all members have called it.
  void barrier();

 private:
  void start(void (*call)(void*, int), void* work);
  void serve(int index);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};  // number of calls of run()
  std::atomic<bool> stop_{false};
  void (*call_)(void*, int) = nullptr;
  void* work_ = nullptr;
  std::atomic<int> arrived_{0};     // members at the present barrier
  std::atomic<uint64_t> phase_{0};  // number of barriers passed
};

}  // namespace fastdiff
