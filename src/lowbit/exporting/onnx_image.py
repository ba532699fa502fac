"""An image classifier as ONNX: converted by torch.onnx, rounded by ONNX Runtime's own quantizer.

`int8` is static: each activation has one scale, found on example images (largest and smallest value), each weight one
for every output channel; QuantizeLinear and DequantizeLinear stand around every product (QDQ), which any ONNX runtime
can read and ONNX Runtime fuses into integer convolutions.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.exporting.network import PIXELS, Network, quiet_converter
from lowbit.formats.onnx import MODEL
from lowbit.runtime.onnx import session


def require_onnxscript() -> None:
    """Raises InputError naming the extra where torch.onnx cannot run."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--format onnx for images needs the package onnxscript, which is not installed: pip install 'lowbit[onnx]'."
        ) from error


def image_graph(network: Network, kind: str) -> bytes:
    """The network as an ONNX file, of any number of images at once."""
    with tempfile.TemporaryDirectory() as folder, quiet_converter():
        whole, rounded = Path(folder) / "float.onnx", Path(folder) / MODEL
        example = {PIXELS: network.examples[0][PIXELS].expand(2, -1, -1, -1).contiguous()}
        program = torch.onnx.export(
            network.module,
            kwargs=example,
            input_names=[PIXELS],
            output_names=["logits"],
            dynamic_shapes={PIXELS: {0: torch.export.Dim("batch")}},
            dynamo=True,
        )
        assert program is not None
        program.save(whole)
        if kind == "float":
            return whole.read_bytes()
        _round(network, whole, rounded)
        return rounded.read_bytes()


def _round(network: Network, whole: Path, rounded: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = whole.with_name("prepared.onnx")
    quant_pre_process(str(whole), str(prepared))
    quantize_static(
        str(prepared), str(rounded), _Examples(network), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip


class _Examples:
    """The images one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, network: Network) -> None:
        self._left: Iterator[dict[str, Any]] = iter([{n: v.numpy() for n, v in e.items()} for e in network.examples])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def run_images(path: Path, images: Tensor) -> Tensor:
    """(n, classes) by ONNX Runtime."""
    (logits,) = session(path).run(None, {PIXELS: images.numpy()})
    return torch.from_numpy(logits)
