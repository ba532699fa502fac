"""Low-bit kernels: `ops` (torch operators and their torch twins), `pack` (weights into the kernels' layout), `cpu/` (C++)."""
