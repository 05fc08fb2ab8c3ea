// Which instruction set runs.
//
// An instruction set is a struct of static members; `portable.h` is the plainest.  Those that the
// compiler may use are there, and no other code asks which they are.
//
//   kName          what `jaxquant_kernels` calls it
//   kProductsPerNs how many products one thread adds up in a nanosecond, about
//   kPixels        how many pixels a segment has at most
//   kSegment       what a segment costs beside them, in quarters of a pixel
//   kStep          how many bytes of a run are read at a time: copies are filled up to whole ones
//   kRunsOn        whether segments may run on over the ends of rows
//   Sums           the epilogue on its sums, made of an `Epilogue`, with `apply` and `flush`
//   activations    how its matrix kernel reads an int8 or uint8 tensor
//   run            the sums of a `Share`, stored by `Sums`
//   Depthwise      the depthwise kernel: how it reads a tensor (`activations`), the order of its sums
//                  (`channel_of`), its weights (`Taps`), and the sums of a `DepthwiseRow` (`row`)
//
// The packed weights have one layout for all of them (`pack.h`): what is saved, or packed before
// the processor is known, serves any.
#pragma once

#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "avx512_words.h"
#include "avx_vnni.h"
#include "neon.h"
#include "neon_matrices.h"
#include "portable.h"

namespace jaxquant {

// `work` with the best instruction set of those that were compiled and that the system grants.
template <class Work>
auto with_instructions(const Work& work) {
#ifdef JAXQUANT_AMX
  if (Amx::available()) return work(Amx{});
#endif
#if defined(JAXQUANT_AVX512_VNNI)
  return work(Avx512{});
#elif defined(JAXQUANT_AVX512)
  return work(Avx512Words{});
#elif defined(JAXQUANT_AVX_VNNI)
  return work(AvxVnni{});
#elif defined(JAXQUANT_AVX2)
  return work(Avx2{});
#elif defined(JAXQUANT_NEON_MATRICES)
  return work(NeonMatrices{});
#elif defined(JAXQUANT_NEON)
  return work(Neon{});
#else
  return work(Portable{});
#endif
}

}  // namespace jaxquant
