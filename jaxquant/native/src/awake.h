// Threads of our own that stay awake for a moment after each loop.
//
// The calls of a small model follow each other within microseconds, and to wake a thread of XLA's
// pool for each takes as long as a call does.  So loops are shared with threads that look for the
// next one for `kAwake`, and let others run meanwhile; after that they sleep.  They take part in one
// loop at a time: a call that finds them at another, of an XLA program that runs two calls at once,
// does without them.
#pragma once

#include <cfenv>
#include <chrono>
#include <memory>
#include <utility>

#include "parallel.h"

namespace jaxquant {

class Awake {
 public:
  // Those of this process.  They are never ended: a thread may look for a loop until the last.
  static Awake& of_process() {
    static Awake* const awake = new Awake;
    return *awake;
  }

  // Runs a loop with so many helpers; false, and nothing done, where they are at another one.
  bool run(int64_t n, const Body& body, int64_t helpers) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    // A helper that is late keeps the loop alive, of which nothing is left then, and not the body.
    const auto loop = std::make_shared<Loop>(n, body);
    try {
      give(loop, helpers);
    } catch (...) {  // no thread is to be had: this one does it all
    }
    loop->work();
    for (int spins = 0; !loop->finished(); ++spins) wait(spins);
    busy_.store(false, std::memory_order_release);
    loop->check();
    return true;
  }

 private:
  static constexpr std::chrono::microseconds kAwake{200};

  void give(std::shared_ptr<Loop> loop, int64_t helpers) {
    std::unique_lock<std::mutex> lock(mutex_);
    current_ = std::move(loop);
    std::fegetenv(&environment_);
    number_.fetch_add(1, std::memory_order_release);
    for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
    const bool is_awaited = sleeping_ > 0;
    lock.unlock();
    if (is_awaited) wake_.notify_all();
  }

  void help() {
    int64_t seen = 0;
    for (;;) {
      std::shared_ptr<Loop> loop;
      const bool is_new = look_for(seen);
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!is_new) {
          ++sleeping_;
          wake_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
          --sleeping_;
        }
        seen = number_.load(std::memory_order_relaxed);
        loop = current_;
        // XLA flushes denormal numbers to zero; so that results are the same by any thread.
        std::fesetenv(&environment_);
      }
      loop->work();
    }
  }

  // Whether there is another loop than the one seen last, before it is time to sleep.
  bool look_for(int64_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kAwake;
    for (int spins = 0;; ++spins) {
      if (number_.load(std::memory_order_acquire) != seen) return true;
      std::this_thread::yield();  // to a thread of XLA's that has work
      if (spins % 64 == 63 && std::chrono::steady_clock::now() > end) return false;
    }
  }

  std::atomic<bool> busy_{false};
  std::atomic<int64_t> number_{0};  // of the current loop
  std::mutex mutex_;                // of what follows
  std::condition_variable wake_;
  std::shared_ptr<Loop> current_;
  std::fenv_t environment_{};  // of floats, as the thread has it that gives the loop
  int64_t started_ = 0, sleeping_ = 0;
};

}  // namespace jaxquant
