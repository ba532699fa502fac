"""CUDA graphs: a decoding step captured once and replayed.

A step of decoding launches hundreds of short kernels, and each launch costs the CPU some microseconds, often more than
the kernel costs the GPU. A graph records the launches and submits them as one. What it records are addresses: inputs
are therefore copied into the tensors of the capture, and whatever else changes between steps (positions, lengths, page
tables) must be among them. Shapes and the CPU's decisions are frozen, so a graph belongs to one batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import InputError


class CapturedStep:
    """`step(*inputs) -> Tensor` as a CUDA graph for inputs of exactly the shapes and types of `example`.

    Calling it copies the inputs in, replays, and returns the graph's own output tensor: the next call overwrites it.
    """

    def __init__(self, step: Callable[..., Tensor], *example: Tensor, warmup: int = 3) -> None:
        if not torch.cuda.is_available():
            raise InputError("CUDA graphs need a CUDA GPU, and torch finds none here. Call the step itself instead.")
        self.inputs = tuple(t.clone() for t in example)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile kernels and fill the allocator before anything is recorded
            for _ in range(warmup):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected {len(self.inputs)} inputs, got {len(inputs)}")
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"captured for {tuple(mine.shape)} {mine.dtype}, got {tuple(given.shape)} {given.dtype}"
                )
            mine.copy_(given)
        self.graph.replay()
        return self.output
