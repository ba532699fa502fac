"""Lookup-table weights: W[n, k] = table[n, code] * scale, 16 entries a row (any4) or one table for all rows (nf4).

Any4 (Elhoushi and Johnson, 2025) learns 16 values for each row of a weight; NF4 (Dettmers et al., QLoRA, 2023, section
3) fixes them for all rows. Both keep the 4-bit storage of `layout.py`; only the step from code to value differs, so
the products are those of `w4a16.py` with this step in place of the arithmetic one.

The table of a tile's rows stays in registers, and `tl.gather` along its 16 entries turns a tile of codes into values
without touching memory (on the GPU: shuffles within a warp). Entries are rounded to the activations' type before they
are multiplied, in every product, so that one row and a hundred give the same weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def table_value(words, entries, SLICE: tl.constexpr):
    """words int32 (BN, 32), entries (BN, 16) -> the values of slice SLICE, (BN, 32) of the entries' type."""
    return tl.gather(entries, (words >> (SLICE * 4)) & 15, axis=1)
