// Parallel loops on a pool of threads that is given.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace jaxquant {

using Body = std::function<void(int64_t)>;

// What runs the iterations of a loop.
class Threads {
 public:
  virtual ~Threads() = default;
  virtual int64_t count() = 0;
  // `body(i)` for i in [0, n); returns when all are done.
  virtual void run(int64_t n, const Body& body) = 0;
};

inline void parallel_for(Threads& threads, int64_t n, const Body& body) {
  if (threads.count() > 1 && n > 1) return threads.run(n, body);
  for (int64_t i = 0; i < n; ++i) body(i);
}

// The calling thread alone.
class Alone : public Threads {
 public:
  int64_t count() override { return 1; }
  void run(int64_t n, const Body& body) override { parallel_for(*this, n, body); }
};

// Some of all threads, for a loop that is worth no more than `most`: it is cut into parts for so
// many.
class Some : public Threads {
 public:
  Some(Threads& all, int64_t most) : all_(all), most_(most) {}
  int64_t count() override { return std::max<int64_t>(1, std::min(all_.count(), most_)); }
  void run(int64_t n, const Body& body) override { all_.run(n, body); }

 private:
  Threads& all_;
  int64_t most_;
};

// One loop.  The thread that made it takes its share and never waits for work that no thread has
// begun, so a pool of any size, busy or nested, cannot deadlock.
struct Loop {
  const Body* body;
  int64_t n;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> failed{false};

  Loop(int64_t n, const Body& body) : body(&body), n(n) {}

  // Takes part until nothing is left to begin; true for the thread that ends the last of it.
  bool work() {
    int64_t count = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n; ++count) {
      try {
        (*body)(i);
      } catch (...) {  // there is no memory left: others may be at it, so it is thrown at the end
        failed.store(true, std::memory_order_relaxed);
      }
    }
    return count && done.fetch_add(count, std::memory_order_acq_rel) + count == n;
  }
  bool finished() const { return done.load(std::memory_order_acquire) == n; }
  void check() const {
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
constexpr int kSpins = 2000;  // before a thread that waits lets others run
inline void wait(int spins) { spins < kSpins ? pause() : std::this_thread::yield(); }

// A pool that runs tasks some time later.
class Pool : public Threads {
 public:
  // Helps `n` times, or less where there is no memory to ask for it: help is never waited for.
  template <class Help>
  void ask(int64_t n, const Help& help) noexcept {
    try {
      for (int64_t i = 0; i < n; ++i) schedule(help);
    } catch (const std::bad_alloc&) {
    }
  }

  void run(int64_t n, const Body& body) override {
    struct State {
      Loop loop;
      std::mutex mutex;
      std::condition_variable finished;

      void work() {
        if (!loop.work()) return;
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    };
    // A helper that starts late finds nothing left; it keeps the state alive, not the body.
    std::shared_ptr<State> state(new State{{n, body}, {}, {}});
    const int64_t helpers = std::min(count(), n) - 1;
    ask(helpers, [state] { state->work(); });
    state->work();
    // The last chunk is usually about to finish.
    for (int spins = 0; spins < kSpins && !state->loop.finished(); ++spins) pause();
    if (!state->loop.finished()) {
      std::unique_lock<std::mutex> lock(state->mutex);
      state->finished.wait(lock, [&] { return state->loop.finished(); });
    }
    state->loop.check();
  }

 protected:
  virtual void schedule(std::function<void()> task) = 0;
};

// A team of a pool's threads, which stay for many loops and wait for the next one awake: to start them anew
// takes longer than a small loop does.  The pool has them back when the team ends, so it is for
// calls that are loops for the most part.
class Team : public Threads {
 public:
  explicit Team(Pool& pool) : count_(pool.count()), state_(std::make_shared<State>()) {
    pool.ask(count_ - 1, [state = state_] { state->help(); });
  }
  ~Team() override { state_->over.store(true, std::memory_order_release); }
  Team(const Team&) = delete;

  int64_t count() override { return count_; }
  void run(int64_t n, const Body& body) override {
    Loop& loop = state_->loops.emplace_back(n, body);
    state_->current.store(&loop, std::memory_order_release);
    loop.work();
    for (int spins = 0; !loop.finished(); ++spins) wait(spins);
    loop.check();
  }

 private:
  struct State {
    std::deque<Loop> loops;  // all so far, at fixed places: a helper may be late
    std::atomic<Loop*> current{nullptr};
    std::atomic<bool> over{false};
    const std::thread::id owner = std::this_thread::get_id();

    void help() {
      if (std::this_thread::get_id() == owner) return;  // a pool that is full runs tasks at once
      const Loop* seen = nullptr;
      for (int spins = 0; !over.load(std::memory_order_acquire); ++spins) {
        Loop* loop = current.load(std::memory_order_acquire);
        if (loop != seen) {
          loop->work();
          seen = loop;
          spins = 0;
        } else {
          wait(spins);
        }
      }
    }
  };

  int64_t count_;
  std::shared_ptr<State> state_;
};

}  // namespace jaxquant
