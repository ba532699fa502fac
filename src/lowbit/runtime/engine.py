"""load: a model directory to an engine. `runtime` says what computes.

- auto: lowbit's own decoder where it can run the model (runtime/native.py), else transformers' model class with
  lowbit's linears (runtime/general.py), activations in bfloat16 where the CPU has it
- transformers: the second of these in any case
- bfloat16: transformers' model class, weights dequantized to bfloat16
- float32: the same in float32, weights dequantized exactly: the reference that differences are measured against
- onnx: ONNX Runtime, in this process, on an ONNX directory (runtime/onnx.py)
- llama.cpp, vllm: other projects' servers, started for this and ended by `stop` (runtime/outside.py)

Every engine has the same interface, whatever computes: `load` starts it, `address` is where it listens (None: in this
process), `generate` answers, `stop` ends it.
"""

from pathlib import Path
from typing import Literal

import torch

from lowbit.environment import compute_dtype
from lowbit.errors import InputError
from lowbit.formats.kv_cache import PRODUCTS_WORD, KvCache
from lowbit.kv_scheme import KvScheme
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.load import open_source, skeleton, stored_kv_cache
from lowbit.runtime.base import Engine
from lowbit.runtime.general import GeneralEngine
from lowbit.runtime.int8_products import use_int8_products
from lowbit.runtime.native import NativeEngine, why_not
from lowbit.runtime.onnx import OnnxEngine, open_onnx
from lowbit.runtime.outside import OUTSIDE
from lowbit.runtime.server import Serving

Runtime = Literal["auto", "transformers", "bfloat16", "float32", "onnx", "llama.cpp", "vllm"]


@torch.no_grad()
def load(
    model: str | Path | Checkpoint,
    runtime: Runtime = "auto",
    serving: Serving | None = None,
    *,
    kv: str | None = None,
) -> Engine:
    """Load a model directory, GGUF file, ONNX directory, hub id, lowbit output or 'demo'; `serving` is for engines
    that are servers.

    `kv` is how keys and values are cached: as the directory says (None), in 16 bits ("none"), or a word of
    kv_scheme.py; "int8" and "int4" need nothing stored. Raises InputError for everything wrong with the model, and for
    an engine that is not installed.
    """
    checkpoint = open_model(model, runtime)
    if kv is not None and (runtime == "onnx" or runtime in OUTSIDE):
        raise InputError(f"--kv is for lowbit's own engines; {runtime} caches keys and values its own way.")
    if runtime == "onnx":
        return OnnxEngine(checkpoint)
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
    cache = choose_kv_cache(None if kv == "none" else stored_kv_cache(net, source), kv, str(checkpoint.path))
    products = PRODUCTS_WORD in checkpoint.config
    if products:
        use_int8_products(net)
    if runtime == "auto" and not products and why_not(net.config, source.schemes, rotated=source.rotated) is None:
        return NativeEngine(net.config, source, cache)
    kernels = runtime in ("auto", "transformers")
    dtype = compute_dtype() if kernels else getattr(torch, runtime)
    engine = GeneralEngine(net, source, dtype, kernels=kernels, kv=cache)
    engine.runtime += ", int8 attention products" if products else ""
    return engine


def open_model(model: str | Path | Checkpoint, runtime: Runtime = "auto") -> Checkpoint:
    """What `runtime` reads, from headers alone. Raises InputError for what it cannot."""
    if runtime == "onnx":
        return open_onnx(model.path if isinstance(model, Checkpoint) else model)
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def choose_kv_cache(stored: KvCache | None, asked: str | None, path: str) -> KvCache | None:
    """The cache that was asked for, with the directory's scales where they fit, or found at run time. Raises
    InputError for one that needs scales which are not there."""
    if asked is None or asked == "none":
        return stored
    scheme = KvScheme.parse(asked)
    plain = scheme.static and asked == scheme.family  # "int8" is whatever int8 scales are stored
    if stored is not None and (stored.scheme == scheme or (plain and stored.scheme.family == asked)):
        return stored
    if asked == "int8":
        scheme = KvScheme.parse("int8-token")
    if scheme.static:
        raise InputError(
            f"--kv {asked} needs scales found by calibration, and {path} has none of that kind: quantize with "
            f"--kv {asked}, or use int8 or int4, whose scales are found at run time."
        )
    return KvCache(scheme)
