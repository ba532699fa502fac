"""export: a model in another project's format. The scheme is checked against the format before any work.

Adding a format: a file in formats/ with `supports`, `pack`, `unpack` and its config; one line here and in
exporting/directory.py; one in formats/readers.py, so that such directories can be evaluated; a row in docs/formats.md.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.errors import InputError, nearest
from lowbit.exporting import litert
from lowbit.exporting.directory import export_directory
from lowbit.exporting.gguf import Request, export_gguf
from lowbit.exporting.litert import export_litert
from lowbit.exporting.onnx import export_onnx
from lowbit.formats import awq, gguf_grids, gptq, modelopt
from lowbit.formats import onnx as onnx_format
from lowbit.formats.kv_cache import PRODUCTS_WORD, scheme_of
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.runtime.int8_products import WHY_HERE_ONLY
from lowbit.scheme import Scheme

__all__ = ["FORMATS", "Request", "export"]

# format -> why it cannot hold a scheme, or None
FORMATS: dict[str, Callable[[Scheme], str | None]] = {
    "gguf": gguf_grids.supports,
    "gptq": gptq.supports,
    "awq": awq.supports,
    "modelopt": modelopt.supports,
    "onnx": onnx_format.supports,
    "litert": litert.supports,
}
# what a refusal says of the directory as it is, by its quant_method
_LAYOUTS = {
    "compressed-tensors": "compressed-tensors, which vLLM and transformers load",
    "lowbit": "lowbit's own layout, which transformers and vLLM load where lowbit is installed beside them",
}
FULL_PRECISION = ("gguf", "onnx", "litert")  # formats that a model is also quantized to here


def export(
    model: str | Path,
    output: str | Path,
    format: str,
    request: Request | None = None,
    *,
    force: bool = False,
    **words: Any,
) -> dict[str, Any]:
    """Write `model` to `output` in a format of FORMATS; returns the `export` document.

    `gguf`, `onnx` and `litert` also quantize full-precision models, as `request` (or its words) says; the other
    formats carry over what `lowbit quantize` made. Raises InputError for a scheme the format cannot hold, naming those
    that can.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}. {nearest(format, FORMATS)}")
    request = replace(request or Request(), **words)
    target = Path(output)
    checkpoint = open_checkpoint(model)
    if checkpoint.gguf is not None and format == "gguf" and not checkpoint.gguf.plain:
        raise InputError(
            f"{checkpoint.name}: is a quantized GGUF file already; export the model that it was made from."
        )
    _check_attention(checkpoint, format)
    _check_scheme(checkpoint, format)
    head = {"model": checkpoint.name, "output": str(target), "format": format}
    if format == "gguf":
        _check_file(target, force=force)
        return head | export_gguf(checkpoint, target, request)
    if format == "onnx":
        _check_words(request, format)
        return head | export_onnx(checkpoint, target, request, force=force)
    if format == "litert":
        _check_words(request, format)
        _check_file(target, force=force)
        return head | export_litert(checkpoint, target, request)
    if request != Request():
        raise InputError(
            f"--type, --method and calibration are for --format gguf; {format} carries over what is there."
        )
    return head | export_directory(checkpoint, target, format, force=force)


def _check_scheme(checkpoint: Checkpoint, format: str) -> None:
    schemes = open_source(skeleton(checkpoint), checkpoint).schemes
    if not schemes and format not in FULL_PRECISION:
        raise InputError(
            f"{checkpoint.name}: not quantized, so there is nothing to carry over to {format}. First: lowbit quantize "
            f"{checkpoint.name} -o OUT --scheme ...; then export OUT."
        )
    for name, scheme in schemes.items():
        reason = FORMATS[format](scheme)
        if reason is not None:
            others = [f for f, supports in FORMATS.items() if supports(scheme) is None]
            instead = f"Formats that can: {', '.join(others)}" if others else "No export format can"
            layout = _LAYOUTS.get(str((checkpoint.quantization or {}).get("quant_method")))
            itself = f"; the directory itself is in {layout}" if layout else ""
            raise InputError(f"{name} is {scheme}, which {format} cannot carry: {reason}. {instead}{itself}.")


def _check_words(request: Request, format: str) -> None:
    if request.method is not None or request.override:
        raise InputError(f"--format {format} has no --method and no --override: --type int8 or float says it all.")


def _check_attention(checkpoint: Checkpoint, format: str) -> None:
    """Raise InputError for what a directory says of attention and of the cache: the formats hold weights."""
    if PRODUCTS_WORD in checkpoint.config:
        raise InputError(f"{checkpoint.name}: {WHY_HERE_ONLY}. Quantize without -bmm to export.")
    scheme = scheme_of(checkpoint.config)
    if scheme is not None:
        raise InputError(
            f"{checkpoint.name}: its key-value cache is {scheme}, and {format} holds weights alone. Quantize without "
            "--kv to export; llama.cpp and others choose their cache when they start (--cache-type-k q8_0)."
        )


def _check_file(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give the name of a file to make.")
    if path.exists() and not force:
        raise InputError(f"{path}: exists. Give another name, or replace it with --force.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the directory {path.absolute().parent} does not exist.")
