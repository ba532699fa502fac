"""Making no more candidates than the answer needs: from the fastest on, until one keeps the limits.

What is wanted is the fastest candidate within the limits. Speed is known before a candidate is made (expected.py), its
accuracy is not, so this is branch and bound: candidates in the order of their expected time, each judged on a few
windows as soon as it is made. The first that keeps the limits outside the noise bounds the rest: what is not expected
to be faster than it by MARGIN, which is what expectations may be off, is not made. Expected times within MARGIN of each
other count as equal; among equals the advice (advice.py) says what comes first. What a few windows cannot decide bounds
nothing and goes on to all of them.

Nothing is left out silently: such a candidate is a row of the table with its reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowbit.console import note
from lowbit.tuning.candidates import Candidate
from lowbit.tuning.decide import LEAST_GAIN

MARGIN = 1.05

# "good": keeps the limits outside the noise, "bad": breaks one, "open": a few windows cannot say
Judge = Callable[[dict[str, Any]], str]
Make = Callable[[Candidate], dict[str, Any]]


def search(
    candidates: Sequence[Candidate], cost: Mapping[str, float], plain: float | None, make: Make, judge: Judge
) -> list[dict[str, Any]]:
    """A row for every candidate, in the order tried. `cost`: expected seconds by scheme; `plain`: the original's.

    `make` makes one (its row may hold an `error`), `judge` says whether it keeps the limits and may mark it `dropped`.
    """
    least = min(cost[c.scheme] for c in candidates)
    order = sorted(candidates, key=lambda c: round(math.log(cost[c.scheme] / least, MARGIN)))  # stable among equals
    if plain is not None and least * LEAST_GAIN >= plain:
        note("no candidate is expected to be faster than the original here; measured it is all the same")
        plain = None  # an expectation orders candidates and saves making some: it is no answer
    rows: list[dict[str, Any]] = []
    best: Candidate | None = None
    for candidate in order:
        why = _hopeless(candidate, cost, plain, best)
        if why is not None:
            rows.append(not_made(candidate, why))
            note(f"{candidate.name}: {why}")
            continue
        row = make(candidate)
        rows.append(row)
        if not row["error"] and judge(row) == "good" and best is None:
            best = candidate
    return rows


def _hopeless(c: Candidate, cost: Mapping[str, float], plain: float | None, best: Candidate | None) -> str | None:
    """Why this candidate cannot be the answer, or None."""
    if plain is not None and cost[c.scheme] * LEAST_GAIN >= plain:
        return "not made: expected to be no faster than the original here"
    if best is None:
        return None
    slower = cost[c.scheme] / cost[best.scheme]
    if slower * MARGIN < 1:
        return None
    if slower < MARGIN:
        return f"not made: expected as fast as {best.name}, which keeps the limits"
    return f"not made: {best.name} keeps the limits, and this is expected to take {slower:.2f}x its time"


def not_made(candidate: Candidate, why: str) -> dict[str, Any]:
    return {
        "name": candidate.name, "scheme": candidate.scheme, "method": candidate.method, "path": None, "error": None,
        "dropped": why,
    }  # fmt: skip
