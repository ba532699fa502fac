// Ceilings. What this machine can read and multiply at best is measured, not looked up: model bandwidth utilization
// is a fraction of the best of the read patterns below.
#pragma once

#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

template <int STREAMS, int AHEAD>
uint64_t read_streams(const uint8_t* p, size_t n) {
  U16 acc[8] = {};
  const size_t len = n / STREAMS / 512 * 512;
  for (size_t i = 0; i < len; i += 512 / STREAMS)
    for (int s = 0; s < STREAMS; ++s)
      for (int j = 0; j < 8 / STREAMS; ++j) {
        const uint8_t* at = p + s * len + i + 64 * j;
        acc[s * (8 / STREAMS) + j] ^= load<U16>(at);
        if (AHEAD) __builtin_prefetch(at + AHEAD);
      }
  for (int j = 1; j < 8; ++j) acc[0] ^= acc[j];
  return (uint64_t)acc[0][0] ^ acc[0][7] ^ acc[0][15];
}

uint64_t read_pattern(const uint8_t* p, size_t n, int pattern) {
  switch (pattern) {
    case 0: return read_streams<1, 0>(p, n);
    case 1: return read_streams<1, 1024>(p, n);
    case 2: return read_streams<1, 4096>(p, n);
    case 3: return read_streams<4, 0>(p, n);
    case 4: return read_streams<4, 512>(p, n);
    case 5: return read_streams<8, 512>(p, n);
    case 6: return read_streams<8, 2048>(p, n);
    default: return read_streams<2, 512>(p, n);
  }
}

// 12 chains of 64 byte products an iteration, 4 where two registers make a chain. The empty statement hides the values from
// the compiler, which would otherwise notice that the chains are equal, and that each adds the same product.
uint64_t ops_int8(size_t iterations) {
  I16 a0 = {}, a1 = {}, a2 = {}, a3 = {}, a4 = {}, a5 = {}, a6 = {}, a7 = {}, a8 = {}, a9 = {}, a10 = {}, a11 = {};
  B64 w = splat_b(3);
  I16 a = splat_i(0x02010201);
#if defined(__AVX512F__)
#define LB_STEP(x) x = dot4<true>(x, w, a); __asm__("" : "+v"(x))
#elif defined(LB_HALVES)
#define LB_STEP(x) x = dot4<true>(x, w, a); __asm__("" : "+x"(x.low), "+x"(x.high), "+x"(w.low), "+x"(w.high))
#else
#define LB_STEP(x) x = dot4<true>(x, w, a); __asm__("" : "+m"(x))
#endif
  for (size_t i = 0; i < iterations; ++i) {
    LB_STEP(a0); LB_STEP(a1); LB_STEP(a2); LB_STEP(a3);
#if defined(LB_HALVES)
    LB_STEP(a0); LB_STEP(a1); LB_STEP(a2); LB_STEP(a3); LB_STEP(a0); LB_STEP(a1); LB_STEP(a2); LB_STEP(a3);
#else
    LB_STEP(a4); LB_STEP(a5); LB_STEP(a6); LB_STEP(a7); LB_STEP(a8); LB_STEP(a9); LB_STEP(a10); LB_STEP(a11);
#endif
  }
#undef LB_STEP
  return (uint64_t)reduce_add_i(a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
