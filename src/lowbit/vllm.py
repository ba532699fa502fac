"""vLLM's loading of lowbit's own layout, through its plugin entry point (`vllm.general_plugins`).

Where lowbit is installed beside vLLM, `vllm serve OUT` works for tables, lattice codes and rotated weights as well. The
stored tensors of every linear are read and become its ordinary weight, in the model's dtype: that saves disk and
download, not memory. What compressed-tensors can say needs none of this, and runs on vLLM's own kernels.

vLLM puts linears of one input side by side (q, k and v; gate and up). Each part is read on its own, dequantized, and
cut to the rows or columns of this process if several share the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from lowbit.formats import native
from lowbit.scheme import Scheme

_PART_OF = {None: 0, "q": 0, "k": 1, "v": 2}  # vLLM's names of parts; others are numbers already


def register() -> None:
    """vLLM calls this in each of its processes; importing this module registered the configuration."""


@register_quantization_config(native.QUANT_METHOD)
class LowbitConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of config.json."""

    def __init__(self, words: Mapping[str, Any]) -> None:
        super().__init__()
        names = [name for layer in words["layers"].values() for name in layer]
        self.schemes = native.read_schemes(words, names)
        self.rotated = frozenset(words["rotated"])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowbitConfig":
        return cls(config)

    def get_name(self) -> str:
        return native.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # ordinary products only

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says it

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """How `layer` is loaded. Raises ValueError for quantized experts, whose layers are no linears in vLLM."""
        parent, _, last = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last])]
        if isinstance(layer, LinearBase):
            known = [self.schemes.get(part) for part in parts]
            if not any(known):
                return UnquantizedLinearMethod()
            return LowbitLinearMethod(known, [part in self.rotated for part in parts])
        inside = [name for name in self.schemes if name == prefix or name.startswith(f"{prefix}.")]
        if inside and type(layer).__name__.endswith("MoE"):
            raise ValueError(f"{inside[0]}: lowbit's own layout of experts cannot be loaded by vLLM.")
        return None


class LowbitLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear whose parts are stored under `schemes` (None: as they were), some of them `rotated`."""

    def __init__(self, schemes: list[Scheme | None], rotated: list[bool]) -> None:
        self.schemes, self.rotated = schemes, rotated

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_extra: Any,
    ) -> None:
        """Empty parameters by the stored names, whose loaders keep what is read until all of it is there."""
        layer.lowbit_parts = [{} for _ in self.schemes]
        layer.lowbit_shape = (output_partition_sizes, input_size_per_partition, params_dtype)
        wanted = {"weight": params_dtype} if None in self.schemes else {}
        for scheme, rotated in zip(self.schemes, self.rotated, strict=True):
            if scheme is not None:
                stored = native.stored_shapes(scheme, (output_size, input_size), params_dtype, rotated=rotated)
                wanted |= {name: dtype for name, (_, dtype) in stored.items()}
        for name, dtype in sorted(wanted.items()):
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _Keeper(layer.lowbit_parts, name)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """All parts dequantized, cut to this process's share, and put one below the other."""
        rows, columns, dtype = layer.lowbit_shape
        device = next(layer.parameters()).device
        whole = [_dense(stored, scheme, dtype) for stored, scheme in zip(layer.lowbit_parts, self.schemes, strict=True)]
        if len(whole) == 1:  # stored as one what vLLM counts as several
            whole = list(whole[0].split([r * whole[0].shape[0] // sum(rows) for r in rows]))
        parts = [_share(weight, share, columns) for weight, share in zip(whole, rows, strict=True)]
        for name in [n for n, p in layer.named_parameters(recurse=False) if isinstance(_loader(p), _Keeper)]:
            delattr(layer, name)
        layer.weight = nn.Parameter(torch.cat(parts).to(device), requires_grad=False)
        del layer.lowbit_parts

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class _Keeper:
    """A parameter's weight loader: keeps the stored tensor `name` of the part that it belongs to."""

    def __init__(self, parts: list[dict[str, Tensor]], name: str) -> None:
        self.parts, self.name = parts, name

    def __call__(self, _parameter: nn.Parameter, loaded: Tensor, part: str | int | None = None) -> None:
        self.parts[_PART_OF.get(part, part)][self.name] = loaded.cpu()  # type: ignore[index, arg-type]


def _loader(parameter: nn.Parameter) -> Any:
    return getattr(parameter, "weight_loader", None)


def _dense(stored: Mapping[str, Tensor], scheme: Scheme | None, dtype: torch.dtype) -> Tensor:
    if scheme is None:
        return stored["weight"].to(dtype)
    return native.unpack("", {f".{name}": value for name, value in stored.items()}.__getitem__, scheme).dequantize(
        dtype
    )


def _share(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The rows or columns (out, in) of this process; heads that are fewer than the processes are held several times."""
    rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    across, along = rank * (weight.shape[0] // rows) // world, rank * (weight.shape[1] // columns) // world
    return weight[across * rows : (across + 1) * rows, along * columns : (along + 1) * columns]
