// What every handler needs of XLA.
#pragma once

#include <new>
#include <string>

#include "instructions.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {

namespace ffi = xla::ffi;
using Ints = ffi::Span<const int64_t>;
using Floats = ffi::Span<const float>;

// The pool that XLA runs the call on, or so much of it as the work is worth, by the nanoseconds that
// it takes one thread.  To wake another takes some microseconds, and what it reads and writes has to
// get from one cache to the other: two cores that share no cache took as long as one for a dot of
// 20 microseconds (AVX512-VNNI).
class XlaThreads : public Pool {
 public:
  explicit XlaThreads(ffi::ThreadPool& pool) : pool_(pool), most_(INT64_MAX) {}
  XlaThreads(ffi::ThreadPool& pool, double nanoseconds)
      : pool_(pool), most_(1 + int64_t(nanoseconds / kWorthThread)) {}
  int64_t count() override {
    return std::max<int64_t>(1, std::min<int64_t>(most_, pool_.num_threads()));
  }

 private:
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

  static constexpr double kWorthThread = 15e3;
  ffi::ThreadPool& pool_;
  int64_t most_;
};

// The nanoseconds of so many operations of floats: each lane does three of them in one.
inline double time_of_floats(int64_t operations) { return operations / (3.0 * kLanesHere); }

// The nanoseconds of so many bytes from memory, of which operations of floats are made meanwhile.
inline double time_of_reading(int64_t bytes, int64_t operations) {
  constexpr double kBytesPerNs = 22;  // one core
  return std::max(bytes / kBytesPerNs, time_of_floats(operations));
}

// The nanoseconds of so many products of int8.
inline double time_of_products(int64_t products) {
  return with_instructions([&](auto set) { return products / decltype(set)::kProductsPerNs; });
}

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
