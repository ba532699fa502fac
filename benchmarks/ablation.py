"""What int8 weights, the key-value cache, the prefix cache and batching do together, and each alone.

One workload: requests that share a long beginning (a system prompt) and differ in their end, answered greedily. First
the parts are added one after the other, then each is taken away from the whole. Rows with the same weights must give
the same tokens, and the script checks that they do: what is left out costs time and nothing else.

The model has random weights (about 0.1 B parameters, more than a processor's caches hold), because time does not depend
on their values; its tokenizer is the demo's.

    python benchmarks/ablation.py [--repeats 3]
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.environment import environment
from lowbit.model.checkpoint import DEMO
from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Scheduler

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
SHAPE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
INT8 = "w8a8"


@dataclass(frozen=True)
class Case:
    """What is on."""

    name: str
    int8: bool
    cache: bool
    prefix: bool
    batching: bool


CASES = (
    Case("bf16 weights, nothing kept", int8=False, cache=False, prefix=False, batching=False),
    Case("+ KV cache", int8=False, cache=True, prefix=False, batching=False),
    Case("+ int8 weights", int8=True, cache=True, prefix=False, batching=False),
    Case("+ prefix cache", int8=True, cache=True, prefix=True, batching=False),
    Case("+ batching: all of it", int8=True, cache=True, prefix=True, batching=True),
    Case("all but int8 weights", int8=False, cache=True, prefix=True, batching=True),
    Case("all but the prefix cache", int8=True, cache=True, prefix=False, batching=True),
    Case("without the KV cache there is neither of the last two", int8=True, cache=False, prefix=False, batching=False),
)


@dataclass(frozen=True)
class Workload:
    """Tokens and requests."""

    requests: int = 16
    shared: int = 192
    own: int = 32
    output: int = 24

    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(0)
        shared = rng.integers(3, SHAPE["vocab_size"], self.shared).tolist()
        return [shared + rng.integers(3, SHAPE["vocab_size"], self.own).tolist() for _ in range(self.requests)]


def make_models(folder: Path) -> dict[bool, Engine]:
    """{int8?: engine} of the same random model."""
    plain, int8 = folder / "bf16", folder / "int8"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, plain / name)
    lowbit.quantize(plain, int8, scheme=INT8, method="rtn")
    return {False: lowbit.load(plain), True: lowbit.load(int8)}


def answer_without_cache(engine: Any, prompts: list[list[int]], output: int) -> tuple[list[list[int]], dict[str, int]]:
    """Every token from the whole text before it."""
    longest = max(map(len, prompts)) + output
    decoder, computed = engine.make_decoder(longest), 0
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(output):
            ids = torch.tensor(tokens, dtype=torch.int32)
            _, best = decoder.forward(ids, [(len(ids), 0, False)], decoder.linear_table(1), logits=False)
            computed += len(ids)
            tokens.append(int(best[0]))
        answers.append(tokens[len(prompt) :])
    return answers, {"steps": len(prompts) * output, "tokens_computed": computed}


def answer_scheduled(
    engine: Engine, prompts: list[list[int]], output: int, *, prefix: bool, batching: bool
) -> tuple[list[list[int]], dict[str, int]]:
    """By the scheduler that serves: one request at a time, or all together."""
    scheduler = Scheduler(engine, max_running=len(prompts) if batching else 1, reuse=prefix)
    params = SamplingParams(max_new_tokens=output, ignore_eos=True)
    answers: list[list[int]] = [[] for _ in prompts]
    for prompt in prompts:
        scheduler.submit(prompt, params)
    while scheduler.busy:
        for event in scheduler.step():
            assert event.output is not None, event.error
            answers[event.request].append(event.output.token)
    stats = scheduler.stats
    computed = stats.prompt_tokens + stats.generated_tokens - len(prompts)
    return answers, {"steps": stats.steps, "tokens_computed": computed}


def run(case: Case, engines: dict[bool, Engine], work: Workload) -> tuple[list[list[int]], dict[str, Any]]:
    engine, prompts = engines[case.int8], work.prompts()
    start = time.perf_counter()
    if case.cache:
        answers, counts = answer_scheduled(engine, prompts, work.output, prefix=case.prefix, batching=case.batching)
    else:
        answers, counts = answer_without_cache(engine, prompts, work.output)
    return answers, counts | {"seconds": time.perf_counter() - start}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3)
    for name, value in asdict(Workload()).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    p.add_argument("--json", default=str(RESULTS))
    a = p.parse_args()
    work = Workload(a.requests, a.shared, a.own, a.output)
    SHAPE["num_hidden_layers"] = a.layers
    with tempfile.TemporaryDirectory() as place:
        engines = make_models(Path(place))
        runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in CASES}
        truth: dict[bool, list[list[int]]] = {}
        for r in range(a.repeats + 1):  # the first round warms up
            for case in CASES:
                if r > 1 and not case.cache:
                    continue  # once is enough: it is slow, and far from anything else
                answers, found = run(case, engines, work)
                same = truth.setdefault(case.int8, answers) == answers
                assert same, f"{case.name}: other tokens than without"
                if r > 0:
                    runs[case.name].append(found)
    rows = []
    first = statistics.median(r["seconds"] for r in runs[CASES[0].name])
    whole = statistics.median(r["seconds"] for r in runs[CASES[4].name])
    for case in CASES:
        seconds = statistics.median(r["seconds"] for r in runs[case.name])
        row = asdict(case) | runs[case.name][-1] | {"seconds": seconds, "runs": [r["seconds"] for r in runs[case.name]]}
        row |= {"tokens_per_s": work.requests * work.output / seconds, "speedup": first / seconds}
        rows.append(row | {"share_of_whole": whole / seconds})
        print(f"{case.name:55} {seconds:8.2f} s {row['tokens_per_s']:9.1f} tokens/s {row['speedup']:8.2f}x "
              f"{row['tokens_computed']:8} tokens computed in {row['steps']} steps")  # fmt: skip
    weights = {name: engines[int8].weight_bytes for name, int8 in (("bf16", False), (INT8, True))}
    head = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}
    result = head | {"workload": asdict(work), "model": SHAPE, "weight_bytes": weights, "rows": rows}
    Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
