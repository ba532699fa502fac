"""Export to LiteRT (.tflite), which phones run: float32, or int8 in one of LiteRT's two ways.

A text encoder gets int8 weights, a scale for every output, and rounds its activations as they come (dynamic); its
texts have one fixed length, shorter ones are padded. An image classifier gets int8 activations too, with one scale for
each, found on example images (static). litert-torch converts, ai-edge-quantizer rounds, and the file is run by
LiteRT's interpreter against the model that it was made from.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.artifact import disk_errors, write_bytes
from lowbit.errors import InputError, nearest
from lowbit.exporting.gguf import Request
from lowbit.exporting.network import Network, compare, open_network, quiet_converter
from lowbit.model.checkpoint import Checkpoint
from lowbit.scheme import Scheme

TYPES = ("int8", "float")
_SIGNATURE = "serving_default"


def supports(scheme: Scheme) -> str | None:
    """None if the format holds this scheme, else the reason why not."""
    return None if scheme.weight is None else "LiteRT files are made from full-precision models, int8 included"


def require_litert() -> tuple[Any, Any, Any]:
    """The packages litert_torch, ai_edge_quantizer and ai_edge_litert. Raises InputError naming the extra."""
    try:
        import ai_edge_litert.interpreter
        import ai_edge_quantizer
        import litert_torch
    except ImportError as error:
        raise InputError(
            f"--format litert needs the package {error.name}, which is not installed: pip install 'lowbit[litert]'."
        ) from error
    return litert_torch, ai_edge_quantizer, ai_edge_litert.interpreter


def export_litert(checkpoint: Checkpoint, output: Path, request: Request) -> dict[str, Any]:
    """Write `checkpoint` as the file `output`; returns the part of the `export` document that is about LiteRT.

    Raises InputError for a missing extra, a type, a model or calibration that it cannot be made of, before any work.
    """
    require_litert()
    kind = request.type or TYPES[0]
    if kind not in TYPES:
        raise InputError(f"unknown LiteRT type {kind!r}. {nearest(kind, TYPES)}")
    network = open_network(checkpoint, request)
    with disk_errors(output), quiet_converter(), tempfile.TemporaryDirectory() as folder:
        data = _convert(network, Path(folder) / "float.tflite")
        if kind == "int8":
            data = _round(network, data)
        write_bytes(output, data)
    agreement = compare(network.outputs(), run_litert(output, network.examples))
    if not np.isfinite(agreement["mean_log_probability_difference"]):
        raise InputError(f"{output}: LiteRT computes values from it that are not finite; export it as float.")
    example = network.examples[0]
    return {
        "type": kind,
        "bytes": output.stat().st_size,
        "inputs": {name: list(value.shape) for name, value in example.items()},
        "agreement": agreement,
    }


def _convert(network: Network, file: Path) -> bytes:
    litert_torch, _, _ = require_litert()
    litert_torch.convert(network.module, sample_kwargs=network.examples[0]).export(str(file))
    return file.read_bytes()


def _round(network: Network, data: bytes) -> bytes:
    _, quantizer, _ = require_litert()
    recipes = quantizer.recipe
    tool = quantizer.quantizer.Quantizer(data)
    ranges = None
    if network.images:
        tool.load_quantization_recipe(recipes.static_wi8_ai8())
        ranges = tool.calibrate({_SIGNATURE: [{n: v.numpy() for n, v in e.items()} for e in network.examples]})
    else:
        tool.load_quantization_recipe(recipes.dynamic_wi8_afp32())
    return bytes(tool.quantize(ranges).quantized_model)


def run_litert(file: Path, examples: list[dict[str, Tensor]]) -> Tensor:
    """(examples, ...) float32: what LiteRT's interpreter computes; int8 inputs and outputs are converted."""
    _, _, interpreter = require_litert()
    runner = interpreter.Interpreter(str(file), num_threads=torch.get_num_threads()).get_signature_runner(_SIGNATURE)
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    ((name, output),) = outputs.items()
    answers = []
    for example in examples:
        found = runner(**{n: _to_type(v.numpy(), inputs[n]) for n, v in example.items()})[name]
        answers.append(torch.from_numpy(_from_type(found, output)))
    return torch.cat(answers)


def _to_type(value: Any, details: Any) -> Any:
    scale, zero = details["quantization"]
    if details["dtype"] == np.int8 and scale:
        return np.clip(np.round(value / scale) + zero, -128, 127).astype(np.int8)
    return value.astype(details["dtype"])


def _from_type(value: Any, details: Any) -> Any:
    scale, zero = details["quantization"]
    if details["dtype"] == np.int8 and scale:
        return (value.astype(np.float32) - zero) * np.float32(scale)
    return value.astype(np.float32)
