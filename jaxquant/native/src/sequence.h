// Several convolutions in one call, each reading what those before it gave.
//
// One after the other on all threads, every tensor between them goes through memory that the cores
// share.  So a thread takes some samples of the batch through several steps, and what is between
// those stays in its cache; but weights are then read once for every few samples.  `plan` weighs the
// bytes of both for every step.
#pragma once

#include <array>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "convolve.h"

namespace jaxquant {

constexpr int64_t kNone = -1;
constexpr int64_t kSwitchBytes = 1 << 17;  // what waiting for all threads is worth
// Scratch memory kept for the next call: by all threads together, but by each at least so much.
constexpr size_t kKeptBytes = size_t(1) << 27, kKeptOfThread = size_t(1) << 24;

// Where a tensor of a sequence is: given from outside, or in memory of the call.
struct Tensor {
  int64_t bytes = kNone;                // of one sample
  uint8_t* given = nullptr;             // [n, ...]
  int64_t first = kNone, last = kNone;  // the steps between which it is needed
  bool local = false;                   // needed within one part alone
  int64_t offset = 0;                   // in the memory of the call, or of the part
};

struct Step {
  ConvShape shape;  // of a batch of one
  const int8_t* packed;
  bool is_int8;
  int32_t zero_point, subtracted;
  Epilogue epilogue;  // its tensors are these:
  int64_t x, residual_f, residual_q, out_f, out_q;

  std::array<int64_t, 5> tensors() const { return {x, residual_f, residual_q, out_f, out_q}; }
  int64_t products() const {
    return shape.oh * shape.ow * shape.o * shape.kh * shape.kw * shape.group_in();
  }
};

// Steps [first, last), which a thread runs for `group` samples at a time; 0: all threads together.
struct Part {
  int64_t first, last, group;
};

class Sequence {
 public:
  Sequence(std::vector<Step> steps, std::vector<Tensor> tensors, int64_t n)
      : steps_(std::move(steps)), tensors_(std::move(tensors)), n_(n) {
    for (int64_t i = 0; i < int64_t(steps_.size()); ++i) {
      for (int64_t k : steps_[i].tensors()) {
        if (k == kNone) continue;
        if (tensors_[k].first == kNone) tensors_[k].first = i;
        tensors_[k].last = i;
      }
    }
  }

  void run(Threads& threads) {
    const std::vector<Part> parts = plan(threads.count());
    for (Tensor& tensor : tensors_) {
      if (tensor.given) continue;
      for (const Part& part : parts)
        tensor.local |= part.group && part.first <= tensor.first && tensor.last < part.last;
    }
    for (Tensor& tensor : tensors_) {
      if (tensor.local) continue;
      for (const Part& part : parts) {  // other samples may be at any other step of it
        if (part.group && part.first <= tensor.first && tensor.first < part.last)
          tensor.first = part.first;
        if (part.group && part.first <= tensor.last && tensor.last < part.last)
          tensor.last = part.last - 1;
      }
    }
    static thread_local Scratch shared;
    uint8_t* between = shared.reserve(n_ * place(0, int64_t(steps_.size()), false));
    for (const Part& part : parts) run_part(threads, part, between);
    shared.trim(kept(threads));
  }

 private:
  static size_t kept(Threads& threads) {
    return std::max(kKeptBytes / size_t(threads.count()), kKeptOfThread);
  }

  int64_t sample_bytes(const Step& step) const {
    int64_t total = 0;
    for (int64_t k : step.tensors()) total += k == kNone ? 0 : tensors_[k].bytes;
    return total;
  }

