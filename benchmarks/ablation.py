"""What int8 weights, the key-value cache in int8, the prefix cache and batching do together, and each alone.

One workload: requests that share a long beginning (a system prompt) and differ in their end, answered greedily. First
the parts are added one after the other, then each is taken away from the whole. Rows with the same weights and the same
cache of floats must give the same tokens, and the script checks that they do: what is left out costs time and nothing
else. An int8 cache rounds the query of a single token, so how a prompt is cut up shows in the last digits: for those
rows the share of equal tokens is in the results.

The model has random weights (about 0.1 B parameters, more than a processor's caches hold), because time does not depend
on their values; its tokenizer is the demo's. Rounds go over all rows in turn; every run is written as it ends, and an
interrupted script goes on where it was. About four minutes on two cores.

    python benchmarks/ablation.py [--repeats 3] [--output FILE]
"""

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from partial import RESULTS, known, save
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.model.checkpoint import DEMO
from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Scheduler

SHAPE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
INT8 = "w8a8"


@dataclass(frozen=True)
class Case:
    """What is on. `cache`: how keys and values are kept, None for not at all."""

    name: str
    int8: bool
    cache: str | None
    prefix: bool
    batching: bool


NOTHING = Case("bf16 weights, nothing kept", int8=False, cache=None, prefix=False, batching=False)
WHOLE = Case("+ batching: all of it", int8=True, cache="int8", prefix=True, batching=True)
CASES = (
    NOTHING,
    Case("+ KV cache of 16 bits", int8=False, cache="none", prefix=False, batching=False),
    Case("+ int8 weights", int8=True, cache="none", prefix=False, batching=False),
    Case("+ int8 KV cache", int8=True, cache="int8", prefix=False, batching=False),
    Case("+ prefix cache", int8=True, cache="int8", prefix=True, batching=False),
    WHOLE,
    Case("all but int8 weights", int8=False, cache="int8", prefix=True, batching=True),
    Case("all but the int8 KV cache", int8=True, cache="none", prefix=True, batching=True),
    Case("all but the prefix cache", int8=True, cache="int8", prefix=False, batching=True),
)


@dataclass(frozen=True)
class Workload:
    """Tokens and requests."""

    requests: int = 8
    shared: int = 448
    own: int = 32
    answer: int = 16

    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(0)
        shared = rng.integers(3, SHAPE["vocab_size"], self.shared).tolist()
        return [shared + rng.integers(3, SHAPE["vocab_size"], self.own).tolist() for _ in range(self.requests)]


Engines = dict[tuple[bool, str | None], Engine]
Tokens = list[list[int]]


