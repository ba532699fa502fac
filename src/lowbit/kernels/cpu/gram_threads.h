// XᵀX of any number of bf16 rows on several threads: gram.h's panels, dealt out as they come.
//
// Who makes a panel does not change what it is, and totals are added up in the panels' order: the same bits for every
// number of threads. Threads are begun anew for each call (some 20 microseconds), so a forked process may call it.
#pragma once

#include <vector>

#include "kernels.h"

namespace lowbit {

// Lower triangle of sum (width, width) += XᵀX of rows (rows, width).
void add_gram(const Kernels& k, const uint16_t* x, int rows, int width, float* sum, int threads);

// Σ over rows of x H xᵀ, for each symmetric H (width, width).
std::vector<double> quadratic_forms(const Kernels& k, const uint16_t* x, int rows, int width,
                                    const std::vector<const float*>& matrices, int threads);

}  // namespace lowbit
