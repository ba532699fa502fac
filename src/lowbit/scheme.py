"""Schemes: what is stored in how many bits, as small frozen values with a string form.

A scheme string reads `w<weight bits>a<activation bits>` and, after dashes, the weight's granularity and zero point:

    w4a16           4-bit symmetric integers, one scale per 128 inputs of a row; activations untouched
    w3a16-g64-asym  3 bits, groups of 64, with zero points
    w8a16-channel   one scale per output row
    w8a8            int8 weights (per channel) x int8 activations (one scale per token, found at run time)
    w4a8            4-bit weights (groups of 128) x int8 activations;  w4afp8 the same with FP8 activations
    fp8             FP8 E4M3 weights (per channel) x FP8 activations (per token)
    w8a8-static     one activation scale for the whole tensor, found by calibration; also fp8-static
    none            leave the layer alone (for overrides)
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.errors import InputError, nearest

Granularity = Literal["tensor", "channel", "group", "block", "token"]
DEFAULT_GROUP = 128


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is stored: the grid of values and which entries share a scale.

    `granularity` for a weight (out, in): `tensor` one scale; `channel` one per row; `group` one per `group_size`
    columns of a row; `block` one per `group_size` x `group_size` tile. For activations `token` is one per row of x,
    found at run time, and `tensor` one for everything, found by calibration (static).
    """

    kind: Literal["int", "float"]
    bits: int
    granularity: Granularity
    group_size: int = 0
    symmetric: bool = True

    @property
    def qmin(self) -> float:
        return -(2 ** (self.bits - 1)) if self.kind == "int" else -448.0

    @property
    def qmax(self) -> float:
        return 2 ** (self.bits - 1) - 1 if self.kind == "int" else 448.0

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

    @property
    def static(self) -> bool:
        """Whether the input's scale is found by calibration and stored."""
        return self.activation is not None and self.activation.granularity == "tensor"

    def __str__(self) -> str:
        w, a = self.weight, self.activation
        if w is None:
            return "none"
        if w.kind == "float":
            text = {"channel": "fp8", "block": "fp8-block", "tensor": "fp8-tensor"}[w.granularity]
            return text + ("-static" if self.static else "")
        text = f"w{w.bits}a{16 if a is None else 'fp8' if a.kind == 'float' else a.bits}"
        if w.granularity == "group":
            text += f"-g{w.group_size}"
        elif a is None or w.granularity != "channel" or w.bits != 8:
            text += f"-{w.granularity}"
        return text + ("" if w.symmetric else "-asym") + ("-static" if self.static else "")

    @staticmethod
    def parse(text: str) -> "Scheme":
        """The scheme that `text` names. Raises InputError with the nearest known strings."""
        if text in PRESETS:
            return PRESETS[text]
        match = _INTEGER.fullmatch(text)
        if not match:
            raise InputError(
                f"unknown scheme {text!r}. {nearest(text, [*EXAMPLES, *PRESETS])} An integer scheme is "
                "w<2-8>a16, w8a8, w4a8 or w4afp8, then optionally -g<group size>, -channel or -tensor, then -asym."
            )
        bits, activation = int(match["bits"]), match["activation"]
        default = "channel" if (bits, activation) == (8, "8") else f"g{DEFAULT_GROUP}"
        where = match["granularity"] or default
        _check_activations(text, bits, activation, where, match)
        group = int(where[1:]) if where[0] == "g" else 0
        if where[0] == "g" and group < 1:
            raise InputError(f"scheme {text!r}: a group has at least 1 column, got {group}.")
        granularity: Granularity = "group" if group else where  # type: ignore[assignment]
        weight = TensorScheme("int", bits, granularity, group, symmetric=not match["asym"])
        grid = {"16": None, "8": _TOKEN_INT8, "fp8": _TOKEN_FP8}[activation]
        return Scheme(weight, replace(grid, granularity="tensor") if grid and match["static"] else grid)


def _check_activations(text: str, bits: int, activation: str, where: str, match: re.Match[str]) -> None:
    """Raise InputError for rounded activations beside weights that no kernel multiplies them with."""
    if activation == "8" and bits == 8 and (where not in ("channel", "tensor") or match["asym"]):
        raise InputError(
            f"scheme {text!r}: int8 activations go with symmetric 8-bit weights per channel or per tensor "
            "(w8a8, w8a8-tensor), because one integer product is scaled once per row."
        )
    if (activation == "8" and bits not in (4, 8)) or (activation == "fp8" and bits != 4):
        raise InputError(
            f"scheme {text!r}: int8 activations go with 8- or 4-bit weights (w8a8, w4a8), FP8 ones with 4-bit weights "
            "(w4afp8) or FP8 weights (fp8)."
        )
    if activation != "16" and match["asym"]:
        raise InputError(f"scheme {text!r}: weights that meet rounded activations have no zero points: drop -asym.")
    if match["static"] and (bits, activation) != (8, "8"):
        raise InputError(f"scheme {text!r}: stored activation scales (-static) come with w8a8 and fp8.")


_INTEGER = re.compile(
    r"w(?P<bits>[2-8])a(?P<activation>16|8|fp8)(?:-(?P<granularity>g[0-9]{1,6}|channel|tensor))?(?P<asym>-asym)?"
    r"(?P<static>-static)?"
)
_TOKEN_INT8 = TensorScheme("int", 8, "token")
_TOKEN_FP8 = TensorScheme("float", 8, "token")

PRESETS = {
    "none": Scheme(None),
    "fp8": Scheme(TensorScheme("float", 8, "channel"), _TOKEN_FP8),
    "fp8-static": Scheme(TensorScheme("float", 8, "channel"), TensorScheme("float", 8, "tensor")),
    "fp8-tensor": Scheme(TensorScheme("float", 8, "tensor"), _TOKEN_FP8),
    "fp8-tensor-static": Scheme(TensorScheme("float", 8, "tensor"), TensorScheme("float", 8, "tensor")),
    "fp8-block": Scheme(TensorScheme("float", 8, "block", 128), _TOKEN_FP8),
}
EXAMPLES = (
    "w4a16", "w4a16-g128", "w4a16-g32-asym", "w3a16", "w2a16", "w8a16", "w8a16-channel", "w8a8", "w8a8-static", "w4a8",
    "w4afp8",
)  # fmt: skip
