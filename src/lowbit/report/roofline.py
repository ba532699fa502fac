"""Times at sizes that were not measured: a roofline fitted to those that were.

A step over some tokens reads every weight once and computes with it once a token (Williams, Waterman and Patterson,
"Roofline", 2009). With reading and computing not overlapped the model is linear in what can be counted,

    TPOT(batch, context)  = overhead + (weight bytes + batch x KV bytes(context)) / bandwidth + batch x weights / rate
    TTFT(batch, prompt)   = overhead + weight bytes / bandwidth + batch x prompt x weights / rate

and its three coefficients (>= 0) for each kind of time follow from non-negative least squares on relative errors.
Scenarios that took no part in the fit say how far off it is: that error is shown wherever a prediction is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Line:
    """seconds = overhead + bytes x per_byte + tokens x per_token"""

    overhead: float
    per_byte: float
    per_token: float

    def seconds(self, read: float, tokens: float) -> float:
        return self.overhead + read * self.per_byte + tokens * self.per_token


@dataclass(frozen=True)
class Roofline:
    """One model's: a line for each kind of time, and the bytes they are functions of."""

    ttft: Line
    tpot: Line
    weight_bytes: float
    kv_bytes_per_token: float  # of one sequence
    measured: dict[str, list[int]]  # {prompt, output, batch}: [least, most] that the fit has seen
    error: dict[str, float | None]  # {ttft, tpot}: median relative error on held-out scenarios

    def predict(self, prompt: int, output: int, batch: int) -> tuple[float, float]:
        """(TTFT, TPOT) in seconds."""
        read = self.weight_bytes + batch * self.kv_bytes_per_token * (prompt + output / 2)
        return self.ttft.seconds(self.weight_bytes, batch * prompt), self.tpot.seconds(read, batch)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(results: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], kv_bytes_per_token: float) -> Roofline:
    """From the rows of one model in a `bench` document; at least two scenarios of different batch and prompt."""
    weight_bytes = float(results[0]["weight_bytes"])
    shapes = [
        (r["scenario"]["prompt_length"], r["scenario"]["output_length"], r["scenario"]["batch_size"]) for r in results
    ]
    tpot_read = [weight_bytes + b * kv_bytes_per_token * (p + o / 2) for p, o, b in shapes]
    ttft = _line([weight_bytes] * len(shapes), [b * p for p, _, b in shapes], [r["ttft_s"]["median"] for r in results])
    tpot = _line(tpot_read, [b for _, _, b in shapes], [r["tpot_s"]["median"] for r in results])
    seen = {k: [min(v), max(v)] for k, v in zip(("prompt", "output", "batch"), zip(*shapes, strict=True), strict=True)}
    plain = Roofline(ttft, tpot, weight_bytes, kv_bytes_per_token, seen, {"ttft": None, "tpot": None})
    errors: dict[str, list[float]] = {"ttft": [], "tpot": []}
    for r in held_out:
        s = r["scenario"]
        expected = plain.predict(s["prompt_length"], s["output_length"], s["batch_size"])
        for kind, value in zip(errors, expected, strict=True):
            errors[kind].append(abs(value / r[f"{kind}_s"]["median"] - 1))
    error = {k: float(np.median(v)) if v else None for k, v in errors.items()}
    return Roofline(ttft, tpot, weight_bytes, kv_bytes_per_token, seen, error)


def _line(read: Sequence[float], tokens: Sequence[float], seconds: Sequence[float]) -> Line:
    """Non-negative least squares of relative errors; columns are scaled so that none drowns in rounding."""
    y = np.array(seconds, dtype=float)
    columns = np.stack([np.ones(len(y)), np.array(read, dtype=float), np.array(tokens, dtype=float)], 1)
    scale = columns.max(0)
    scale[scale == 0] = 1
    found = nnls(columns / scale / y[:, None], np.ones(len(y)))[0] / scale
    # reading and overhead cannot be told apart where all scenarios read the same: then it is reading
    if np.ptp(columns[:, 1]) < 1e-9 * scale[1] and scale[1] > 0:
        found[1], found[0] = found[1] + found[0] / columns[0, 1], 0.0
    return Line(*(float(v) for v in found))
