// Parallel loops on a pool of threads that is given.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jaxquant {

// The threads that a call may use; in a call from XLA, the pool that it runs on.
class Threads {
 public:
  virtual ~Threads() = default;
  virtual int64_t count() = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

// Runs `body(i)` for i in [0, n).  The calling thread takes its share and never waits for work that
// no thread has begun, so a pool of any size, busy or nested, cannot deadlock.
inline void parallel_for(Threads& threads, int64_t n,
                         const std::function<void(int64_t)>& body) {
  const int64_t helpers = std::min(threads.count(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct State {
    const std::function<void(int64_t)>* body;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable finished;

    void work() {
      int64_t count = 0;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n; ++count) (*body)(i);
      if (count && done.fetch_add(count, std::memory_order_acq_rel) + count == n) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  };
  // A helper that starts late finds nothing left; it keeps the state alive, not the body.
  auto state = std::make_shared<State>();
  state->body = &body;
  state->n = n;
  for (int64_t i = 0; i < helpers; ++i) threads.schedule([state] { state->work(); });
  state->work();
  for (int spins = 0; spins < 2000; ++spins) {  // the last chunk is usually about to finish
    if (state->done.load(std::memory_order_acquire) == n) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load(std::memory_order_acquire) == n; });
}

}  // namespace jaxquant
