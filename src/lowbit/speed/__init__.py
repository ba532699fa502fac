"""bench: how fast a model answers, each in its own process, taking turns A B A B.

TTFT: request handed over -> first token there. TPOT: (end - first token) / (tokens - 1). End to end: all of it.
Throughput: generated tokens of all sequences / wall time. A run is one generation, or the middle one of as many as
fill a quarter of a second. Every model and scenario is run once without counting and then `repeats` times, the models
in turn, so that a machine that slows down slows all of them.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lowbit.artifact import MANIFEST, write_json
from lowbit.client import is_url
from lowbit.console import track
from lowbit.errors import InputError, LowbitError
from lowbit.intervals import CONFIDENCE, median_interval
from lowbit.runtime.engine import Runtime, open_model
from lowbit.runtime.server import Serving
from lowbit.speed.bandwidth import measure_bandwidth
from lowbit.speed.energy import NO_ENERGY
from lowbit.speed.load import Load, load_test

__all__ = ["Load", "Scenario", "bench"]

GRID_REPEATS = 5  # of two rounds, one on a busy machine bends the predictions made of them by more than 20 %
MOST_ROUNDS = 3  # times as many rounds as asked for, while waiting for a narrow interval


@dataclass(frozen=True)
class Scenario:
    """One shape of work, in tokens and sequences."""

    prompt_length: int
    output_length: int
    batch_size: int


class Worker:
    """A model in a process of its own (speed/worker.py)."""

    def __init__(self, model: str, runtime: str, serving: Serving | None = None, kv: str | None = None) -> None:
        self.model = model
        command = [sys.executable, "-m", "lowbit.speed.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.ask({"load": model, "runtime": runtime, "serving": asdict(serving or Serving()), "kv": kv})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            reason = "was killed, most likely for want of memory" if code in (-9, 137) else f"ended with status {code}"
            raise LowbitError(f"{self.model}: the process that measures it {reason}.")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = InputError if reply["exit_code"] == 2 else LowbitError
            raise kind(f"{self.model}: {reply['error']}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    prompt_lengths: Sequence[int] = (128,),
    output_lengths: Sequence[int] = (64,),
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
    precision: float | None = None,
    grid: Sequence[Scenario] = (),
    grid_repeats: int = GRID_REPEATS,
    load: Load | None = None,
    runtime: Runtime = "auto",
    program: str | None = None,
    kv: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The `bench` document of `models`, and the ratios to `against` (above 1: better than it).

    With `precision` (0.02 is 2 %), rounds go on after `repeats` until half the interval of every model's ratio (of
    its time per token, without `against`) is within it, or until MOST_ROUNDS times as many have run. `grid` are more
    scenarios, run `grid_repeats` times each, for a model of times at other sizes; their rows are the document's `grid`.

    With a `runtime` of another project (llama.cpp, vllm) its server is started for every model, from `program` or from
    PATH, and measured by its client. A model may be the URL of an OpenAI-compatible server: then `load` says how it is
    asked (speed/load.py), by default as many clients at once as the batch size.

    `kv` is how the models cache keys and values (runtime.engine.load); the one they are compared with keeps its own.
    """
    scenarios = [Scenario(p, o, b) for p in prompt_lengths for o in output_lengths for b in batch_sizes]
    for name, values, least in (
        ("prompt length", prompt_lengths, 1), ("output length", output_lengths, 2), ("batch size", batch_sizes, 1),
        ("repeats", (repeats,), 1),
    ):  # fmt: skip
        if min(values, default=0) < least:
            raise InputError(f"a {name} must be at least {least}, got {min(values, default='none')}.")
    names = [str(m) for m in ([] if against is None else [against]) + list(models)]
    names = list(dict.fromkeys(names))
    if any(map(is_url, names)):
        if not all(map(is_url, names)):
            raise InputError("servers and model directories are not measured alike: give only URLs, or only models.")
        served = [_serve(name, s, load or Load(), seed) for s in scenarios for name in names]
        return _served_document(served, None if against is None else str(against), repeats)
    for name in names:
        open_model(name, runtime)  # refuse before anything starts
    peak = measure_bandwidth()
    needed = [*scenarios, *grid]
    serving = Serving(
        max(s.prompt_length + s.output_length for s in needed), max(s.batch_size for s in needed), program
    )
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(n, runtime, serving, None if n == str(against) else kv)) for n in names]
        runs = _alternate(workers, scenarios, repeats, seed, precision)
        rough = _alternate(workers, list(grid), grid_repeats, seed)
    results = [
        _result(worker, scenario, runs[worker.model, scenario], peak) for scenario in scenarios for worker in workers
    ]
    document = {
        "peak_bandwidth_bytes_per_s": peak,
        "repeats": repeats,
        "results": results,
        "ratios": [] if against is None else _ratios(results, str(against), scenarios),
        "grid": [_result(worker, s, rough[worker.model, s], peak) for s in grid for worker in workers],
    }
    for name in names:
        if (Path(name) / MANIFEST).exists():
            mine = [r for r in results if r["model"] == name]
            ratios = [r for r in document["ratios"] if r["model"] == name]  # type: ignore[attr-defined]
            write_json(Path(name) / "bench.json", document | {"results": mine, "ratios": ratios, "grid": []})
    return document


