// Attention in float32: softmax(q kᵀ) v.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_block.h"
#include "attention_row.h"
#include "parallel.h"
#include "window.h"

namespace jaxquant {

constexpr int64_t kFewestRows = 8;  // of which vectors go along the rows
constexpr int64_t kSmall = 1 << 14;    // products that one task should not be less than
constexpr int64_t kKeptScores = int64_t{1} << 22;

// Calls `run(i, memory)` for i in [0, n), several of them in one task where each is small.
template <class F>
void with_scratch(Threads& threads, int64_t n, int64_t each, int64_t floats, const F& run) {
  parallel_for(threads, ceil_div(n, each), [&](int64_t task) {
    static thread_local Scratch scratch;
    float* memory = reinterpret_cast<float*>(scratch.reserve(floats * sizeof(float)));
    for (int64_t i = task * each; i < std::min(n, (task + 1) * each); ++i) run(i, memory);
    scratch.trim(kKeptScores);
  });
}

// All batches and heads, of rows of which there are few.
template <class L, class T, class F>
void attention_of_few(Threads& threads, const Attention& a, int64_t batches, const F& operands) {
  const int64_t size = a.rows * a.keys * (a.depth + a.values);
  with_scratch(threads, batches, 1 + kSmall / std::max<int64_t>(size, 1),
               AttentionRow<L, T>::floats(a), [&](int64_t batch, float* memory) {
                 const AttentionOperands<T> given = operands(batch);
                 for (int64_t row = 0; row < a.rows; ++row)
                   AttentionRow<L, T>(a, given, row, memory).run();
               });
}

// The same of as many as vectors along the rows are filled with.
template <class L, class F>
void attention_of_many(Threads& threads, const Attention& a, int64_t batches, const F& operands) {
  const int64_t parts = ceil_div(a.rows, kAttentionRows);
  with_scratch(threads, batches * parts, 1, AttentionBlock<L>::floats(a),
               [&](int64_t part, float* memory) {
                 const AttentionOperands<float> given = operands(part / parts);
                 const int64_t first = part % parts * kAttentionRows;
                 const int64_t count = std::min(kAttentionRows, a.rows - first);
                 AttentionBlock<L>(a, given, first, count, memory).run();
               });
}

// All batches and heads; `operands(b)` gives the matrices of the b-th.  Many rows are of floats.
template <class L, class T, class F>
void attention(Threads& threads, const Attention& a, int64_t batches, const F& operands) {
  if constexpr (std::is_same_v<T, float>) {
    if (a.rows >= kFewestRows) return attention_of_many<L>(threads, a, batches, operands);
  }
  attention_of_few<L, T>(threads, a, batches, operands);
}

}  // namespace jaxquant
