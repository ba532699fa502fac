"""What `tune` tries: methods x schemes x group sizes, and mixed precision."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.algorithms.compose import parse_method
from lowbit.errors import InputError
from lowbit.scheme import Scheme
from lowbit.tuning.mixed import AUTO, Budget

SMALL = (("rtn", "w8a8"), ("gptq", "w8a8"), ("rtn", "w4a16"), ("gptq", "w4a16"))  # the demo: minutes on two cores
SCHEMES = ("w8a8", "w4a16", "w4a16-g32", "w3a16-g32")  # where the user says methods only
MIXED = (4.25, 3.5)  # bits per weight
FULL = (  # for a model of the user's: each scheme by the methods that were made for it, the best first
    ("gptq", "w4a16"), ("awq+gptq", "w4a16"), ("hadamard+gptq", "w4a16"), ("gptq", "w4a16-g32"), ("gptq", "any4"),
    ("gptq", "w8a8"), ("smoothquant+gptq", "w8a8"), ("hadamard+gptq", "w4a8"), ("gptq", "w3a16-g32"), ("quip", "e8p3"),
    *(("gptq", f"{AUTO}{bits:g}") for bits in MIXED),
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    method: str
    scheme: str

    @property
    def name(self) -> str:
        """'w4a16-gptq', 'mixed-3.5-gptq': also the directory's name."""
        scheme = self.scheme.replace(AUTO, "mixed-", 1).replace(":", "-").replace(",", "-")
        return f"{scheme}-{self.method.replace('+', '-')}"


def make_candidates(
    methods: Sequence[str] = (),
    schemes: Sequence[str] = (),
    group_sizes: Sequence[int] = (),
    mixed: Sequence[float] = (),
    *,
    small: bool = False,
) -> tuple[Candidate, ...]:
    """The product of what is given; what is not given has its default. Nothing given: SMALL if `small`, else FULL.

    A lattice goes with QuIP, all else with GPTQ where no method is said. Group sizes multiply the weight-only integer
    schemes that say none themselves.

    Raises InputError for an unknown method, scheme or size, before anything is computed.
    """
    if not (methods or schemes or group_sizes or mixed):
        return tuple(Candidate(m, s) for m, s in (SMALL if small else FULL))
    if group_sizes and not schemes:
        schemes = ("w4a16",)
    if any(size < 1 for size in group_sizes):
        raise InputError(f"--group-sizes: a group has at least 1 column, got {min(group_sizes)}.")
    words = [w for s in schemes for w in _with_groups(s, group_sizes)]
    words += [f"{AUTO}{bits:g}" for bits in mixed]
    for word in words:
        Budget.parse(word) if word.startswith(AUTO) else Scheme.parse(word)
    for method in methods:
        parse_method(method)
    if not words:
        words = list(SCHEMES)
    return tuple(dict.fromkeys(Candidate(m, w) for w in words for m in methods or (_method(w),)))


def _method(scheme: str) -> str:
    weight = None if scheme.startswith(AUTO) else Scheme.parse(scheme).weight
    return "quip" if weight is not None and weight.kind == "e8p" else "gptq"


def _with_groups(scheme: str, group_sizes: Sequence[int]) -> list[str]:
    if scheme.startswith(AUTO):
        return [scheme]
    parsed = Scheme.parse(scheme)
    plain = parsed.weight is not None and parsed.weight.granularity == "group" and "-g" not in scheme
    if not group_sizes or not plain:
        return [scheme]
    base, dash, rest = scheme.partition("-")
    return [f"{base}-g{size}{dash}{rest}" for size in group_sizes]
