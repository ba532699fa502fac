// Which table this CPU can run. LOWBIT_ISA=portable|avx2|avx512|avx512bf16|neon|neoni8mm picks a smaller one, for tests.
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace lowbit {

#ifdef LOWBIT_HAVE_AVX512BF16
namespace isa_avx512bf16 { extern const Kernels table; }
#endif
#ifdef LOWBIT_HAVE_AVX512
namespace isa_avx512 { extern const Kernels table; }
#endif
#ifdef LOWBIT_HAVE_AVX2
namespace isa_avx2 { extern const Kernels table; }
#endif
#ifdef LOWBIT_HAVE_NEON
namespace isa_neon { extern const Kernels table; }
#endif
#ifdef LOWBIT_HAVE_NEONI8MM
namespace isa_neoni8mm { extern const Kernels table; }
#endif
namespace isa_portable { extern const Kernels table; }

#if defined(__aarch64__)
// The byte dot product came with ARMv8.2 as an option, the unsigned-by-signed one with 8.6. Apple's have had the first
// from the beginning; elsewhere the kernel says.
[[maybe_unused]] static bool arm_has(bool i8mm) {
#if defined(__linux__)
  return i8mm ? getauxval(AT_HWCAP2) & (1ul << 13) : getauxval(AT_HWCAP) & (1ul << 20);
#else
  return !i8mm;
#endif
}
#endif

constexpr int kCandidates = 6;
static const Kernels* candidate(int i) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  (void)avx512;
  (void)avx2;
#ifdef LOWBIT_HAVE_AVX512BF16
  if (i == 0) return avx512 && __builtin_cpu_supports("avx512bf16") ? &isa_avx512bf16::table : nullptr;
#endif
#ifdef LOWBIT_HAVE_AVX512
  if (i == 1) return avx512 ? &isa_avx512::table : nullptr;
#endif
#ifdef LOWBIT_HAVE_AVX2
  if (i == 2) return avx2 ? &isa_avx2::table : nullptr;
#endif
#endif
#ifdef LOWBIT_HAVE_NEONI8MM
  if (i == 3) return arm_has(false) && arm_has(true) ? &isa_neoni8mm::table : nullptr;
#endif
#ifdef LOWBIT_HAVE_NEON
  if (i == 4) return arm_has(false) ? &isa_neon::table : nullptr;
#endif
  return i == kCandidates - 1 ? &isa_portable::table : nullptr;
}

const Kernels* kernels_by_name(const char* name) {
  for (int i = 0; i < kCandidates; ++i)
    if (const Kernels* k = candidate(i))
      if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

const Kernels* select_kernels() {
  if (const char* name = std::getenv("LOWBIT_ISA"))
    if (const Kernels* k = kernels_by_name(name)) return k;
  for (int i = 0; i < kCandidates; ++i)
    if (const Kernels* k = candidate(i)) return k;
  return &isa_portable::table;
}

}  // namespace lowbit
