"""A network as the converters of other projects take it: a module with its weights, its inputs by name, text for some.

For models that one call answers: encoders, and classifiers of images. Their calibration is a safetensors file with
`pixel_values` (n, channels, height, width), as the model's own image processor makes them.
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.exporting.gguf import Request
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import materialize, open_source, skeleton
from lowbit.model.stream import outputs_of

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Network:
    """`module(**inputs)` gives one tensor: logits, or the last hidden states of a model without a head.

    `examples` are what it is traced with, calibrated on and compared on; the first fixes the shapes. They are images,
    or pseudo-random tokens without padding.
    """

    name: str
    module: nn.Module
    examples: list[dict[str, Tensor]]
    images: bool

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """(examples, ...) float32 of this module itself."""
        return torch.cat([self.module(**example) for example in self.examples])


class _Texts(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return outputs_of(self.net(input_ids=input_ids, attention_mask=attention_mask))


class _Images(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> Tensor:
        return outputs_of(self.net(pixel_values=pixel_values))


def sees_images(net: Any) -> bool:
    return bool(net.main_input_name == PIXELS)


def open_network(checkpoint: Checkpoint, request: Request) -> Network:
    """The model in float32. Raises InputError for one that generates, and for unusable or missing calibration."""
    net: Any = skeleton(checkpoint)
    if net.can_generate() or getattr(net.config, "is_decoder", False):
        raise InputError(
            f"{checkpoint.name}: {type(net).__name__} generates text token by token; this export is for encoders and "
            "image classifiers. Formats for it: onnx, gguf."
        )
    images, calibration = sees_images(net), request.calibration
    if images and calibration is None and request.type != "float":
        raise InputError(
            "int8 for images has one scale for each activation, found on examples: --calibration FILE.safetensors with "
            f"{PIXELS!r}; or --type float."
        )
    shape = _image_shape(checkpoint, net.config) if images else (1, 1)
    examples: list[dict[str, Tensor]] = []
    if images and calibration is not None:
        examples = _read_images(Path(calibration), shape, request.samples)
    elif calibration is not None:
        raise InputError("--calibration: texts are not needed: an encoder's activations are rounded as they come.")
    elif images:
        examples = [{PIXELS: torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))}]
    else:
        length = min(request.seq_len, checkpoint.context_length or request.seq_len)
        ids = torch.randint(0, net.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    materialize(net, "", open_source(net, checkpoint), torch.float32)
    net.tie_weights()
    module = _Images(net) if images else _Texts(net)
    return Network(checkpoint.name, module.eval(), examples, images)


def _image_shape(checkpoint: Checkpoint, config: Any) -> tuple[int, ...]:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or not isinstance(channels, int):
        raise InputError(f"{checkpoint.name}: config.json gives no image_size and num_channels.")
    return (channels, *(int(s) for s in size))


def _read_images(file: Path, shape: tuple[int, ...], samples: int) -> list[dict[str, Tensor]]:
    expected = f"a safetensors file with {PIXELS!r} of shape (n, {', '.join(map(str, shape))})"
    try:
        pixels = load_file(file).get(PIXELS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--calibration {file}: {error}. Expected {expected}.") from error
    if pixels is None or tuple(pixels.shape[1:]) != shape or not len(pixels) or not pixels.is_floating_point():
        found = "no such tensor" if pixels is None else f"{pixels.dtype} of shape {tuple(pixels.shape)}"
        raise InputError(f"--calibration {file}: {found}. Expected {expected}.")
    if not bool(torch.isfinite(pixels).all()):
        raise InputError(f"--calibration {file}: {PIXELS} has NaN or infinite values.")
    return [{PIXELS: p[None].float()} for p in pixels[:samples]]


def compare(here: Tensor, there: Tensor) -> dict[str, Any]:
    """How two computations of (..., classes) agree: the same largest entry, difference of log-probabilities."""
    here, there = (x.reshape(-1, x.shape[-1]) for x in (here, there))
    difference = float((here.log_softmax(-1) - there.log_softmax(-1)).abs().mean())
    same = float((here.argmax(-1) == there.argmax(-1)).float().mean())
    return {"positions": len(here), "top1_agreement": same, "mean_log_probability_difference": difference}


@contextlib.contextmanager
def quiet_converter() -> Iterator[None]:
    """Without the progress reports of other projects' converters, which would mix with --json -."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
