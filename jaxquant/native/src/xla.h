// What every handler needs of XLA.
#pragma once

#include <new>
#include <string>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {

namespace ffi = xla::ffi;
using Ints = ffi::Span<const int64_t>;
using Floats = ffi::Span<const float>;

// The pool that XLA runs the call on, or so much of it as the work is worth: waking another thread
// takes as long as some hundred thousand products (of a dot on AMX, with two threads).
class XlaThreads : public Pool {
 public:
  explicit XlaThreads(ffi::ThreadPool& pool, int64_t products = INT64_MAX)
      : pool_(pool), most_(1 + products / kProducts) {}
  int64_t count() override {
    return std::max<int64_t>(1, std::min<int64_t>(most_, pool_.num_threads()));
  }

 private:
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

  static constexpr int64_t kProducts = 1 << 19;
  ffi::ThreadPool& pool_;
  int64_t most_;
};

inline ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxquant: " + what);
}

// Success, or an error where `work` finds no memory.
template <class Work>
ffi::Error with_memory(const Work& work) {
  try {
    work();
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxquant: out of memory");
  }
}

// int8 is stored as it is; uint8 is the same value plus 128, which flips one bit.
inline uint8_t flip_of(ffi::DataType type) { return type == ffi::U8 ? 0x80 : 0; }

}  // namespace jaxquant
