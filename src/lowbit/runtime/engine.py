"""load: a model directory to an engine. `runtime` says what computes.

- auto: lowbit's own decoder where it can run the model (runtime/native.py), else transformers' model class with
  lowbit's linears (runtime/general.py), activations in bfloat16 where the CPU has it
- transformers: the second of these in any case
- bfloat16: transformers' model class, weights dequantized to bfloat16
- float32: the same in float32, weights dequantized exactly: the reference that differences are measured against
"""

from pathlib import Path
from typing import Literal

import torch

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.load import compute_dtype, open_source, skeleton
from lowbit.runtime.base import Engine
from lowbit.runtime.general import GeneralEngine
from lowbit.runtime.native import NativeEngine, why_not

Runtime = Literal["auto", "transformers", "bfloat16", "float32"]
RUNTIMES = ("auto", "transformers", "bfloat16", "float32")


@torch.no_grad()
def load(model: str | Path | Checkpoint, runtime: Runtime = "auto") -> Engine:
    """Load a model directory, hub id, lowbit output or 'demo'. Raises InputError for everything wrong with it."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    net = skeleton(checkpoint)
    if not net.can_generate():
        raise InputError(
            f"{checkpoint.path}: {type(net).__name__} does not predict the next token: there is nothing to generate, "
            "and perplexity and speed per token mean nothing. lowbit quantizes, inspects and verifies such models; "
            "transformers runs them."
        )
    source = open_source(net, checkpoint)
    if runtime == "auto" and why_not(net.config, source.schemes, rotated=source.rotated) is None:
        return NativeEngine(net.config, source)
    kernels = runtime in ("auto", "transformers")
    dtype = compute_dtype() if kernels else getattr(torch, runtime)
    return GeneralEngine(net, source, dtype, kernels=kernels)
