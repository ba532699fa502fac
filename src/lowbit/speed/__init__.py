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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lowbit.artifact import MANIFEST, write_json
from lowbit.console import track
from lowbit.errors import InputError, LowbitError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.speed.bandwidth import measure_bandwidth

__all__ = ["Scenario", "bench"]


@dataclass(frozen=True)
class Scenario:
    """One shape of work, in tokens and sequences."""

    prompt_length: int
    output_length: int
    batch_size: int


class Worker:
    """A model in a process of its own (speed/worker.py)."""

    def __init__(self, model: str, runtime: str) -> None:
        self.model = model
        command = [sys.executable, "-m", "lowbit.speed.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.ask({"load": model, "runtime": runtime})

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
            self._process.wait(timeout=10)
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
    runtime: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """The `bench` document of `models`, and the ratios to `against` (above 1: better than it)."""
    scenarios = [Scenario(p, o, b) for p in prompt_lengths for o in output_lengths for b in batch_sizes]
    for name, values, least in (
        ("prompt length", prompt_lengths, 1), ("output length", output_lengths, 2), ("batch size", batch_sizes, 1),
        ("repeats", (repeats,), 1),
    ):  # fmt: skip
        if min(values, default=0) < least:
            raise InputError(f"a {name} must be at least {least}, got {min(values, default='none')}.")
    names = [str(m) for m in ([] if against is None else [against]) + list(models)]
    names = list(dict.fromkeys(names))
    for name in names:
        open_checkpoint(name)  # refuse before anything starts
    peak = measure_bandwidth()
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, runtime)) for name in names]
        runs = _alternate(workers, scenarios, repeats, seed)
    results = [
        _result(worker, scenario, runs[worker.model, scenario], peak) for scenario in scenarios for worker in workers
    ]
    document = {
        "peak_bandwidth_bytes_per_s": peak,
        "repeats": repeats,
        "results": results,
        "ratios": [] if against is None else _ratios(results, str(against), scenarios),
    }
    for name in names:
        if (Path(name) / MANIFEST).exists():
            mine = [r for r in results if r["model"] == name]
            ratios = [r for r in document["ratios"] if r["model"] == name]  # type: ignore[attr-defined]
            write_json(Path(name) / "bench.json", document | {"results": mine, "ratios": ratios})
    return document


def _alternate(
    workers: list[Worker], scenarios: list[Scenario], repeats: int, seed: int
) -> dict[tuple[str, Scenario], list[dict[str, Any]]]:
    """All runs of every model and scenario; the first round of each scenario warms up and is dropped."""
    runs: dict[tuple[str, Scenario], list[dict[str, Any]]] = {(w.model, s): [] for w in workers for s in scenarios}
    rounds = [(s, r) for s in scenarios for r in range(repeats + 1)]
    for scenario, r in track(rounds, "benchmarking", len(rounds)):
        for worker in workers:
            reply = worker.ask(asdict(scenario) | {"seed": seed + r})
            if r > 0:
                runs[worker.model, scenario].append(reply)
    return runs


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
        "peak_memory_bytes": memory,
        "memory_above_import_bytes": memory - runs[-1]["baseline_memory_bytes"],
        "runs": {k: [r[k] for r in runs] for k in ("ttft_s", "tpot_s", "e2e_s")},
    }


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
                    "tpot_range": [float(pairs["tpot_s"].min()), float(pairs["tpot_s"].max())],
                }
            )
    return ratios
