"""How keys and values are kept, as a small frozen value with a string form.

    fp8    E4M3, one stored scale a layer for keys and one for values; fp8-head: one for each key-value head
    int8   8-bit integers, one stored scale for each key-value head; int8-tensor: one a layer;
           int8-token: found at run time, for every token and head
    int4   4-bit integers with a zero point, found at run time for 32 channels of one token and head;
           int4-head, int4-tensor: stored scales

A stored scale is found by calibration (kv_scales.py). There is no scale of 1 by default: where none is known, the
cache finds scales at run time or is refused.
"""

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import InputError, nearest

KvGranularity = Literal["tensor", "head", "token", "group"]
GROUP = 32  # channels of a head that share a scale and a zero point in `int4`


@dataclass(frozen=True)
class KvScheme:
    """The grid of cached keys and values, and which of them share a scale."""

    kind: Literal["int", "float"]
    bits: int
    granularity: KvGranularity

    @property
    def static(self) -> bool:
        """Whether scales are found by calibration and stored."""
        return self.granularity in ("tensor", "head")

    @property
    def qmax(self) -> float:
        return 448.0 if self.kind == "float" else float(2 ** (self.bits - 1) - 1)

    @property
    def family(self) -> str:
        """The word without its granularity."""
        return f"{'fp' if self.kind == 'float' else 'int'}{self.bits}"

    def __str__(self) -> str:
        return next(word for word, scheme in KV_SCHEMES.items() if scheme == self)

    @staticmethod
    def parse(text: str) -> "KvScheme":
        """The scheme that `text` names. Raises InputError with the nearest known words."""
        if text not in KV_SCHEMES:
            raise InputError(f"unknown key-value cache {text!r}. {nearest(text, list(KV_SCHEMES))}")
        return KV_SCHEMES[text]

    def bits_per_value(self, width: int) -> float:
        """Bits that a cached value takes, with the scales that lie beside it; `width` is the head's."""
        groups = -(-width // GROUP)
        beside = {"tensor": 0, "head": 0, "token": 32 / width, "group": 32 * groups / width}
        return self.bits + beside[self.granularity]


KV_SCHEMES = {
    "fp8": KvScheme("float", 8, "tensor"),
    "fp8-head": KvScheme("float", 8, "head"),
    "int8": KvScheme("int", 8, "head"),
    "int8-tensor": KvScheme("int", 8, "tensor"),
    "int8-token": KvScheme("int", 8, "token"),
    "int4": KvScheme("int", 4, "group"),
    "int4-head": KvScheme("int", 4, "head"),
    "int4-tensor": KvScheme("int", 4, "tensor"),
}
