"""load: a model directory to an engine. `runtime` says what computes.

- auto: lowbit's own decoder where it can run the model (runtime/native.py), else transformers' model class with
  lowbit's linears (runtime/general.py), activations in bfloat16 where the CPU has it
- transformers: the second of these in any case
- bfloat16: transformers' model class, weights dequantized to bfloat16
- float32: the same in float32, weights dequantized exactly: the reference that differences are measured against
- llama.cpp, vllm: other projects' servers, started for this and ended by `stop` (runtime/outside.py)

Every engine has the same interface, whatever computes: `load` starts it, `address` is where it listens (None: in this
process), `generate` answers, `stop` ends it.
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
from lowbit.runtime.outside import OUTSIDE
from lowbit.runtime.server import Serving

Runtime = Literal["auto", "transformers", "bfloat16", "float32", "llama.cpp", "vllm"]


@torch.no_grad()
def load(model: str | Path | Checkpoint, runtime: Runtime = "auto", serving: Serving | None = None) -> Engine:
    """Load a model directory, GGUF file, hub id, lowbit output or 'demo'; `serving` is for engines that are servers.

    Raises InputError for everything wrong with it, and for an engine that is not installed.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if runtime in OUTSIDE:
        return OUTSIDE[runtime](checkpoint, serving or Serving())
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
