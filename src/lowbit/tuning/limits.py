"""What a user can give up and what is wanted: every limit and objective of `tune`, held against one candidate.

A measure is a row of MEASURES: where its value stands in a candidate's row, how it is written, and which way is better.
Limits on time and memory are of one sequence (prompt 128, answer 64); throughput and cost are of as many sequences at
once as the user's concurrency says. Accuracy counts with the worse of the selection and the confirmation text. Where a
task limit is not set, a candidate is ruled out if it answers worse outside the noise of the paired test (questions.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit.errors import InputError, nearest

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """None: no limit. Shares, nats, bytes, seconds, tokens a second, US dollars a million tokens; `optimize` is a key
    of MEASURES; `tasks` are names or YAML files (accuracy/task_files.py), of each at most `task_limit` samples."""

    max_ppl_increase: float = 0.01
    max_memory: int | None = None
    optimize: str = "tpot"
    max_kl: float | None = None
    max_ttft: float | None = None
    max_tpot: float | None = None
    max_task_drop: float | None = None
    min_throughput: float | None = None
    max_cost: float | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    concurrency: int = 1
    hardware: str = "this machine"

    @property
    def known_on_text(self) -> bool:
        """Whether text alone says if a candidate keeps the limits, given that those tried before are faster."""
        others = (self.max_memory, self.max_ttft, self.max_task_drop, self.min_throughput, self.max_cost)
        return not self.tasks and all(limit is None for limit in others)


@dataclass(frozen=True)
class Measure:
    """One thing that can be limited (by `option`) and optimized (the answer is then `better`)."""

    option: str
    words: str  # the verdict where the limit is not met
    better: str  # of a ratio above 1; of accuracy, which the original has most of: what the best one is
    value: Callable[[Row], float]
    write: Callable[[float], str]
    more: bool = False  # more is better
    accuracy: bool = False
    keys: tuple[str, ...] = ()  # of an accuracy on text: where it stands in the evaluation of each of the two texts


@dataclass(frozen=True)
class Check:
    """One limit against one candidate."""

    option: str
    value: float
    limit: float
    words: str  # the verdict where it is not met
    more: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.more else self.value <= self.limit

    @property
    def excess(self) -> float:
        """How many times the limit is missed by; comparable between limits of different units."""
        least, most = (self.value, self.limit) if self.more else (self.limit, self.value)
        return most / least if least > 0 else float("inf")


def checks(candidate: Row, limits: Limits) -> list[Check]:
    """Every limit that is set, with what this measured candidate has."""
    found = []
    for measure in sorted(MEASURES.values(), key=lambda m: not m.accuracy):  # a verdict names accuracy first
        limit = getattr(limits, measure.option.removeprefix("--").replace("-", "_"))
        if limit is not None:
            value = measure.value(candidate)
            where = _where(candidate, measure.keys) if measure.keys else ""
            words = f"{measure.words} {measure.write(value)}{where}, limit {measure.write(limit)}"
            found.append(Check(measure.option, value, limit, words, measure.more))
    if limits.tasks and limits.max_task_drop is None:
        value = max((d["drop"] for d in _drops(candidate) if d["outside_noise"]), default=0.0)
        words = f"too inaccurate: {_points(value)} fewer right answers, outside the noise"
        found.append(Check("--tasks", value, 0.0, words))
    return [_with_test(check, candidate) for check in found]


def _with_test(check: Check, candidate: Row) -> Check:
    """What the paired test says goes with a task's verdict."""
    if check.option not in ("--tasks", "--max-task-drop"):
        return check
    worst = max(_drops(candidate), key=lambda d: float(d["drop"]), default=None)
    return (
        check if worst is None else Check(check.option, check.value, check.limit, f"{check.words} ({worst['words']})")
    )


def check_limits(limits: Limits) -> None:
    """Raises InputError where limits make no sense whatever is measured."""
    if limits.optimize not in MEASURES:
        raise InputError(f"--optimize {limits.optimize}: {nearest(limits.optimize, MEASURES)}")
    if limits.concurrency < 1:
        raise InputError(f"--concurrency must be at least 1 sequence, got {limits.concurrency}.")
    wants_tasks = limits.optimize == "tasks" or limits.max_task_drop is not None
    if wants_tasks and not limits.tasks:
        option = "--max-task-drop" if limits.max_task_drop is not None else "--optimize tasks"
        raise InputError(f"{option}: say which tasks with --tasks FILE,... (names or YAML files).")
    for option in ("min_throughput", "max_cost", "max_kl"):
        value = getattr(limits, option)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{option.replace('_', '-')} {value:g}: expected a number from 0 up.")


def at_concurrency(candidate: Row) -> Row:
    """The bench row of as many sequences at once as was asked for."""
    row: Row = candidate.get("concurrent") or candidate["bench"]
    return row


def _on_text(candidate: Row, part: str, keys: tuple[str, ...]) -> float:
    value = candidate[part]
    for key in keys:
        value = value[key]
    return float(value)


def _worse(*keys: str) -> Callable[[Row], float]:
    return lambda c: max(_on_text(c, part, keys) for part in ("selection", "evaluate"))


def _where(candidate: Row, keys: tuple[str, ...]) -> str:
    """The table shows the confirmation text: a verdict on the other one says so."""
    worse = _on_text(candidate, "selection", keys) > _on_text(candidate, "evaluate", keys)
    return " on the selection text" if worse else ""


def _drops(candidate: Row) -> list[Row]:
    return candidate.get("task_drops") or []


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"


def _milliseconds(x: float) -> str:
    return f"{x * 1e3:.2f} ms"


MEASURES: dict[str, Measure] = {  # the name is also that of the ratio in the bench document
    "tpot": Measure(
        "--max-tpot", "too slow: per token", "faster per token", lambda c: c["bench"]["tpot_s"]["median"], _milliseconds
    ),
    "ttft": Measure(
        "--max-ttft", "too slow: first token", "faster to the first token",
        lambda c: c["bench"]["ttft_s"]["median"], lambda x: f"{x * 1e3:.1f} ms",
    ),
    "throughput": Measure(
        "--min-throughput", "too slow: throughput", "more tokens a second",
        lambda c: at_concurrency(c)["throughput_tokens_per_s"], lambda x: f"{x:.1f} tokens/s", more=True,
    ),
    "memory": Measure(
        "--max-memory", "too large: peak memory", "less peak memory",
        lambda c: c["bench"]["peak_memory_bytes"], lambda x: f"{x / 1e6:.0f} MB",
    ),
    "cost": Measure(
        "--max-cost", "too dear: a million tokens", "cheaper per token",
        lambda c: c["cost_per_million_tokens"], lambda x: f"US$ {x:.4g}",
    ),
    "perplexity": Measure(
        "--max-ppl-increase", "too inaccurate: perplexity", "the least perplexity",
        _worse("perplexity_increase"), lambda x: f"{x:+.2%}", accuracy=True, keys=("perplexity_increase",),
    ),
    "kl": Measure(
        "--max-kl", "too inaccurate: KL", "the least KL", _worse("kl", "mean"), lambda x: f"{x:.5f}",
        accuracy=True, keys=("kl", "mean"),
    ),
    "tasks": Measure(
        "--max-task-drop", "too inaccurate: right answers lost:", "the most right answers",
        lambda c: max((float(d["drop"]) for d in _drops(c)), default=float("-inf")), _points, accuracy=True,
    ),
}  # fmt: skip