def _serve(name: str, scenario: Scenario, load: Load, seed: int) -> dict[str, Any]:
    load = replace(load, concurrency=scenario.batch_size)
    return load_test(name, scenario.prompt_length, scenario.output_length, load, seed)


def _served_document(rows: list[dict[str, Any]], against: str | None, repeats: int) -> dict[str, Any]:
    """The document of servers: what they weigh cannot be seen from here, and they are not measured in turns."""
    ratios = []
    for row in rows:
        same = (r for r in rows if r["model"] == against and r["scenario"] == row["scenario"])
        base = next(same, None)
        if base is not None and base is not row:
            ratio: dict[str, Any] = {"model": row["model"], "against": against, "scenario": row["scenario"]}
            ratio |= {k: base[f"{k}_s"]["median"] / row[f"{k}_s"]["median"] for k in ("ttft", "tpot")}
            ratio["throughput"] = row["throughput_tokens_per_s"] / base["throughput_tokens_per_s"]
            ratios.append(ratio | {"memory": None, "intervals": None})
    return {"peak_bandwidth_bytes_per_s": None, "repeats": repeats, "results": rows, "ratios": ratios, "grid": []}


def _alternate(
    workers: list[Worker], scenarios: list[Scenario], repeats: int, seed: int, precision: float | None = None
) -> dict[tuple[str, Scenario], list[dict[str, Any]]]:
    """All runs of every model and scenario; the first round of each scenario warms up and is dropped."""
    runs: dict[tuple[str, Scenario], list[dict[str, Any]]] = {(w.model, s): [] for w in workers for s in scenarios}

    def play(scenario: Scenario, r: int) -> None:
        for worker in workers:
            reply = worker.ask(asdict(scenario) | {"seed": seed + r})
            if r > 0:
                runs[worker.model, scenario].append(reply)

    rounds = [(s, r) for r in range(repeats + 1) for s in scenarios]  # what drifts hits every scenario
    for scenario, r in track(rounds, "benchmarking", len(rounds)):
        play(scenario, r)
    if precision is not None:
        for scenario in scenarios:
            for r in range(repeats + 1, repeats * MOST_ROUNDS + 1):
                if _widest([runs[w.model, scenario] for w in workers]) <= precision:
                    break
                play(scenario, r)
    return runs


