"""One model in a process of its own, measured on request: `python -m lowbit.speed.worker` talks JSON lines.

Standard input:   {"load": MODEL, "runtime": R, "serving": {...}, "kv": K}   then any number of   {"prompt_length": P,
"output_length": O, "batch_size": B, "seed": S}.   Standard output: one JSON object for each, or {"error": ...,
"exit_code": ...}.
A fresh process makes peak memory mean something, and lets two models be measured alternately without sharing caches.
"""

import json
import os
import sys
import time
from typing import Any

import psutil

LEAST_SECONDS = 0.25  # one reply: the median of as many generations as fill this, so that a hiccup is not the answer


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # ours alone: whatever a library prints goes to standard error
    os.dup2(2, 1)
    import numpy as np
    import torch

    from lowbit.errors import LowbitError
    from lowbit.runtime.base import Engine
    from lowbit.runtime.engine import load
    from lowbit.runtime.server import Serving
    from lowbit.speed.energy import find_meter

    def timed(engine: Engine, prompts: torch.Tensor, output_length: int) -> tuple[float, float, float]:
        """Seconds of one generation: to the first token, per further token, and in all."""
        times = [time.perf_counter()]
        for _ in engine.stream(prompts, output_length):
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / max(output_length - 1, 1), times[-1] - times[0]

    baseline = psutil.Process().memory_info().rss
    engine: Engine | None = None
    meter = find_meter()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal engine
        if "load" in request:
            start = time.perf_counter()
            engine = load(request["load"], request["runtime"], Serving(**request["serving"]), kv=request.get("kv"))
            return {
                "load_s": time.perf_counter() - start,
                "runtime": engine.runtime,
                "vocab_size": engine.vocab_size,
                "context_length": engine.context_length,
                "weight_bytes": engine.weight_bytes,
                "weight_bytes_per_token": engine.weight_bytes_per_token,
                "no_energy": meter.why_not,
            }
        assert engine is not None
        shape = (request["batch_size"], request["prompt_length"])
        prompts = torch.from_numpy(np.random.default_rng(request["seed"]).integers(0, engine.vocab_size, shape))
        counted = meter.read()
        runs = [timed(engine, prompts, request["output_length"])]
        while sum(run[2] for run in runs) < LEAST_SECONDS:
            runs.append(timed(engine, prompts, request["output_length"]))
        joules = meter.joules(counted, meter.read())
        ttft, tpot, e2e = sorted(runs, key=lambda run: run[2])[(len(runs) - 1) // 2]
        middle_context = request["prompt_length"] + request["output_length"] // 2
        return {
            "ttft_s": ttft,
            "tpot_s": tpot,
            "e2e_s": e2e,
            "kv_bytes_per_token": engine.kv_bytes(middle_context) * request["batch_size"],
            "peak_memory_bytes": engine.peak_memory(),
            "baseline_memory_bytes": baseline if engine.address is None else 0,
            "energy_j": {name: j / len(runs) for name, j in joules.items()},  # of one generation
            "seconds": sum(run[2] for run in runs) / len(runs),
        }

    try:
        for line in sys.stdin:
            try:
                reply = answer(json.loads(line))
            except LowbitError as error:
                reply = {"error": str(error), "exit_code": error.exit_code}
            except MemoryError:
                reply = {"error": "out of memory", "exit_code": 2}
            print(json.dumps(reply), file=out, flush=True)
    finally:
        if engine is not None:
            engine.stop()


if __name__ == "__main__":
    main()
