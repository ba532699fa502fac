// From plain rows of codes to the panels and blocks of kernels.h. Runs once per tensor, at load.
#pragma once

#include "kernels.h"

namespace lowbit {

size_t packed_bytes(Kind kind, int bits, int rows, int cols);
int panels_of(Kind kind, int rows);  // bf16 lies in pairs of panels

// codes: rows x cols unsigned, < 2^bits. Rows and columns are padded with `pad` (the code of zero).
void pack_int(const uint8_t* codes, int bits, int rows, int cols, uint8_t pad, uint8_t* out);
void pack_table(const uint8_t* codes, int rows, int cols, uint8_t* out);
void pack_bf16(const uint16_t* w, int rows, int cols, uint16_t* out);
// src: rows x groups items of `size` bytes -> panels x groups x 16, rows padded with zeros.
void pack_side(const uint8_t* src, int rows, int groups, int size, uint8_t* out);
void advise_huge(void* p, size_t bytes);

}  // namespace lowbit
