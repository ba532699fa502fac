"""Times at sizes that were not measured: a roofline fitted to those that were.

A step reads every weight once, computes with it once a token, and for every token looks at all tokens before it
(Williams, Waterman and Patterson, "Roofline", 2009). With reading and computing not overlapped the time is linear in
what can be counted,

    TPOT(batch, context) = fixed + per_sequence batch                          + per_pair batch x context
    TTFT(batch, prompt)  = fixed + per_sequence batch + per_token batch prompt + per_pair batch x prompt^2 / 2

`fixed` is the overhead of a step and the reading of the weights (for one model they cannot be told apart),
`per_sequence` the same where prompts are read one after the other, `per_token` the arithmetic of the linears,
`per_pair` attention: reading the cache, or multiplying with it. The coefficients, none below 0, follow for each kind of
time from non-negative least squares on relative errors. Scenarios that took no part in the fit say how far off it is:
that error is shown wherever a prediction is.

A machine that is busy for some rounds of a measurement would make some scenarios slow and leave others: the rounds run
through all scenarios in turn, so what a round is slower than the others in all of them is divided out before.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Line:
    """seconds = fixed + sequences x per_sequence + tokens x per_token + pairs x per_pair"""

    fixed: float
    per_sequence: float
    per_token: float
    per_pair: float

    def seconds(self, sequences: float, tokens: float, pairs: float) -> float:
        return self.fixed + sequences * self.per_sequence + tokens * self.per_token + pairs * self.per_pair


@dataclass(frozen=True)
class Roofline:
    """One model's: a line for each kind of time, and the bytes that memory is computed from."""

    ttft: Line
    tpot: Line
    weight_bytes: float
    kv_bytes_per_token: float  # of one sequence
    measured: dict[str, list[int]]  # {prompt, output, batch}: [least, most] that the fit has seen
    error: dict[str, float | None]  # {ttft, tpot}: median relative error on held-out scenarios

    def predict(self, prompt: int, output: int, batch: int) -> tuple[float, float]:
        """(TTFT, TPOT) in seconds."""
        first, each = _first(prompt, batch), _each(prompt, output, batch)
        return self.ttft.seconds(*first), self.tpot.seconds(*each)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(results: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], kv_bytes_per_token: float) -> Roofline:
    """From the rows of one model in a `bench` document; at least two scenarios of different batch and prompt."""
    weight_bytes = float(results[0]["weight_bytes"])
    shapes = [
        (r["scenario"]["prompt_length"], r["scenario"]["output_length"], r["scenario"]["batch_size"]) for r in results
    ]
    ttft = _line([_first(p, b) for p, _, b in shapes], steady(results, "ttft_s"))
    tpot = _line([_each(*shape) for shape in shapes], steady(results, "tpot_s"))
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


def steady(rows: Sequence[dict[str, Any]], kind: str) -> list[float]:
    """The median of every row's runs, each divided by how slow its round was: the median over rows of how many times
    its own row's median a run took. Rows are of one grid, so their runs are of the same rounds."""
    runs = np.array([r["runs"][kind] for r in rows], dtype=float)
    slow = np.median(runs / np.median(runs, 1, keepdims=True), 0)
    return [float(v) for v in np.median(runs / slow, 1)]


def _first(prompt: int, batch: int) -> tuple[float, float, float]:
    """(sequences, tokens, pairs of tokens) of reading the prompts."""
    return batch, batch * prompt, batch * prompt**2 / 2


def _each(prompt: int, output: int, batch: int) -> tuple[float, float, float]:
    """The same of one step in the middle of the answer, a token a sequence."""
    return batch, 0, batch * (prompt + output / 2)


def _line(counts: Sequence[tuple[float, float, float]], seconds: Sequence[float]) -> Line:
    """Non-negative least squares of relative errors; columns are scaled so that none drowns in rounding."""
    y = np.array(seconds, dtype=float)
    columns = np.concatenate([np.ones((len(y), 1)), np.array(counts, dtype=float)], 1)
    scale = np.where(columns.any(0), columns.max(0), 1.0)
    return Line(*(float(v) for v in nnls(columns / scale / y[:, None], np.ones(len(y)))[0] / scale))
