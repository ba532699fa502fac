"""Export to ONNX: a directory with model.onnx, its weights beside it, the config and the tokenizer.

A lowbit result is carried over, code for code (formats/onnx.py); a full-precision model is written as it is
(`--type float`), or with every matrix, embeddings included, rounded to int8 and multiplied as int8 (`--type int8`).
Every low-bit product is read back and compared with the weight that it stands for, and the file is run by ONNX
Runtime against the model that it was made from. Classifiers of images go another way (onnx_image.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lowbit
from lowbit.artifact import Work, disk_errors, whole_or_nothing, write_bytes, write_json
from lowbit.errors import InputError, nearest
from lowbit.exporting import onnx_decoder, onnx_encoder
from lowbit.exporting.gguf import Request
from lowbit.exporting.network import PIXELS, compare, open_network, sees_images
from lowbit.exporting.onnx_graph import Graph, stored_products
from lowbit.exporting.onnx_image import image_graph, require_onnxscript, run_images
from lowbit.exporting.onnx_layers import Build
from lowbit.formats.onnx import CACHE, DATA, MODEL, UNSIGNED, NBits
from lowbit.manifest import copy_small_files
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import Source, open_source, skeleton
from lowbit.model.stream import FINGERPRINT_TOKENS, stream_logits
from lowbit.runtime.onnx import require_onnx, session

TYPES = ("int8", "float")
# Mean difference of log-probabilities beyond which a file is not what it was made from: with float activations, and
# with rounded ones, where a float's last bit decides between two codes and the difference grows from layer to layer.
_WORST = (0.01, 0.25)
_ANY = float("inf")  # rounded here: the difference is reported, not judged


@torch.no_grad()
def export_onnx(checkpoint: Checkpoint, output: Path, request: Request, *, force: bool) -> dict[str, Any]:
    """Write `checkpoint` as the directory `output`; returns the part of the `export` document that is about ONNX.

    Raises InputError for a missing extra, a type or an architecture that cannot be written, before any work.
    """
    require_onnx()
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    kind = _type(checkpoint, source, request.type)
    if sees_images(net):
        return _export_images(checkpoint, output, request, kind, force=force)
    if request.calibration is not None:
        raise InputError("--format onnx needs no calibration text: activations are rounded as they come.")
    architecture = _architecture(checkpoint, net)
    _check_embeddings(net, source)
    with _work(checkpoint, output, kind, force=force) as work:
        with disk_errors(work.path):
            with (work.path / DATA).open("wb") as data:
                build = Build(Graph(data), net, source, int8=kind == "int8")
                architecture(build)
            metadata = {"lowbit_version": lowbit.__version__, "lowbit_type": kind}
            write_bytes(work.path / MODEL, build.graph.serialize(net.config.model_type, metadata))
            _write_small_files(checkpoint, work)
        products, lost = _prove(build, work.path)
        rounded = any(s.activation is not None for s in source.schemes.values())
        agreement = _agreement(checkpoint, work.path)
        _check_agreement(output, agreement, _ANY if build.int8 else _WORST[rounded])
    return {
        "type": kind,
        "bytes": sum((output / f).stat().st_size for f in (MODEL, DATA)),
        "linears": products,
        "largest_difference": lost,
        "agreement": agreement,
    }


def _export_images(checkpoint: Checkpoint, output: Path, request: Request, kind: str, *, force: bool) -> dict[str, Any]:
    require_onnxscript()
    network = open_network(checkpoint, request)
    with _work(checkpoint, output, kind, force=force) as work:
        with disk_errors(work.path):
            write_bytes(work.path / MODEL, image_graph(network, kind))
            _write_small_files(checkpoint, work)
        images = torch.cat([e[PIXELS] for e in network.examples])
        agreement = compare(network.outputs(), run_images(work.path, images))
        _check_agreement(output, agreement, _WORST[0] if kind == "float" else _ANY)
    return {"type": kind, "bytes": (output / MODEL).stat().st_size, "agreement": agreement}


def _work(checkpoint: Checkpoint, output: Path, kind: str, *, force: bool) -> AbstractContextManager[Work]:
    return whole_or_nothing(output, {"export": "onnx", "model": checkpoint.digest, "type": kind}, force=force)


def _write_small_files(checkpoint: Checkpoint, work: Work) -> None:
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    write_json(work.path / "config.json", config)
    copy_small_files(checkpoint, work.path)
    processor = checkpoint.path / "preprocessor_config.json"
    if processor.is_file():
        write_bytes(work.path / processor.name, processor.read_bytes())


def _architecture(checkpoint: Checkpoint, net: PreTrainedModel) -> Callable[[Build], None]:
    """What writes this model's graph. Raises InputError if nothing does."""
    kind, where = net.config.model_type, checkpoint.name
    if kind in onnx_decoder.FAMILIES and net.can_generate():
        onnx_decoder.check_decoder(where, net.config)
        return onnx_decoder.decoder
    if kind in onnx_encoder.FAMILIES:
        onnx_encoder.check_encoder(where, net)
        return onnx_encoder.encoder
    raise InputError(
        f"{where}: {type(net).__name__} ({kind}) cannot be written as ONNX: lowbit writes decoders "
        f"({', '.join(onnx_decoder.FAMILIES)}) and encoders ({', '.join(onnx_encoder.FAMILIES)})."
    )


