"""Schemes: what is stored in how many bits, as small frozen values with a string form.

A scheme string reads `w<weight bits>a<activation bits>` and, after dashes, the weight's granularity and zero point:

    w4a16           4-bit symmetric integers, one scale per 128 inputs of a row; activations untouched
    w3a16-g64-asym  3 bits, groups of 64, with zero points
    w2a16-midrise   2 bits, values ±½ and ±3/2 times the scale: even steps around 0 with none at 0
    w8a16-channel   one scale per output row
    w8a8            int8 weights (per channel) x int8 activations (one scale per token, found at run time)
    w4a8            4-bit weights (groups of 128) x int8 activations;  w4afp8 the same with FP8 activations
    fp8             FP8 E4M3 weights (per channel) x FP8 activations (per token)
    w8a8-bmm        and the two batched products of attention in int8 too (any scheme with int8 activations)
    w8a8-static     one activation scale for the whole tensor, found by calibration; also fp8-static
    mxfp4           4-bit floats (E2M1), one power of two per 32 inputs; activations untouched
    nvfp4           4-bit floats (E2M1), one FP8 scale per 16 inputs and one float scale for the tensor
    nf4             16 quantiles of a Gaussian, one scale per 64 inputs (`nf4-g128`: of another group size)
    any4            16 values learned for every output row, one scale per 128 inputs; any3 and any2: 8 and 4 values
    e8p2            points of the E8 lattice, 8 weights a code (method quip): 2 bits; e8p3, e8p4
    none            leave the layer alone (for overrides)
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.errors import InputError, nearest

Granularity = Literal["tensor", "channel", "group", "block", "token"]
Kind = Literal["int", "midrise", "float", "nf", "learned", "e8p"]
DEFAULT_GROUP = 128


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is stored: the grid of values and which entries share a scale.

    `granularity` for a weight (out, in): `tensor` one scale; `channel` one per row; `group` one per `group_size`
    columns of a row; `block` one per `group_size` x `group_size` tile. For activations `token` is one per row of x,
    found at run time, and `tensor` one for everything, found by calibration (static).
    `kind` is the grid: `int` codes minus a zero point; `midrise` codes plus a half; `float` E4M3 at 8 bits and E2M1 at
    4; `nf` the fixed table of NF4; `learned` a table per row; `e8p` lattice points of eight weights.
    """

    kind: Kind
    bits: int
    granularity: Granularity
    group_size: int = 0
    symmetric: bool = True

    @property
    def qmin(self) -> float:
        return -(2 ** (self.bits - 1)) if self.kind == "int" else -self.qmax

    @property
    def qmax(self) -> float:
        """The largest value of the grid at scale 1."""
        match self.kind:
            case "int":
                return float(2 ** (self.bits - 1) - 1)
            case "midrise":
                return float(2**self.bits - 1) / 2
            case "float":
                return 448.0 if self.bits == 8 else 6.0
            case _:
                return 1.0

    @property
    def nested(self) -> bool:
        """Whether the scales of groups are themselves multiplied by one scale of the whole tensor (NVFP4)."""
        return self.kind == "float" and self.bits == 4 and self.group_size == 16

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) of the rectangle of entries that share one scale, in a tensor of that shape."""
        match self.granularity:
            case "tensor":
                return rows, columns
            case "channel" | "token":
                return 1, columns
            case "group":
                return 1, self.group_size
            case "block":
                return self.group_size, self.group_size


@dataclass(frozen=True)
class Scheme:
    """What a layer's weight and its input become. `weight=None` leaves the layer alone."""

    weight: TensorScheme | None
    activation: TensorScheme | None = None
    products: bool = False  # of a model's scheme: attention's Q K^T and P V in int8 as well

    @property
    def static(self) -> bool:
        """Whether the input's scale is found by calibration and stored."""
        return self.activation is not None and self.activation.granularity == "tensor"

    def __str__(self) -> str:
        if self.products:
            return f"{replace(self, products=False)}{_PRODUCTS}"
        w, a = self.weight, self.activation
        if w is None:
            return "none"
        if w.kind == "float" and w.bits == 4:
            return "nvfp4" if w.nested else "mxfp4"
        if w.kind == "e8p":
            return f"e8p{w.bits}"
        if w.kind in _TABLES:
            name, group = _TABLES[w.kind]
            return f"{name}{w.bits}" + ("" if w.group_size == group else f"-g{w.group_size}")
        if w.kind == "float":
            text = {"channel": "fp8", "block": "fp8-block", "tensor": "fp8-tensor"}[w.granularity]
            return text + ("-static" if self.static else "")
        text = f"w{w.bits}a{16 if a is None else 'fp8' if a.kind == 'float' else a.bits}"
        if w.granularity == "group":
            text += f"-g{w.group_size}"
        elif a is None or w.granularity != "channel" or w.bits != 8:
            text += f"-{w.granularity}"
        if w.kind == "midrise":
            return text + "-midrise"
        return text + ("" if w.symmetric else "-asym") + ("-static" if self.static else "")

    @staticmethod
    def parse(text: str) -> "Scheme":
        """The scheme that `text` names. Raises InputError with the nearest known strings."""
        if text in PRESETS:
            return PRESETS[text]
        if text.endswith(_PRODUCTS):
            scheme = Scheme.parse(text.removesuffix(_PRODUCTS))
            if scheme.activation is None or (scheme.activation.kind, scheme.products) != ("int", False):
                raise InputError(
                    f"scheme {text!r}: attention in int8 ({_PRODUCTS}) goes with int8 activations: w8a8-bmm."
                )
            return replace(scheme, products=True)
        if table := _TABLE.fullmatch(text):
            kind: Kind = "nf" if table["name"] == "nf" else "learned"
            size = int(table["group"] or _TABLES[kind][1])
            if size < 1:
                raise InputError(f"scheme {text!r}: a group has at least 1 column, got {size}.")
            return Scheme(TensorScheme(kind, int(table["bits"]), "group", size))
        match = _INTEGER.fullmatch(text)
        if not match:
            raise InputError(
                f"unknown scheme {text!r}. {nearest(text, [*EXAMPLES, *PRESETS])} An integer scheme is "
                "w<2-8>a16, w8a8, w4a8 or w4afp8, then optionally -g<group size>, -channel or -tensor, then -asym or "
                "-midrise."
            )
        bits, activation = int(match["bits"]), match["activation"]
        default = "channel" if (bits, activation) == (8, "8") else f"g{DEFAULT_GROUP}"
        where = match["granularity"] or default
        _check_activations(text, bits, activation, where, match)
        group = int(where[1:]) if where[0] == "g" else 0
        if where[0] == "g" and group < 1:
            raise InputError(f"scheme {text!r}: a group has at least 1 column, got {group}.")
        granularity: Granularity = "group" if group else where  # type: ignore[assignment]
        if match["end"] == "-midrise":
            if bits > 4 or activation != "16" or granularity == "tensor":
                raise InputError(f"scheme {text!r}: midrise grids have 2 to 4 bits and scales per group or channel.")
            return Scheme(TensorScheme("midrise", bits, granularity, group))
        weight = TensorScheme("int", bits, granularity, group, symmetric=not match["end"])
        grid = {"16": None, "8": _TOKEN_INT8, "fp8": _TOKEN_FP8}[activation]
        return Scheme(weight, replace(grid, granularity="tensor") if grid and match["static"] else grid)


