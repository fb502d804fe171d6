// Work that threads share which are started for it: for what is done once, not in every step, as a thread takes longer to
// start than most operations.
#pragma once

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.hpp"

namespace fastdiff {

// Calls work(part) for parts of tasks 0 to `count`, which threads take in turns. Each of the threads has at least `least`
// tasks to do. Where a thread cannot be started, those that run do all.
template <class Work>
void share_work(int count, int least, int threads, const Work& work) {
  std::atomic<int> next{0};
  const auto run = [&] {
    for (int i; (i = next.fetch_add(1)) < count;) work(Range{i, i + 1});
  };
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) + 1 < std::min(threads, count / least)) others.emplace_back(run);
  } catch (const std::system_error&) {
  }
  run();
  for (std::thread& thread : others) thread.join();
}

}  // namespace fastdiff
