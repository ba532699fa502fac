"""How far the what-if page's predictions are from measurements that they have not seen.

The roofline of the report (report/roofline.py) is fitted to the grid that `lowbit tune` measures and predicts TTFT and
TPOT of five other shapes, for the original and for quantized models. Held against what `lowbit bench` then measures.

    python benchmarks/whatif_error.py [--model demo] [--schemes w8a8,w4a16] [--repeats 7]
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lowbit
from lowbit.environment import environment
from lowbit.model.checkpoint import open_checkpoint
from lowbit.report.roofline import fit
from lowbit.speed import Scenario
from lowbit.tuning.run import grid

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "whatif.json"
HELD_OUT = (  # prompt, output, batch: between and beyond the grid's
    Scenario(64, 48, 1), Scenario(128, 32, 2), Scenario(384, 64, 1), Scenario(256, 32, 3), Scenario(512, 32, 2),
)  # fmt: skip
LIMIT = 0.2


def errors(rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a shape: what was predicted, what was measured, and the relative errors."""
    roofline = fit(rows, [], float(rows[0]["kv_bytes_per_context_token"]))
    found = []
    for r in held_out:
        s = r["scenario"]
        ttft, tpot = roofline.predict(s["prompt_length"], s["output_length"], s["batch_size"])
        row: dict[str, Any] = {"scenario": s}
        for kind, predicted in (("ttft", ttft), ("tpot", tpot)):
            measured = r[f"{kind}_s"]["median"]
            row[kind] = {"predicted_s": predicted, "measured_s": measured, "error": predicted / measured - 1}
        found.append(row)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--schemes", default="w8a8,w4a16")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--json", default=str(RESULTS))
    a = p.parse_args()
    context = int(open_checkpoint(a.model).text_config["max_position_embeddings"])
    shapes = [*grid(context), *HELD_OUT]
    assert len(set(shapes)) == len(shapes), "a held-out shape is one of the grid's"
    with tempfile.TemporaryDirectory() as place:
        models = [a.model]
        for scheme in a.schemes.split(","):
            models.append(str(Path(place) / scheme))
            lowbit.quantize(a.model, models[-1], scheme=scheme, method="rtn")
        document = lowbit.bench(
            models, prompt_lengths=[16], output_lengths=[16], repeats=1, grid=shapes, grid_repeats=a.repeats
        )
    results, worst = [], 0.0
    for model in models:
        rows = [r for r in document["grid"] if r["model"] == model]
        known, unseen = rows[: len(rows) - len(HELD_OUT)], rows[len(rows) - len(HELD_OUT) :]
        assert [r["scenario"] for r in unseen] == [asdict(s) for s in HELD_OUT]
        found = errors(known, unseen)
        worst = max([worst, *(abs(r[k]["error"]) for r in found for k in ("ttft", "tpot"))])
        results.append(
            {"model": Path(model).name, "calibrated_on": [r["scenario"] for r in known], "predictions": found}
        )
        for r in found:
            s = r["scenario"]
            print(f"{Path(model).name:8} {s['prompt_length']:4} + {s['output_length']:2} x {s['batch_size']}", end="")
            for kind in ("ttft", "tpot"):
                k = r[kind]
                print(f"   {kind.upper()} {k['predicted_s'] * 1e3:8.3f} ms predicted, {k['measured_s'] * 1e3:8.3f} ms "
                      f"measured, {k['error']:+.1%}", end="")  # fmt: skip
            print()
    print(f"largest error {worst:.1%}, limit {LIMIT:.0%}: {'kept' if worst <= LIMIT else 'NOT kept'}")
    head = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "model": a.model}
    result = head | {"repeats": a.repeats, "limit": LIMIT, "largest_error": worst, "results": results}
    Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
