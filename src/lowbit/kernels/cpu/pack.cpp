// See pack.h; the layouts are drawn in kernels.h and lut.h.
#include "pack.h"

#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "pool.h"

namespace lowbit {

int panels_of(Kind kind, int rows) {
  const int p = (rows + kPanel - 1) / kPanel;
  return kind == Kind::kBf16 ? (p + 1) / 2 * 2 : p;
}

size_t packed_bytes(Kind kind, int bits, int rows, int cols) {
  const size_t blocks = (cols + kBlock - 1) / kBlock;
  const size_t block = kind == Kind::kBf16 ? kPanel * kBlock * 2 : 64 * (size_t)bits;
  return panels_of(kind, rows) * blocks * block;
}

template <class F>
static void each_panel(int panels, F f) {
  const auto team = Pool::shared();
  Pool& pool = *team;
  pool.run([&](int thread) {
    for (;;) {
      auto r = pool.next(thread, panels, 8);
      if (r.begin >= r.end) return;
      for (int p = r.begin; p < r.end; ++p) f(p);
    }
  });
}

void pack_int(const uint8_t* codes, int bits, int rows, int cols, uint8_t pad, uint8_t* out) {
  const int blocks = (cols + kBlock - 1) / kBlock, bytes = 64 * bits;
  each_panel(panels_of(Kind::kInt, rows), [&](int p) {
    for (int b = 0; b < blocks; ++b) {
      uint8_t x[8][64], *o = out + ((size_t)p * blocks + b) * bytes;
      for (int r = 0; r < kPanel; ++r)
        for (int k = 0; k < kBlock; ++k) {
          const int row = p * kPanel + r, col = b * kBlock + k;
          x[k / 4][r * 4 + k % 4] = row < rows && col < cols ? codes[(size_t)row * cols + col] : pad;
        }
      std::memset(o, 0, bytes);
      for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 8; ++j) {
          const uint8_t c = x[j][i];
          if (bits == 8) {
            o[64 * j + i] = c;
          } else if (bits == 4) {
            o[64 * (j / 2) + i] |= (uint8_t)((c & 15) << (4 * (j % 2)));
          } else if (bits == 2) {
            o[64 * (j / 4) + i] |= (uint8_t)((c & 3) << (2 * (j % 4)));
          } else if (j < 6) {
            o[64 * (j / 2) + i] |= (uint8_t)((c & 7) << (3 * (j % 2)));
          } else {  // no room for a third whole code in a byte: two bits there, one in the third vector
            o[64 * (j - 6) + i] |= (uint8_t)(((c >> 1) & 3) << 6);
            o[128 + i] |= (uint8_t)((c & 1) << j);
          }
        }
    }
  });
}

void pack_table(const uint8_t* codes, int rows, int cols, uint8_t* out) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  each_panel(panels_of(Kind::kTable, rows), [&](int p) {
    for (int b = 0; b < blocks; ++b) {
      uint8_t* o = out + ((size_t)p * blocks + b) * 256;
      std::memset(o, 0, 256);
      for (int r = 0; r < kPanel; ++r)
        for (int k = 0; k < kBlock; ++k) {
          const int row = p * kPanel + r, col = b * kBlock + k;
          if (row >= rows || col >= cols) continue;
          o[(r / 4) * 64 + (r % 4) * 16 + k % 16] |= (uint8_t)((codes[(size_t)row * cols + col] & 15) << (k < 16 ? 0 : 4));
        }
    }
  });
}

void pack_bf16(const uint16_t* w, int rows, int cols, uint16_t* out) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  each_panel(panels_of(Kind::kBf16, rows) / 2, [&](int pair) {
    uint16_t* o = out + (size_t)pair * blocks * 2 * kPanel * kBlock;
    for (int c = 0; c < blocks * kBlock; c += 2)
      for (int r = 0; r < 2 * kPanel; ++r)
        for (int i = 0; i < 2; ++i, ++o) {
          const int row = pair * 2 * kPanel + r;
          *o = row < rows && c + i < cols ? w[(size_t)row * cols + c + i] : 0;
        }
  });
}

void pack_side(const uint8_t* src, int rows, int groups, int size, uint8_t* out) {
  for (int p = 0; p * kPanel < rows; ++p)
    for (int g = 0; g < groups; ++g)
      for (int r = 0; r < kPanel; ++r, out += size) {
        const int row = p * kPanel + r;
        if (row < rows)
          std::memcpy(out, src + ((size_t)row * groups + g) * size, size);
        else
          std::memset(out, 0, size);
      }
}

// Streaming 600 MB through 4 KiB pages costs a fifth of the bandwidth in page walks.
void advise_huge(void* p, size_t bytes) {
#ifdef __linux__
  const uintptr_t page = 2u << 20;
  const uintptr_t a = ((uintptr_t)p + page - 1) & ~(page - 1), e = ((uintptr_t)p + bytes) & ~(page - 1);
  if (e > a) madvise((void*)a, e - a, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace lowbit
