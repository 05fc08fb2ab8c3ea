// Tests of the threads that stay awake, without XLA.
//
// Prints what differs, and ends with 1 if anything does.
#include <cstdio>
#include <string>
#include <vector>

#include "awake.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace jaxquant {
namespace {

std::atomic<int> failures{0};

void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("differs: %s\n", what.c_str());
}

// Whether a loop is run, each of its iterations once.
bool runs_once(Awake& awake, int64_t n, int64_t helpers) {
  std::vector<std::atomic<int>> times(n);
  if (!awake.run(n, [&](int64_t i) { ++times[i]; }, helpers)) return false;
  for (int64_t i = 0; i < n; ++i) check(times[i] == 1, "iteration " + std::to_string(i));
  return true;
}

void check_loops(Awake& awake) {
  for (const int64_t helpers : {0, 1, 3}) {
    for (const int64_t n : {0, 1, 2, 7, 1000})
      for (int repeat = 0; repeat < 20; ++repeat)
        check(runs_once(awake, n, helpers), "a loop is refused");
    // They sleep, and are woken.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

void check_inside_another(Awake& awake) {
  awake.run(4, [&](int64_t) { check(!runs_once(awake, 3, 1), "a loop inside a loop"); }, 3);
  check(runs_once(awake, 5, 3), "a loop behind one");
}

void check_several_callers(Awake& awake) {
  std::atomic<int64_t> accepted{0};
  std::vector<std::thread> callers;
  for (int k = 0; k < 4; ++k)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 500; ++repeat) accepted += runs_once(awake, 16, 2);
    });
  for (std::thread& caller : callers) caller.join();
  check(accepted > 0, "several callers at once");
}

void check_no_memory(Awake& awake) {
  bool thrown = false;
  try {
    awake.run(8, [](int64_t i) { if (i == 5) throw std::bad_alloc(); }, 3);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  check(thrown, "no memory in a loop");
  check(runs_once(awake, 9, 3), "a loop behind one that failed");
}

// All threads treat floats as the caller does.
void check_floats(Awake& awake) {
#if defined(__SSE__)
  const unsigned before = _MM_GET_FLUSH_ZERO_MODE();
  for (const unsigned mode : {_MM_FLUSH_ZERO_ON, _MM_FLUSH_ZERO_OFF}) {
    _MM_SET_FLUSH_ZERO_MODE(mode);
    std::vector<float> products(200);
    volatile float small = 1e-30f;
    awake.run(200, [&](int64_t i) {
      std::this_thread::sleep_for(std::chrono::microseconds(5));  // so that all take part
      products[i] = small * small * 1e20f * 0.0f + (small * 1e-10f);
    }, 3);
    const float expected = small * 1e-10f;
    for (const float product : products) check(product == expected, "a denormal number");
  }
  _MM_SET_FLUSH_ZERO_MODE(before);
#else
  (void)awake;
#endif
}

}  // namespace
}  // namespace jaxquant

int main() {
  using namespace jaxquant;
  Awake& awake = Awake::of_process();
  check_loops(awake);
  check_inside_another(awake);
  check_several_callers(awake);
  check_no_memory(awake);
  check_floats(awake);
  std::printf("%d failures\n", failures.load());
  return failures ? 1 : 0;
}
