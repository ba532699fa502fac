// Compiled once per instruction set with LOWBIT_ISA as its namespace; exports one table.
#include "kernels.h"

#include "attention.h"
#include "bandwidth.h"
#include "bf16.h"
#include "columns.h"
#include "elementwise.h"
#include "exact.h"
#include "gram.h"
#include "lattice.h"
#include "linear.h"
#include "lut.h"
#include "stream.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <int M>
void few_rows(const Weight& w, const Act& a, int row0, int p0, int p1, float* out, size_t ldo, bool add) {
  if (w.kind == Kind::kTable) return table_gemv<(M > 4 ? 4 : M)>(w, a, row0, p0, p1, out, ldo, add);
  if (kStream && M <= 2 && w.bits < 4) return stream_low<(M <= 2 ? M : 1)>(w, a, row0, p0, p1, out, ldo, add);
  switch (w.bits) {
    case 2: return gemv<2, M>(w, a, row0, p0, p1, out, ldo, add);
    case 3: return gemv<3, M>(w, a, row0, p0, p1, out, ldo, add);
    case 4: return gemv<4, M>(w, a, row0, p0, p1, out, ldo, add);
    default: return gemv<8, M>(w, a, row0, p0, p1, out, ldo, add);
  }
}

void linear(const Weight& w, const Act& a, int m, int p0, int p1, float* out, size_t ldo, bool add, uint8_t* scratch) {
  if (a.f32) return exact_linear(w, a, m, p0, p1, out, ldo, add);
  Slab& slab = *(Slab*)scratch;
  float* carry = (float*)(scratch + sizeof(Slab));
  if (w.kind == Kind::kBf16) return bf16_linear(w, a, m, p0, p1, out, ldo, add, carry);
  if (w.kind == Kind::kLattice && m <= 2 && lattice_few_rows(w, a, m, p0, p1, out, ldo, add)) return;
  if (m <= kFewRows && w.kind != Kind::kLattice) {
    const int most = w.kind == Kind::kTable && kGemvRows > 4 ? 4 : kGemvRows;
    for (int row = 0; row < m;) {
      const int left = m - row < most ? m - row : most;
      switch (left) {
        case 1: few_rows<1>(w, a, row, p0, p1, out, ldo, add); row += 1; break;
        case 2: case 3: few_rows<2>(w, a, row, p0, p1, out, ldo, add); row += 2; break;
        case 4: case 5: case 6: case 7: few_rows<4>(w, a, row, p0, p1, out, ldo, add); row += 4; break;
        default: few_rows<kGemvRows>(w, a, row, p0, p1, out, ldo, add); row += kGemvRows; break;
      }
    }
    return;
  }
  int panel = p0;
  for (; panel + kTilePanels <= p1; panel += kTilePanels)
    gemm_panels<kTilePanels>(w, a, m, panel, out, ldo, add, slab, carry);
  for (; panel < p1; ++panel) gemm_panels<1>(w, a, m, panel, out, ldo, add, slab, carry);
}

}  // namespace

extern const Kernels table;
const Kernels table = {LOWBIT_ISA_NAME, linear,  sizeof(Slab), kTileRows, pack_tile, norm_quant,        glu,      rope,          kv_store,
                       attention,       attention_scratch, hadamard, rows_to_float, argmax, softcap, gram_pack, gram_add, gram_weighted, sweep, sweep_scratch,
                       grid_errors, errors_scratch, read_pattern, ops_int8};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