def _check_embeddings(net: PreTrainedModel, source: Source) -> None:
    for name, scheme in source.schemes.items():
        weight = scheme.weight
        if isinstance(net.get_submodule(name), nn.Embedding) and weight and weight.granularity == "tensor":
            raise InputError(f"{name} is {scheme}: an embedding table with one scale cannot be written as ONNX.")


def _type(checkpoint: Checkpoint, source: Source, wanted: str | None) -> str:
    if wanted is not None and wanted not in TYPES:
        raise InputError(f"unknown ONNX type {wanted!r}. {nearest(wanted, TYPES)}")
    if not source.schemes:
        return wanted or "int8"
    if wanted is not None:
        raise InputError(
            f"{checkpoint.name}: already quantized. Leave --type away to carry it over as it is, or export the "
            "original model."
        )
    return "carried over"


def _prove(build: Build, path: Path) -> tuple[int, float]:
    """Number of low-bit products in the file, and the largest difference of a weight there from the one kept here."""
    count, largest = 0, 0.0
    for name, kind, tensors, words in stored_products(path):
        quantized = build.quantized(build.stored(name))
        assert quantized is not None, name
        if kind == "MatMulNBits":
            packed = NBits(
                tensors["codes"], tensors["scales"], tensors.get("zeros"), words["bits"], words["block_size"]
            )
            found = packed.dequantize(words["K"])
        elif "codes" in tensors:
            found = (tensors["codes"].T.float() - UNSIGNED) * tensors["scales"][:, None]
        else:
            continue  # the codes are those of a lookup
        count += 1
        largest = max(largest, float((found - quantized.dequantize()).abs().max()))
    if largest > 0:
        raise AssertionError(f"{path}: a weight reads back different by {largest}")
    return count, largest


def _agreement(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """ONNX Runtime's outputs against lowbit's, teacher-forced on pseudo-random tokens: of a model without a head, of
    its hidden states."""
    vocabulary = int(checkpoint.text_config["vocab_size"])
    length = min(FINGERPRINT_TOKENS, (checkpoint.context_length or FINGERPRINT_TOKENS) // 2)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (1, length)))
    return compare(stream_logits(checkpoint, tokens), torch.from_numpy(run_onnx(path, tokens)[0]))


def _check_agreement(output: Path, agreement: dict[str, Any], worst: float) -> None:
    difference = agreement["mean_log_probability_difference"]
    if not (np.isfinite(difference) and difference <= worst):
        raise InputError(
            f"{output}: not made: ONNX Runtime computes something else from the file than lowbit from the model (mean "
            f"difference of log-probabilities {difference:.3g}). Please report it with the model's config.json."
        )


def run_onnx(path: Path, tokens: Tensor) -> list[Any]:
    """All outputs for whole texts (batch, tokens), without padding and with an empty cache."""
    run = session(path)
    feeds: dict[str, Any] = {}
    for wanted in run.get_inputs():
        if wanted.name.startswith(CACHE):
            feeds[wanted.name] = np.zeros((len(tokens), wanted.shape[1], 0, wanted.shape[3]), np.float32)
    ids = tokens.numpy().astype(np.int64)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    words = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.ascontiguousarray(positions),
             "token_type_ids": np.zeros_like(ids)}  # fmt: skip
    feeds |= {w.name: words[w.name] for w in run.get_inputs() if w.name in words}
    outputs: list[Any] = run.run(None, feeds)
    return outputs
