"""`import lowbit.transformers` and from_pretrained loads directories in lowbit's own layout.

The linears get the stored tensors as buffers while the files are read and become ordinary nn.Linear with dequantized
weights afterwards: that saves disk and download, not memory. What compressed-tensors can say needs none of this.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.formats import native
from lowbit.scheme import Scheme


@register_quantization_config(native.QUANT_METHOD)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json."""

    def __init__(
        self, layers: dict[str, list[str]], rotated: list[str], format_version: int = 1, **_other: Any
    ) -> None:
        self.quant_method = native.QUANT_METHOD
        self.layers, self.rotated, self.format_version = layers, rotated, format_version


@register_quantizer(native.QUANT_METHOD)
class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads; it does not quantize (that is `lowbit quantize`)."""

    requires_calibration = True  # transformers' word for "only models that are quantized already"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_words: Any) -> None:
        modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        schemes = native.read_schemes(vars(self.quantization_config), modules)
        rotated = set(self.quantization_config.rotated)
        for name, scheme in schemes.items():
            model.set_submodule(name, _Stored(modules[name], scheme, rotated=name in rotated))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_words: Any) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                model.set_submodule(name, module.dense())
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Stored(nn.Module):
    """Takes a linear's place while its tensors are read."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, rotated: bool) -> None:
        super().__init__()
        self.scheme, self.bias = scheme, linear.bias
        self.dtype = linear.weight.dtype
        shape = (linear.out_features, linear.in_features)
        for name, (size, dtype) in native.stored_shapes(scheme, shape, self.dtype, rotated=rotated).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))

    def dense(self) -> nn.Linear:
        """The linear with its weight, from what was read."""
        stored = {f".{name}": value for name, value in self.named_buffers()}
        weight = native.unpack("", stored.__getitem__, self.scheme).dequantize(self.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear
