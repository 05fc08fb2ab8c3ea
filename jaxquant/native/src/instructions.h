// Which instruction set runs.
//
// An instruction set is a struct of static members; `portable.h` is the plainest.  Those that the
// compiler may use are there, and no other code asks which they are.
//
//   kName          what `jaxquant_kernels` calls it
//   kPixels        how many pixels a segment has at most
//   kStep          how many bytes of a run are read at a time: copies are filled up to whole ones
//   kRunsOn        whether segments may run on over the ends of rows
//   Sums           the epilogue on its sums, made of an `Epilogue`, with `apply` and `flush`
//   activations    how its matrix kernel reads an int8 or uint8 tensor
//   run            the sums of a `Share`, stored by `Sums`
//   depthwise_row  those of a `DepthwiseRow`
//
// The packed weights have one layout for all of them (`pack.h`): what is saved, or packed before
// the processor is known, serves any.
#pragma once

#include "amx.h"
#include "avx512.h"
#include "portable.h"

namespace jaxquant {

// `work` with the best instruction set of those that were compiled and that the system grants.
template <class Work>
auto with_instructions(const Work& work) {
#ifdef JAXQUANT_AMX
  if (Amx::available()) return work(Amx{});
#endif
#ifdef JAXQUANT_AVX512
  return work(Avx512{});
#else
  return work(Portable{});
#endif
}

}  // namespace jaxquant
