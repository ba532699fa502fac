"""Low-bit kernels: `ops` (torch operators), `reference` (their torch twins), `pack` (layouts), `cpu/` (C++)."""
