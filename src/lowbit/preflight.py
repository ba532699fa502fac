"""Everything that can be refused is refused here, from file headers alone, before any heavy work."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import code_bits
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.walk import Blocks, linears, other_products, routers
from lowbit.numerics import scale_shape
from lowbit.recipe import Recipe, matches
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """What will happen to each linear (by full name; a repair may change it), and about how many bytes it takes."""

    schemes: dict[str, Scheme]
    output_bytes: int

    def quantized(self, block: str) -> dict[str, Scheme]:
        """The linears of one block that will be quantized, by their names within the block."""
        inside = {n.removeprefix(block + "."): s for n, s in self.schemes.items() if n.startswith(block + ".")}
        return {n: s for n, s in inside.items() if s.weight is not None}


def make_plan(model: PreTrainedModel, blocks: Blocks, checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Raises InputError for an unknown method or setting, a scheme that a layer's shape cannot take, a pattern that
    matches nothing, a model that is quantized already."""
    composition = parse_method(recipe.method)
    settings_of(composition, dict(recipe.set))
    method = METHODS[composition.rounding]
    if checkpoint.gguf is not None:
        raise InputError(
            f"{checkpoint.name}: lowbit quantizes Hugging Face directories, not GGUF files: name the model that it was "
            "made from."
        )
    if recipe.kv is not None and not model.can_generate():
        raise InputError(f"{type(model).__name__} does not generate, so it caches no keys and values: leave --kv out.")
    if recipe.products and not model._can_set_attn_implementation():
        raise InputError(
            f"scheme {recipe.scheme}: the attention of {type(model).__name__} is written out in its own class, so its "
            f"products cannot be computed in int8: use {recipe.scheme.removesuffix('-bmm')}."
        )
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.name}: already quantized ({checkpoint.quantization.get('quant_method')}). Quantizing twice "
            "adds the errors up; start from the original model."
        )
    schemes = {}
    asked = _asked_outside(model, blocks, recipe)
    everything = linears(model) | asked
    left_alone = routers(model)
    for name, module in everything.items():
        inside = name.startswith(blocks.name + ".") and name not in left_alone
        scheme = recipe.scheme_of(name) if inside or name in asked else Scheme(None)
        if scheme.weight is not None:
            rows, columns = module.weight.shape
            if scheme.weight.kind not in method.grids:
                raise InputError(_other_method(recipe.method, scheme))
            if method.own_layout and scheme.activation is not None:
                raise InputError(
                    f"method {recipe.method!r} stores weights in a rotated basis, which is not the one whose "
                    f"inputs are rounded in scheme {scheme}: no kernel multiplies the two. Use --method "
                    f"smoothquant+gptq, or a scheme that leaves activations alone (w{scheme.weight.bits}a16)."
                )
            try:
                scale_shape(scheme.weight, (rows, columns))
            except InputError as error:
                raise InputError(
                    f"scheme {scheme} does not fit {name} ({rows} x {columns}): {error}, "
                    f"or leave the layer alone with --ignore '{name.split('.')[-1]}'."
                ) from error
        schemes[name] = scheme
    for pattern in (*recipe.ignore, *(p for p, _ in recipe.override)):
        hits = [n for n in everything if matches(pattern, n)]
        if not hits:
            raise InputError(f"pattern {pattern!r} matches no linear layer. There are {', '.join(_kinds(everything))}.")
    if recipe.kv is None and all(s.weight is None for s in schemes.values()):
        raise InputError("nothing is left to quantize: every linear is ignored or has the scheme 'none'.")
    schemes |= dict.fromkeys(sorted(other_products(model)), Scheme(None))
    return Plan(schemes, _output_bytes(everything, schemes, checkpoint))


def _asked_outside(model: PreTrainedModel, blocks: Blocks, recipe: Recipe) -> dict[str, nn.Linear | nn.Embedding]:
    """The head and the embeddings that an override names in full (a wildcard does not reach them).

    Raises InputError if one is tied to another or the scheme rounds activations.
    """
    asked = {}
    tied = model.all_tied_weights_keys
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(blocks.name + "."):
            for pattern, scheme in recipe.override:
                if name == pattern or name.endswith("." + pattern):
                    if f"{name}.weight" in {*tied.keys(), *tied.values()}:
                        raise InputError(f"override {pattern!r}: {name} shares its weight with another layer (tied).")
                    if Scheme.parse(scheme).activation is not None or Scheme.parse(scheme).weight is None:
                        raise InputError(f"override {pattern!r}: outside the blocks, weights alone: w8a16-channel, ...")
                    asked[name] = module
    return asked


def _other_method(method: str, scheme: Scheme) -> str:
    kind = scheme.weight.kind if scheme.weight is not None else None
    fitting = [name for name, m in METHODS.items() if kind in m.grids]
    reason = {"learned": "has learned tables", "e8p": "is a lattice"}.get(str(kind), "is another kind of grid")
    return f"method {method!r} does not round to scheme {scheme}, which {reason}: use --method {' or '.join(fitting)}."


def _kinds(names: Mapping[str, nn.Linear | nn.Embedding]) -> list[str]:
    return sorted({n.split(".")[-1] for n in names})


def _output_bytes(
    modules: Mapping[str, nn.Linear | nn.Embedding], schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> int:
    total = checkpoint.nbytes
    for name, scheme in schemes.items():
        if scheme.weight is not None:
            rows, columns = modules[name].weight.shape
            scales = math.prod(scale_shape(scheme.weight, (rows, columns)))
            total -= checkpoint.tensors[f"{name}.weight"].nbytes
            total += rows * columns * code_bits(scheme) // 8 + scales * 3
    return total


def check_disk(plan: Plan, output: Path, *, resume: bool, spilled: int = 0) -> None:
    """Raise InputError if the result will not fit on the disk that holds `output`, beside `spilled` bytes of
    calibration activations that are kept there while the work goes on."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    partial = output.with_name(output.name + ".partial")
    written = sum(f.stat().st_size for f in partial.glob("*.safetensors")) if resume and partial.is_dir() else 0
    needed = int((plan.output_bytes - written) * 1.02) + spilled
    if needed > free:
        activations = f" and {spilled / 1e6:.1f} MB of activations on the way" if spilled else ""
        raise InputError(
            f"{output}: the disk is too full: the result takes about {plan.output_bytes / 1e6:.1f} MB{activations}, "
            f"so {needed} bytes more are needed in {parent}, and {free} are free."
        )
