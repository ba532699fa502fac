"""Everything that can be refused is refused here, from file headers alone, before any heavy work."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import code_bits
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.walk import Blocks, linears
from lowbit.numerics import scale_shape
from lowbit.recipe import Recipe, matches
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """What will happen to each linear (by full name), and about how many bytes the result takes."""

    schemes: Mapping[str, Scheme]
    output_bytes: int

    def quantized(self, block: str) -> dict[str, Scheme]:
        """The linears of one block that will be quantized, by their names within the block."""
        inside = {n.removeprefix(block + "."): s for n, s in self.schemes.items() if n.startswith(block + ".")}
        return {n: s for n, s in inside.items() if s.weight is not None}


def make_plan(model: nn.Module, blocks: Blocks, checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Raises InputError for an unknown method or setting, a scheme that a layer's shape cannot take, a pattern that
    matches nothing, a model that is quantized already."""
    settings_of(parse_method(recipe.method), dict(recipe.set))
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.name}: already quantized ({checkpoint.quantization.get('quant_method')}). Quantizing twice "
            "adds the errors up; start from the original model."
        )
    schemes = {}
    everything = linears(model)
    for name, module in everything.items():
        scheme = recipe.scheme_of(name) if name.startswith(blocks.name + ".") else Scheme(None)
        if scheme.weight is not None:
            try:
                scale_shape(scheme.weight, (module.out_features, module.in_features))
            except InputError as error:
                raise InputError(
                    f"scheme {scheme} does not fit {name} ({module.out_features} x {module.in_features}): {error}, "
                    f"or leave the layer alone with --ignore '{name.split('.')[-1]}'."
                ) from error
        schemes[name] = scheme
    for pattern in (*recipe.ignore, *(p for p, _ in recipe.override)):
        hits = [n for n in everything if matches(pattern, n)]
        if not hits:
            raise InputError(f"pattern {pattern!r} matches no linear layer. There are {', '.join(_kinds(everything))}.")
    outside = [n for n in everything if not n.startswith(blocks.name + ".")]
    for pattern, _ in recipe.override:
        if any(matches(pattern, n) for n in outside):
            raise InputError(f"override {pattern!r} names {outside[0]}, outside the blocks: it stays as it is for now.")
    if all(s.weight is None for s in schemes.values()):
        raise InputError("nothing is left to quantize: every linear is ignored or has the scheme 'none'.")
    return Plan(schemes, _output_bytes(everything, schemes, checkpoint))


def _kinds(names: Mapping[str, nn.Linear]) -> list[str]:
    return sorted({n.split(".")[-1] for n in names})


def _output_bytes(modules: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], checkpoint: Checkpoint) -> int:
    total = checkpoint.nbytes
    for name, scheme in schemes.items():
        if scheme.weight is not None:
            weights = modules[name].weight.numel()
            scales = 1
            for size in scale_shape(scheme.weight, (modules[name].out_features, modules[name].in_features)):
                scales *= size
            total -= checkpoint.tensors[f"{name}.weight"].nbytes
            total += weights * code_bits(scheme) // 8 + scales * 3
    return total


def check_disk(plan: Plan, output: Path, *, resume: bool) -> None:
    """Raise InputError if the result will not fit on the disk that holds `output`."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    partial = output.with_name(output.name + ".partial")
    written = sum(f.stat().st_size for f in partial.glob("*.safetensors")) if resume and partial.is_dir() else 0
    needed = plan.output_bytes - written
    if needed * 1.02 > free:
        raise InputError(
            f"{output}: the disk is too full: the result takes about {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB "
            "are free."
        )
