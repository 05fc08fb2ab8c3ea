// A program that preloads this library sees an x86 processor with fewer features than there are.
//
// Linux can make the instruction CPUID fault (arch_prctl ARCH_SET_CPUID, where the processor can).
// The handler of the fault lets the instruction run once and clears bits of its result.
// HIDE_CPU_FEATURES names what is hidden: "vnni", or "vnni,avx512".

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012 };                 // of arch_prctl: may CPUID be used?
enum { EAX, EBX, ECX, EDX, REGISTERS };
enum { UNAVAILABLE = 77 };                   // the exit status where CPUID cannot fault

typedef struct {
  uint32_t leaf, subleaf;
  int reg;
  uint32_t bits;
} Feature;

#define BIT(n) (UINT32_C(1) << (n))

static const Feature VNNI[] = {
    {7, 0, ECX, BIT(11)},                      // AVX512-VNNI
    {7, 0, EDX, BIT(22) | BIT(24) | BIT(25)},  // AMX: bfloat16, tiles, int8
    {7, 1, EAX, BIT(4) | BIT(21)},             // AVX-VNNI, AMX float16
    {7, 1, EDX, BIT(4) | BIT(8) | BIT(10)},    // AVX-VNNI int8, AMX complex, AVX-VNNI int16
};

static const Feature AVX512[] = {
    {7, 0, EBX, BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31)},  // F DQ IFMA CD BW VL
    {7, 0, ECX, BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)},  // VBMI VBMI2 VNNI BITALG POPCNT
    {7, 0, EDX, BIT(8) | BIT(23)},                               // VP2INTERSECT, float16
    {7, 1, EAX, BIT(5)},                                         // bfloat16
    {7, 1, EDX, BIT(19)},                                        // AVX10
};

static int hides_vnni, hides_avx512;

// A bare system call: the handler may be entered on any thread, and errno is not ours to change.
static long allow_cpuid(long allowed) {
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"((long)SYS_arch_prctl), "D"((long)SET_CPUID), "S"(allowed)
                   : "rcx", "r11", "memory");
  return result;
}

static void hide(const Feature* features, size_t count, uint32_t leaf, uint32_t subleaf,
                 uint32_t* registers) {
  for (size_t k = 0; k < count; k++)
    if (features[k].leaf == leaf && features[k].subleaf == subleaf)
      registers[features[k].reg] &= ~features[k].bits;
}

static void on_fault(int number, siginfo_t* info, void* context) {
  greg_t* saved = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* instruction = (const uint8_t*)saved[REG_RIP];
  if (info->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {
    signal(number, SIG_DFL);  // another fault: let it happen again, and end the program
    return;
  }
  uint32_t leaf = (uint32_t)saved[REG_RAX], subleaf = (uint32_t)saved[REG_RCX];
  uint32_t r[REGISTERS] = {leaf, 0, subleaf, 0};
  allow_cpuid(1);
  __asm__ volatile("cpuid" : "+a"(r[EAX]), "=b"(r[EBX]), "+c"(r[ECX]), "=d"(r[EDX]));
  allow_cpuid(0);
  if (hides_vnni) hide(VNNI, sizeof VNNI / sizeof *VNNI, leaf, subleaf, r);
  if (hides_avx512) hide(AVX512, sizeof AVX512 / sizeof *AVX512, leaf, subleaf, r);
  saved[REG_RAX] = r[EAX], saved[REG_RBX] = r[EBX], saved[REG_RCX] = r[ECX], saved[REG_RDX] = r[EDX];
  saved[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  const char* names = getenv("HIDE_CPU_FEATURES");
  if (!names || !*names) return;
  hides_vnni = strstr(names, "vnni") != NULL;
  hides_avx512 = strstr(names, "avx512") != NULL;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGSEGV, &action, NULL);
  if (allow_cpuid(0) != 0) {
    fprintf(stderr, "CPUID cannot fault here\n");
    _exit(UNAVAILABLE);
  }
}