def _check_activations(text: str, bits: int, activation: str, where: str, match: re.Match[str]) -> None:
    """Raise InputError for rounded activations beside weights that no kernel multiplies them with."""
    if activation == "8" and bits == 8 and (where not in ("channel", "tensor") or match["end"]):
        raise InputError(
            f"scheme {text!r}: int8 activations go with symmetric 8-bit weights per channel or per tensor "
            "(w8a8, w8a8-tensor), because one integer product is scaled once per row."
        )
    if (activation == "8" and bits not in (4, 8)) or (activation == "fp8" and bits != 4):
        raise InputError(
            f"scheme {text!r}: int8 activations go with 8- or 4-bit weights (w8a8, w4a8), FP8 ones with 4-bit weights "
            "(w4afp8) or FP8 weights (fp8)."
        )
    if activation != "16" and match["end"]:
        raise InputError(
            f"scheme {text!r}: weights that meet rounded activations have no zero points: drop {match['end']}."
        )
    if match["static"] and (bits, activation) != (8, "8"):
        raise InputError(f"scheme {text!r}: stored activation scales (-static) come with w8a8 and fp8.")


_PRODUCTS = "-bmm"
_INTEGER = re.compile(
    r"w(?P<bits>[2-8])a(?P<activation>16|8|fp8)(?:-(?P<granularity>g[0-9]{1,6}|channel|tensor))?(?P<end>-asym|-midrise)?"
    r"(?P<static>-static)?"
)
_TABLE = re.compile(r"(?P<name>nf(?=4)|any)(?P<bits>[234])(?:-g(?P<group>[0-9]{1,6}))?", re.ASCII)
_TABLES = {"nf": ("nf", 64), "learned": ("any", DEFAULT_GROUP)}  # kind -> name, group size if none is given
_TOKEN_INT8 = TensorScheme("int", 8, "token")
_TOKEN_FP8 = TensorScheme("float", 8, "token")

PRESETS = {
    "none": Scheme(None),
    "fp8": Scheme(TensorScheme("float", 8, "channel"), _TOKEN_FP8),
    "fp8-static": Scheme(TensorScheme("float", 8, "channel"), TensorScheme("float", 8, "tensor")),
    "fp8-tensor": Scheme(TensorScheme("float", 8, "tensor"), _TOKEN_FP8),
    "fp8-tensor-static": Scheme(TensorScheme("float", 8, "tensor"), TensorScheme("float", 8, "tensor")),
    "fp8-block": Scheme(TensorScheme("float", 8, "block", 128), _TOKEN_FP8),
    "mxfp4": Scheme(TensorScheme("float", 4, "group", 32)),
    "nvfp4": Scheme(TensorScheme("float", 4, "group", 16)),
    **{f"e8p{bits}": Scheme(TensorScheme("e8p", bits, "channel")) for bits in (2, 3, 4)},
}
EXAMPLES = (
    "w4a16", "w4a16-g128", "w4a16-g32-asym", "w3a16", "w2a16", "w8a16", "w8a16-channel", "w8a8", "w8a8-static",
    "w8a8-bmm", "w4a8", "w4afp8", "nf4", "any4",
)  # fmt: skip