def _widest(runs: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The widest half interval of a median, relative: of each model's time per token over the first model's."""
    times = [np.array([r["tpot_s"] for r in own]) for own in runs]
    intervals = [median_interval(times[0] / own) for own in times[1:]] or [median_interval(times[0])]
    return max(i.half_width if i.confidence >= CONFIDENCE else float("inf") for i in intervals)


def _result(worker: Worker, scenario: Scenario, runs: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    tpots, ends = [r["tpot_s"] for r in runs], [r["e2e_s"] for r in runs]
    read = worker.facts["weight_bytes_per_token"] + runs[-1]["kv_bytes_per_token"]
    memory = max(r["peak_memory_bytes"] for r in runs)
    return {
        "model": worker.model,
        "runtime": worker.facts["runtime"],
        "scenario": asdict(scenario),
        "ttft_s": _summary([r["ttft_s"] for r in runs]),
        "tpot_s": _summary(tpots),
        "e2e_s": _summary(ends),
        "throughput_tokens_per_s": scenario.batch_size * scenario.output_length / float(np.median(ends)),
        "mbu": read / float(np.median(tpots)) / peak,
        "weight_bytes": worker.facts["weight_bytes"],
        "kv_bytes_per_context_token": _kv_bytes(scenario, runs[-1]),
        "peak_memory_bytes": memory,
        "memory_above_import_bytes": memory - runs[-1]["baseline_memory_bytes"],
        "energy": _energy(scenario, runs, worker.facts["no_energy"]),
        "runs": {k: [r[k] for r in runs] for k in ("ttft_s", "tpot_s", "e2e_s")},
    }


def _energy(scenario: Scenario, runs: list[dict[str, Any]], why_not: str | None) -> dict[str, Any]:
    """Joules per generated token and watts over the counted runs, by counter and in all; or why there are none."""
    if why_not is not None:
        return NO_ENERGY | {"unavailable": why_not}
    tokens = scenario.batch_size * scenario.output_length
    each = {name: float(np.median([r["energy_j"][name] for r in runs])) / tokens for name in runs[0]["energy_j"]}
    in_all = [sum(r["energy_j"].values()) for r in runs]
    return {
        "joules_per_token": float(np.median(in_all)) / tokens,
        "watts": float(np.median([j / r["seconds"] for j, r in zip(in_all, runs, strict=True)])),
        "counters": each,
        "unavailable": None,
    }


def _kv_bytes(scenario: Scenario, run: dict[str, Any]) -> float:
    """Bytes of cache that a step reads for one token of one sequence's context."""
    context = scenario.prompt_length + scenario.output_length // 2
    return float(run["kv_bytes_per_token"] / (scenario.batch_size * context))


def _summary(values: list[float]) -> dict[str, float | None]:
    """Median, p90, and p99 once there are 100 values to take it from."""
    p99 = float(np.percentile(values, 99)) if len(values) >= 100 else None
    return {"median": float(np.median(values)), "p90": float(np.percentile(values, 90)), "p99": p99}


def _ratios(results: list[dict[str, Any]], against: str, scenarios: list[Scenario]) -> list[dict[str, Any]]:
    """Medians of the pairwise ratios, run by run: what drifts hits both sides of a pair."""
    ratios = []
    for scenario in scenarios:
        rows = {r["model"]: r for r in results if r["scenario"] == asdict(scenario)}
        base = rows[against]
        for name, row in rows.items():
            if name == against:
                continue
            pairs = {k: np.array(base["runs"][k]) / np.array(row["runs"][k]) for k in ("ttft_s", "tpot_s", "e2e_s")}
            ratios.append(
                {
                    "model": name,
                    "against": against,
                    "scenario": asdict(scenario),
                    "ttft": float(np.median(pairs["ttft_s"])),
                    "tpot": float(np.median(pairs["tpot_s"])),
                    "throughput": float(np.median(pairs["e2e_s"])),
                    "memory": base["peak_memory_bytes"] / row["peak_memory_bytes"],
                    "intervals": {
                        key: median_interval(pairs[runs]).to_dict()
                        for key, runs in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("throughput", "e2e_s"))
                    },
                }
            )
    return ratios
