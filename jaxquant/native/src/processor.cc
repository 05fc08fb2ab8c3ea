// What the processor has.  A library of its own, compiled for any processor of the architecture:
// it runs before it is known which instructions others may use.
#include <cstdint>
#include <cstdio>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__linux__)
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
#elif defined(__linux__)
  std::snprintf(text, end - text, "hwcap %lx %lx\n", getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
#elif defined(__APPLE__)
  uint32_t family = 0;
  size_t bytes = sizeof(family);
  sysctlbyname("hw.cpufamily", &family, &bytes, nullptr, 0);
  std::snprintf(text, end - text, "family %x\n", family);
#endif
}
