// The same products with float activations: what int8 or bf16 activations are measured against, and the path for a
// model that cannot afford them. Several times slower; every kind of weight.
#pragma once

#include "linear.h"
#include "lut.h"

namespace lowbit {
namespace LOWBIT_ISA {

void exact_linear(const Weight& w, const Act& a, int m, int p0, int p1, float* out, size_t ldo, bool add) {
  const int depth = w.blocks * kBlock;
  for (int panel = p0; panel < p1; ++panel) {
    if (panel * kPanel >= w.rows) break;
    for (int row = 0; row < m; ++row) {
      const float* x = a.f32 + (size_t)row * a.stride;
      F16 total = {};
      if (w.kind == Kind::kBf16) {
        const uint8_t* p = w.codes + (size_t)(panel / 2) * w.blocks * (2 * kPanel * kBlock * 2) + (panel % 2) * 64;
        for (int k = 0; k < depth; k += 2, p += 128) {
          U16 u = load<U16>(p);
          total = fma(bits<F16>(u << 16), splat(x[k]), total);
          total = fma(bits<F16>(u & 0xffff0000u), splat(x[k + 1]), total);
        }
      } else {
        for (int b = 0; b < w.blocks; ++b) {
          uint8_t slab[8 * 64];
          spread_block(w, panel, b, slab);
          const size_t g = w.group >= w.cols ? 0 : b * kBlock / w.group;
          const F16 ws = load_scale(panel_scales(w, panel) + g * kPanel * scale_size(w.scale_type), w.scale_type);
          const I16 zero = w.zeros ? load_zero(panel_zeros(w, panel) + g * kPanel) : splat_i(w.zero);
          F16 part = {};
          for (int k = 0; k < kBlock; ++k) {
            I16 c = bits<I16>((load<U16>(slab + (k / 4) * 64) >> (8 * (k % 4))) & 0xffu) - zero;
            part = fma(to_float(c), splat(x[b * kBlock + k]), part);
          }
          total = fma(part, ws, total);
        }
      }
      finish(w, panel, total, out + (size_t)row * ldo + panel * kPanel, add);
    }
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