def save_random(folder: Path, shape: dict[str, Any]) -> None:
    """A model of this shape with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, folder / name)


def make_models(folder: Path) -> Engines:
    """{(int8?, cache): engine} of the same random model."""
    plain, int8 = folder / "bf16", folder / "int8"
    save_random(plain, SHAPE)
    lowbit.quantize(plain, int8, scheme=INT8, method="rtn")
    wanted = dict.fromkeys((c.int8, c.cache) for c in CASES)
    return {(own, cache): lowbit.load(int8 if own else plain, kv=cache) for own, cache in wanted}


def answer_without_cache(engine: Any, prompts: Tokens, output: int) -> tuple[Tokens, dict[str, int]]:
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
    engine: Engine, prompts: Tokens, output: int, *, prefix: bool, batching: bool
) -> tuple[Tokens, dict[str, int]]:
    """By the scheduler that serves: one request at a time, or all together."""
    scheduler = Scheduler(engine, max_running=len(prompts) if batching else 1, reuse=prefix)
    params = SamplingParams(max_new_tokens=output, ignore_eos=True)
    answers: Tokens = [[] for _ in prompts]
    for prompt in prompts:
        scheduler.submit(prompt, params)
    while scheduler.busy:
        for event in scheduler.step():
            assert event.output is not None, event.error
            answers[event.request].append(event.output.token)
    stats = scheduler.stats
    computed = stats.prompt_tokens + stats.generated_tokens - len(prompts)
    return answers, {"steps": stats.steps, "tokens_computed": computed}


def run(case: Case, engines: Engines, work: Workload) -> dict[str, Any]:
    """One answer to the whole workload: {seconds, steps, tokens_computed, answers}."""
    engine, prompts = engines[case.int8, case.cache], work.prompts()
    start = time.perf_counter()
    if case.cache is None:
        answers, counts = answer_without_cache(engine, prompts, work.answer)
    else:
        answers, counts = answer_scheduled(engine, prompts, work.answer, prefix=case.prefix, batching=case.batching)
    return {"seconds": time.perf_counter() - start, **counts, "answers": answers}


def equal_tokens(case: Case, own: Tokens, runs: dict[str, list[dict[str, Any]]]) -> float:
    """The share of tokens that are those of the first row with the same weights. An answer is compared up to and with
    its first difference: after it the texts go their own ways."""
    first = next(c for c in CASES if c.int8 == case.int8 and runs[c.name])
    same = total = 0
    for a, b in zip(own, runs[first.name][0]["answers"], strict=True):
        until = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        same, total = same + until, total + min(until + 1, len(a))
    return same / total


def summary(runs: dict[str, list[dict[str, Any]]], work: Workload) -> list[dict[str, Any]]:
    """A row for each case: medians, and the speed-up over nothing at all."""
    seconds = {name: statistics.median(r["seconds"] for r in own) for name, own in runs.items()}
    rows = []
    for case in CASES:
        last, own = runs[case.name][-1], seconds[case.name]
        rows.append(
            asdict(case)
            | {k: last[k] for k in ("steps", "tokens_computed")}
            | {"seconds": own, "runs": [r["seconds"] for r in runs[case.name]]}
            | {"tokens_per_s": work.requests * work.answer / own, "speedup": seconds[NOTHING.name] / own}
            | {"share_of_whole": seconds[WHOLE.name] / own, "equal_tokens": equal_tokens(case, last["answers"], runs)}
        )
    return rows


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3)
    for name, value in asdict(Workload()).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    p.add_argument("--output", "--json", dest="file", type=Path, default=RESULTS / "ablation.json")
    return p.parse_args()


def main() -> None:
    a = arguments()
    work = Workload(a.requests, a.shared, a.own, a.answer)
    SHAPE["num_hidden_layers"] = a.layers
    settings = {"workload": asdict(work), "model": SHAPE, "repeats": a.repeats}
    runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in CASES}
    runs |= known(a.file, settings).get("measured", {})
    with tempfile.TemporaryDirectory() as place:
        engines = make_models(Path(place))
        weights = {name: engines[own, "none"].weight_bytes for name, own in (("bf16", False), (INT8, True))}
        for case in CASES:  # warms up
            run(case, engines, replace(work, requests=1, answer=2))
        for r in range(a.repeats):
            for case in CASES:
                # without a cache once is enough: it is slow, and far from anything else
                if len(runs[case.name]) > r or (case.cache is None and r > 0):
                    continue
                found = run(case, engines, work)
                runs[case.name].append(found)
                if case.cache == "none":
                    assert equal_tokens(case, found["answers"], runs) == 1, f"{case.name}: other tokens than without"
                save(a.file, settings, {"measured": runs, "weight_bytes": weights}, finished=False)
                print(f"round {r + 1} of {a.repeats}: {case.name:30} {found['seconds']:8.2f} s", flush=True)
    rows = summary(runs, work)
    for r in rows:
        print(f"{r['name']:30} {r['seconds']:8.2f} s {r['tokens_per_s']:9.1f} tokens/s {r['speedup']:8.2f}x "
              f"{r['tokens_computed']:7} tokens in {r['steps']:4} steps, {r['equal_tokens']:.1%} equal")  # fmt: skip
    save(a.file, settings, {"workload": asdict(work), "weight_bytes": weights, "rows": rows}, finished=True)


if __name__ == "__main__":
    main()
