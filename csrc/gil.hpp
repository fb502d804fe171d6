// Python's global lock.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <thread>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace fastdiff {

// Gives Python's lock away for the life of the object. Before version 3.14, Python ends a daemon thread that wants the
// lock back while the interpreter shuts down by unwinding its stack. Neither a destructor nor nanobind lets that pass, so
// that the process would abort. Such a thread sleeps until the process ends, as it does in later versions.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
#if defined(__GLIBCXX__)
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
#else
  ~WithoutGil() { PyEval_RestoreThread(state_); }
#endif

 private:
  PyThreadState* state_;
};

}  // namespace fastdiff
