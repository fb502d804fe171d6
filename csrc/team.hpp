// The threads that the engines of a process share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace fastdiff {

// The machine has no memory or no thread left for what was asked.
struct ResourceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Threads that work together and meet at barriers. The thread that calls run() is one of them. A thread that waits for
// work spins for a moment and then sleeps. Threads are started by the first run().
class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return size_; }

  // Points `team` to the one team of `size` that all engines of this process share, if it does not yet. It ends with
  // its last engine. A team of one has no threads to share, so that each engine has its own and they run side by side.
  // After a fork, the child makes new teams: it has none of its parent's threads, and locks may be taken for ever.
  static void share(std::shared_ptr<Team>& team, int size);

  // The right to use a team, which one caller has at a time, in the order of their requests. Throws std::logic_error
  // within run(), where waiting would never end.
  class Turn {
   public:
    explicit Turn(Team& team);
    ~Turn();
    Turn(const Turn&) = delete;

   private:
    Team& team_;
  };

  // Calls work(i) on every member, 0 (the caller, which has the turn) to size() - 1, and returns when all have finished.
  // Throws ResourceError if a thread cannot be started; a later call tries again.
  template <class Work>
  void run(Work& work) {
    start([](void* w, int i) { (*static_cast<Work*>(w))(i); }, &work);
  }
  // Called by every member within run(): returns when all members have called it.
  void barrier();

 private:
  void start(void (*call)(void*, int), void* work);
  void recruit();  // starts the threads that there are not: all or none
  void dismiss();  // ends them
  void serve(int index);

  const int size_;
  const int64_t process_;  // the process that has the threads
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};  // number of calls of run()
  std::atomic<bool> stop_{false};
  void (*call_)(void*, int) = nullptr;
  void* work_ = nullptr;
  std::atomic<int> arrived_{0};     // members at the present barrier
  std::atomic<uint64_t> phase_{0};  // number of barriers passed
  std::mutex turns_;
  std::condition_variable next_;
  uint64_t requested_ = 0, ended_ = 0;  // numbers of turns; the difference are those that run or wait
};

}  // namespace fastdiff
