"""How far the what-if page's predictions are from measurements that they have not seen.

The roofline of the report (report/roofline.py) is fitted to the grid that `lowbit tune` measures and predicts TTFT and
TPOT of five other shapes, for the original and for quantized models. Held against what `lowbit bench` then measures.

A model's results are written when it is measured, and an interrupted script goes on with the next. About three minutes
on two cores.

    python benchmarks/whatif_error.py [--model demo] [--schemes w8a8,w4a16] [--repeats 7] [--output FILE]
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from partial import RESULTS, known, save

import lowbit
from lowbit.model.checkpoint import open_checkpoint
from lowbit.report.roofline import fit
from lowbit.speed import Scenario
from lowbit.tuning.run import grid

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


def measure(model: str, scheme: str | None, repeats: int) -> dict[str, Any]:
    """{model, calibrated_on, predictions}: the model itself, or quantized."""
    context = int(open_checkpoint(model).text_config["max_position_embeddings"])
    shapes = [*grid(context), *HELD_OUT]
    assert len(set(shapes)) == len(shapes), "a held-out shape is one of the grid's"
    with tempfile.TemporaryDirectory() as place:
        path = model
        if scheme is not None:
            path = str(Path(place) / scheme)
            lowbit.quantize(model, path, scheme=scheme, method="rtn")
        document = lowbit.bench(
            [path], prompt_lengths=[16], output_lengths=[16], repeats=1, grid=shapes, grid_repeats=repeats
        )
    known_rows, unseen = document["grid"][: -len(HELD_OUT)], document["grid"][-len(HELD_OUT) :]
    assert [r["scenario"] for r in unseen] == [asdict(s) for s in HELD_OUT]
    return {
        "model": scheme or Path(model).name,
        "calibrated_on": [r["scenario"] for r in known_rows],
        "predictions": errors(known_rows, unseen),
    }


def show(result: dict[str, Any]) -> None:
    for r in result["predictions"]:
        s = r["scenario"]
        print(f"{result['model']:8} {s['prompt_length']:4} + {s['output_length']:2} x {s['batch_size']}", end="")
        for kind in ("ttft", "tpot"):
            k = r[kind]
            print(f"   {kind.upper()} {k['predicted_s'] * 1e3:8.3f} ms predicted, {k['measured_s'] * 1e3:8.3f} ms "
                  f"measured, {k['error']:+.1%}", end="")  # fmt: skip
        print(flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--schemes", default="w8a8,w4a16")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--output", "--json", dest="file", type=Path, default=RESULTS / "whatif.json")
    a = p.parse_args()
    settings = {k: v for k, v in vars(a).items() if k != "file"}
    results: list[dict[str, Any]] = known(a.file, settings).get("results", [])
    models = [None, *a.schemes.split(",")]
    for scheme in models[len(results) :]:
        results.append(measure(a.model, scheme, a.repeats))
        save(a.file, settings, {"results": results}, finished=False)
        show(results[-1])
    worst = max(abs(p[k]["error"]) for r in results for p in r["predictions"] for k in ("ttft", "tpot"))
    save(a.file, settings, {"limit": LIMIT, "largest_error": worst, "results": results}, finished=True)
    print(f"largest error {worst:.1%}, limit {LIMIT:.0%}: {'kept' if worst <= LIMIT else 'NOT kept'}")


if __name__ == "__main__":
    main()