  // Bytes that a thread has to fetch from memory of all cores, about, when it runs a step for
  // `group` samples at a time; 0: with the others.
  int64_t cost(const Step& step, int64_t group, int64_t threads) const {
    static const int64_t cache = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
      const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE) / 2;
      if (found > 0) return found;
#endif
      return int64_t(1) << 19;
    }();
    const int64_t weights = packed_size(step.shape), bytes = sample_bytes(step);
    const int64_t share = n_ / threads;
    if (group) return weights * ceil_div(share, group) + (group * bytes > cache ? share * bytes : 0);
    const int64_t by_rows = weights + n_ * bytes / threads;
    const int64_t by_channels = weights / threads + n_ * bytes;
    return std::min(by_rows, by_channels) + kSwitchBytes;
  }

  // The cheapest way through the steps.
  std::vector<Part> plan(int64_t threads) const {
    std::vector<int64_t> groups{0};
    for (int64_t g = 1; g <= n_ / threads; g *= 2) groups.push_back(g);
    const size_t count = groups.size();
    std::vector<int64_t> total(count, 0);
    std::vector<std::vector<size_t>> from;
    for (int64_t i = 0; i < int64_t(steps_.size()); ++i) {
      const Step& step = steps_[i];
      int64_t between = 0;  // of a sample
      for (const Tensor& tensor : tensors_)
        between += !tensor.given && tensor.first < i && i <= tensor.last ? tensor.bytes : 0;
      const int64_t change = kSwitchBytes + 2 * n_ / threads * between;
      const size_t best = std::min_element(total.begin(), total.end()) - total.begin();
      std::vector<int64_t> next(count);
      from.emplace_back(count);
      for (size_t k = 0; k < count; ++k) {
        const bool stays = from.size() == 1 || total[k] <= total[best] + change;
        from.back()[k] = stays ? k : best;
        next[k] = (stays ? total[k] : total[best] + change) + cost(step, groups[k], threads);
      }
      total = next;
    }
    size_t state = std::min_element(total.begin(), total.end()) - total.begin();
    std::vector<Part> parts;
    for (int64_t i = steps_.size() - 1; i >= 0; state = from[i--][state]) {
      if (parts.empty() || parts.back().group != groups[state])
        parts.push_back({i, i + 1, groups[state]});
      parts.back().first = i;
    }
    std::reverse(parts.begin(), parts.end());
    return parts;
  }

  // The residual whose memory a local float result gets, so that a step fills half as much of the
  // caches: no other step reads it later, and this one reads each float before it writes that one,
  // and never again.
  const Tensor* replaced_by(const Tensor& tensor) const {
    const Step& step = steps_[tensor.first];
    if (step.out_f == kNone || &tensors_[step.out_f] != &tensor) return nullptr;
    if (step.residual_f == kNone) return nullptr;
    const Tensor& residual = tensors_[step.residual_f];
    const bool ends = residual.local && residual.last == tensor.first;
    return ends && computes_once(step.shape) ? &residual : nullptr;
  }

  // Gives tensors that are needed in steps [first, last) their places, those of one sample each;
  // returns what they take together.
  int64_t place(int64_t first, int64_t last, bool local) {
    std::vector<const Tensor*> placed;
    int64_t most = 0;
    for (Tensor& tensor : tensors_) {
      if (tensor.given || tensor.local != local || tensor.first < first || tensor.last >= last)
        continue;
      const auto end = [](const Tensor& t) { return t.offset + round_up(t.bytes, 64); };
      const Tensor* replaced = local ? replaced_by(tensor) : nullptr;
      tensor.offset = replaced ? replaced->offset : 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (const Tensor* other : placed) {
          if (other == replaced) continue;
          const bool meet = other->first <= tensor.last && tensor.first <= other->last;
          if (meet && other->offset < end(tensor) && tensor.offset < end(*other))
            tensor.offset = end(*other), moved = true, replaced = nullptr;
        }
      }
      placed.push_back(&tensor);
      most = std::max(most, end(tensor));
    }
    return most;
  }

  void run_part(Threads& threads, const Part& part, uint8_t* between) {
    if (!part.group) return run_steps(threads, part, {0, n_, n_, between, nullptr});
    const int64_t even = n_ / threads.count() * threads.count(), rest = n_ - even;
    const int64_t bytes = place(part.first, part.last, true);
    const size_t most_kept = kept(threads);
    const auto run_some = [&](Threads& some, int64_t start, int64_t count, int64_t most) {
      static thread_local Scratch own;
      run_steps(some, part, {start, count, most, between, own.reserve(most * bytes)});
      own.trim(most_kept);
    };
    parallel_for(threads, ceil_div(even, part.group), [&](int64_t task) {
      Alone alone;
      const int64_t start = task * part.group;
      run_some(alone, start, std::min(part.group, even - start), part.group);
    });
    if (rest) run_some(threads, even, rest, rest);
  }

  // Samples [start, start + count), and where they are: `own` has room for `most`.
  struct Samples {
    int64_t start, count, most;
    uint8_t *between, *own;
  };

  uint8_t* find(int64_t tensor, const Samples& samples) const {
    if (tensor == kNone) return nullptr;
    const Tensor& t = tensors_[tensor];
    if (t.bytes == 0) return nullptr;
    if (t.given) return t.given + samples.start * t.bytes;
    if (t.local) return samples.own + samples.most * t.offset;
    return samples.between + n_ * t.offset + samples.start * t.bytes;
  }

  void run_steps(Threads& threads, const Part& part, const Samples& samples) {
    for (int64_t i = part.first; i < part.last; ++i) {
      const Step& step = steps_[i];
      Epilogue epilogue = step.epilogue;
      epilogue.residual_f = reinterpret_cast<const float*>(find(step.residual_f, samples));
      epilogue.residual_q = reinterpret_cast<const int8_t*>(find(step.residual_q, samples));
      epilogue.out_q = reinterpret_cast<int8_t*>(find(step.out_q, samples));
      epilogue.write_floats(find(step.out_f, samples), streamed_bytes(step), step.shape.o);
      ConvShape shape = step.shape;
      shape.n = samples.count;
      if (shape.oh * shape.ow * shape.o == 0) continue;
      Some some(threads, 1 + samples.count * step.products() / kProductsOfThread);
      convolve(some, {find(step.x, samples), step.is_int8, step.zero_point, step.subtracted},
               shape, step.packed, epilogue);
    }
  }
  static constexpr int64_t kProductsOfThread = 1 << 16;  // which is awake

  // The bytes of a float output that may go past the caches: none of a local one, which the steps
  // behind it read from there.
  int64_t streamed_bytes(const Step& step) const {
    if (step.out_f == kNone || tensors_[step.out_f].local) return 0;
    return n_ * tensors_[step.out_f].bytes;
  }

  std::vector<Step> steps_;
  std::vector<Tensor> tensors_;
  int64_t n_;
};

}  // namespace jaxquant
