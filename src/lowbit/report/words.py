"""How figures become words: `get` walks to a value or gives None, and every formatter prints None as an en dash."""

import math
from typing import Any

NONE = "–"
Z95 = 1.96  # two-sided 95 % of a normal distribution


def get(value: Any, *keys: str) -> Any:
    """value[k0][k1]..., or None where a step is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def text(value: Any) -> str:
    return NONE if value is None or value == "" else str(value)


def digits(value: Any, least: int = 3) -> str:
    """At least three significant digits: 0.0123, 1.23, 12.3, 123, 12345."""
    x = number(value)
    if x is None:
        return NONE
    if x == 0:
        return "0"
    decimals = least - 1 - math.floor(math.log10(abs(x)))
    if decimals > 7:
        mantissa, exponent = f"{x:.{least - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{x:.{max(decimals, 0)}f}".replace("-", "−")


def percent(value: Any, sign: str = "", decimals: int = 2) -> str:
    """0.0123 -> 1.23 % (sign '+': +1.23 %), without trailing zeros."""
    x = number(value)
    if x is None:
        return NONE
    shown = f"{100 * x:{sign}.{decimals if abs(x) < 0.1 else min(decimals, 1)}f}"
    if "." in shown:
        shown = shown.rstrip("0").rstrip(".")
    return f"{'0' if shown in ('+0', '-0') else shown}\u00a0%".replace("-", "−")


def signed(value: Any) -> str:
    return percent(value, "+")


def milliseconds(seconds: Any) -> str:
    x = number(seconds)
    return NONE if x is None else f"{digits(1e3 * x)}\u00a0ms"


def size(n: Any) -> str:
    x = number(n)
    if x is None:
        return NONE
    return f"{digits(x / 1e9)}\u00a0GB" if x >= 1e9 else f"{digits(x / 1e6)}\u00a0MB"


def duration(seconds: Any) -> str:
    x = number(seconds)
    if x is None:
        return NONE
    return f"{digits(x, 2)} s" if x < 120 else f"{x / 60:.0f} min" if x < 7200 else f"{x / 3600:.1f} h"


def times(ratio: Any, more: str, less: str) -> str:
    """2.9 -> '2.90× faster'; 0.8 -> '1.25× slower'."""
    x = number(ratio)
    if x is None or x <= 0:
        return NONE
    return f"{digits(x)}× {more}" if x >= 1 else f"{digits(1 / x)}× {less}"


def between(low: Any, high: Any, write: Any) -> str | None:
    a, b = number(low), number(high)
    return None if a is None or b is None else f"{write(a)} to {write(b)}"


def interval95(mean: Any, stderr: Any, write: Any) -> str | None:
    """'0.41 % to 0.83 %', the 95 % interval of a mean."""
    m, s = number(mean), number(stderr)
    return None if m is None or s is None else between(m - Z95 * s, m + Z95 * s, write)
