// int8 convolutions and dots of any kind, by the kernels that do them.
#pragma once

#include <vector>

#include "conv.h"
#include "depthwise.h"
#include "instructions.h"

namespace jaxquant {

// x [n, h, w, c] as a call gives it, with the zero point that pads it; the sums take `subtracted` away
// from each of its values: the zero point, or 0 where the bias takes that away.
struct Input {
  const void* data;
  bool is_int8;  // else uint8
  int32_t zero_point, subtracted;
};

inline PackedMatrix packed_matrix(const ConvShape& s) {
  return {s.groups, s.group_out(), s.taps() * s.run_groups()};
}

inline PackedMatrix packed_dot(int64_t inputs, int64_t columns) {
  return {1, columns, ceil_div(inputs, 4)};
}

inline int64_t packed_size(const ConvShape& s) {
  return s.depthwise() ? PackedDepthwise{s.c, s.kh * s.kw}.size() : packed_matrix(s).size();
}

template <class Set>
void convolve_by(Threads& threads, const Input& x, const ConvShape& s, const int8_t* packed,
                 const Epilogue& epilogue) {
  if (s.depthwise()) {
    depthwise<Set>(threads,
                   Set::Depthwise::activations(x.data, x.is_int8, x.zero_point, x.subtracted), s,
                   packed, epilogue);
    return;
  }
  const Activations a = Set::activations(x.data, x.is_int8, x.zero_point, x.subtracted);
  conv(threads, a, s, Product<Set>(packed_matrix(s), packed, epilogue, s.o, a.zero_point));
}

// Whether every output is computed once, by any number of threads: the pixels of an image are whole
// tiles.  Else the last tile of a task may overlap the one before it.
inline bool computes_once(const ConvShape& s) {
  return with_instructions([&](auto set) {
    return s.pixelwise() && !s.depthwise() && s.oh * s.ow % (2 * decltype(set)::kPixels) == 0;
  });
}

// x [rows, inputs] times packed weights [inputs, columns].
template <class Set>
void multiply_by(Threads& threads, const Input& x, int64_t rows, int64_t inputs, int64_t columns,
                 const int8_t* packed, const Epilogue& epilogue) {
  const Activations a = Set::activations(x.data, x.is_int8, x.zero_point, x.subtracted);
  dot(threads, a, rows, inputs,
      Product<Set>(packed_dot(inputs, columns), packed, epilogue, columns, a.zero_point));
}

inline void convolve(Threads& threads, const Input& x, const ConvShape& s, const int8_t* packed,
                     const Epilogue& epilogue) {
  with_instructions([&](auto set) {
    convolve_by<decltype(set)>(threads, x, s, packed, epilogue);
  });
}

inline void multiply(Threads& threads, const Input& x, int64_t rows, int64_t inputs,
                     int64_t columns, const int8_t* packed, const Epilogue& epilogue) {
  with_instructions([&](auto set) {
    multiply_by<decltype(set)>(threads, x, rows, inputs, columns, packed, epilogue);
  });
}

// Products side by side, x [products, rows, inputs], whose rows are in groups, one after the other,
// each with a weight of its own.
struct Groups {
  int64_t products, rows, inputs, columns, groups;
  const int32_t* ends;    // [products, groups], of rows; the last group has all that are left
  bool own;               // whether each product has weights of its own, else all the same
  const int8_t* packed;   // [products or 1, groups, bytes]

  int64_t bytes() const { return packed_dot(inputs, columns).size(); }
};

// Rows [first, first + count) of a product, all of one group.
struct GroupRows {
  int64_t first, count, weight;  // the first among the rows of all products; which of all weights
};

// The rows by groups, no more at once than keep all threads busy to the end.
inline std::vector<GroupRows> rows_of_groups(const Groups& s, int64_t threads) {
  const int64_t most = std::max<int64_t>(
      64, ceil_div(s.products * s.rows, kTasksPerThread * threads));
  std::vector<GroupRows> found;
  for (int64_t p = 0; p < s.products; ++p) {
    int64_t first = 0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t end = g + 1 == s.groups ? s.rows : s.ends[p * s.groups + g];
      const int64_t last = std::min(std::max(end, first), s.rows);
      const int64_t parts = std::max<int64_t>(1, ceil_div(last - first, most));
      const int64_t step = ceil_div(last - first, parts);
      for (; first < last; first += step)
        found.push_back({p * s.rows + first, std::min(step, last - first),
                         (s.own ? p : 0) * s.groups + g});
      first = last;
    }
  }
  return found;
}

// The multiplier and the bias of the epilogue are [products or 1, groups, columns], as the weights are.
inline void multiply_groups(Threads& threads, const Input& x, const Groups& s,
                            const Epilogue& epilogue) {
  const std::vector<GroupRows> tasks = rows_of_groups(s, threads.count());
  const auto run = [&](Threads& some, const GroupRows& task) {
    Input rows = x;
    rows.data = static_cast<const uint8_t*>(x.data) + task.first * s.inputs;
    Epilogue own = epilogue.from(task.first, s.columns);
    own.multiplier += task.weight * s.columns;
    if (own.bias) own.bias += task.weight * s.columns;
    multiply(some, rows, task.count, s.inputs, s.columns, s.packed + task.weight * s.bytes(), own);
  };
  if (int64_t(tasks.size()) < 2 * threads.count()) {  // so few that threads share each of them
    for (const GroupRows& task : tasks) run(threads, task);
    return;
  }
  parallel_for(threads, int64_t(tasks.size()), [&](int64_t i) {
    Alone alone;
    run(alone, tasks[i]);
  });
}

}  // namespace jaxquant
