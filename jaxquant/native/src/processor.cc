// What the processor has.  A library of its own, compiled for any processor of the architecture:
// it runs before it is known which instructions others may use.
#include <cstdint>
#include <cstdio>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Lines of a name and hexadecimal numbers, of at most `size` bytes with the zero at the end.
extern "C" void jaxquant_processor(char* text, int64_t size) {
  char* const end = text + size;
  *text = 0;
#if defined(__x86_64__) || defined(__i386__)
  // EBX of leaf 1 tells which core this is, which no compiler asks.
  const unsigned leaves[][2] = {{1, 0}, {7, 0}, {7, 1}, {0x24, 0}, {0x80000001u, 0}};
  bool saves = false;
  for (const auto& leaf : leaves) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_max(leaf[0] & 0x80000000u, nullptr) >= leaf[0])
      __cpuid_count(leaf[0], leaf[1], a, b, c, d);
    if (leaf[0] == 1) b = 0, saves = c & (1u << 27);
    text += std::snprintf(text, end - text, "%x.%x %x %x %x %x\n", leaf[0], leaf[1], a, b, c, d);
  }
  // Which registers the operating system saves: the others' instructions are not allowed.
  unsigned low = 0, high = 0;
  if (saves) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  std::snprintf(text, end - text, "xcr0 %x %x\n", low, high);
#elif defined(__aarch64__)
  // Products of bytes: sums of four (FEAT_DotProd), and of matrices of them (FEAT_I8MM).
#if defined(__linux__)
  const bool sums = getauxval(AT_HWCAP) >> 20 & 1, matrices = getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__APPLE__)
  const auto has = [](const char* feature) {
    int value = 0;
    size_t bytes = sizeof(value);
    return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value;
  };
  const bool sums = has("hw.optional.arm.FEAT_DotProd");
  const bool matrices = has("hw.optional.arm.FEAT_I8MM");
#else
  const bool sums = false, matrices = false;
#endif
  std::snprintf(text, end - text, "arm %x %x\n", sums, matrices);
#else
  (void)end;
#endif
}
