"""How far the what-if page's predictions are from measurements that they have not seen.

The roofline of the report (report/roofline.py) is fitted to the grid that `lowbit tune` measures and predicts TTFT and
TPOT of five other shapes, for the original and for quantized models. Held against what `lowbit bench` then measures.
The demo fits a processor's cache, so there is a model with random weights that does not (`random`: four layers of
ablation.py's shape).

A model's results are written when it is measured, and an interrupted script goes on with the next (`--only N` stops
after N of them). About six minutes on two cores.

    python benchmarks/whatif_error.py [--models demo,demo:w8a8,...] [--repeats 7] [--only N] [--output FILE]
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation import SHAPE, save_random
from partial import RESULTS, known, save

import lowbit
from lowbit.model.checkpoint import open_checkpoint
from lowbit.report.roofline import fit, steady
from lowbit.speed import Scenario
from lowbit.tuning.run import grid

HELD_OUT = (  # prompt, output, batch: between and beyond the grid's
    Scenario(64, 48, 1), Scenario(128, 32, 2), Scenario(384, 64, 1), Scenario(256, 32, 3), Scenario(512, 32, 2),
)  # fmt: skip
MODELS = "demo,demo:w8a8,demo:w4a16,random"
RANDOM_LAYERS = 4
LIMIT = 0.2


def errors(rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a shape: what was predicted, what was measured, and the relative errors. All rows are of the same rounds,
    and a round in which the machine was busy is treated alike on both sides (roofline.steady)."""
    roofline = fit(rows, [], float(rows[0]["kv_bytes_per_context_token"]))
    measured = {kind: steady([*rows, *held_out], f"{kind}_s")[len(rows) :] for kind in ("ttft", "tpot")}
    found = []
    for n, r in enumerate(held_out):
        s = r["scenario"]
        ttft, tpot = roofline.predict(s["prompt_length"], s["output_length"], s["batch_size"])
        row: dict[str, Any] = {"scenario": s, "runs": r["runs"]}
        for kind, predicted in (("ttft", ttft), ("tpot", tpot)):
            seen = measured[kind][n]
            row[kind] = {"predicted_s": predicted, "measured_s": seen, "error": predicted / seen - 1}
        found.append(row)
    return found


def measure(name: str, repeats: int) -> dict[str, Any]:
    """{model, calibrated_on, predictions} of MODEL, or of MODEL:SCHEME quantized."""
    model, _, scheme = name.partition(":")
    with tempfile.TemporaryDirectory() as place:
        path = Path(model)
        if model == "random":
            path = Path(place) / model
            save_random(path, SHAPE | {"num_hidden_layers": RANDOM_LAYERS})
        shapes = [*grid(int(open_checkpoint(path).text_config["max_position_embeddings"])), *HELD_OUT]
        assert len(set(shapes)) == len(shapes), "a held-out shape is one of the grid's"
        if scheme:
            lowbit.quantize(path, Path(place) / scheme, scheme=scheme, method="rtn")
            path = Path(place) / scheme
        document = lowbit.bench(
            [path], prompt_lengths=[16], output_lengths=[16], repeats=1, grid=shapes, grid_repeats=repeats
        )
    known_rows, unseen = document["grid"][: -len(HELD_OUT)], document["grid"][-len(HELD_OUT) :]
    assert [r["scenario"] for r in unseen] == [asdict(s) for s in HELD_OUT]
    return {
        "model": name,
        "weight_bytes": known_rows[0]["weight_bytes"],
        "calibrated_on": [{k: r[k] for k in ("scenario", "runs")} for r in known_rows],
        "predictions": errors(known_rows, unseen),
    }


def show(result: dict[str, Any]) -> None:
    for r in result["predictions"]:
        s = r["scenario"]
        print(f"{result['model']:12} {s['prompt_length']:4} + {s['output_length']:2} x {s['batch_size']}", end="")
        for kind in ("ttft", "tpot"):
            k = r[kind]
            print(f"   {kind.upper()} {k['predicted_s'] * 1e3:8.3f} ms predicted, {k['measured_s'] * 1e3:8.3f} ms "
                  f"measured, {k['error']:+.1%}", end="")  # fmt: skip
        print(flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=MODELS)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--only", type=int, help="leave the others to the next call")
    p.add_argument("--output", "--json", dest="file", type=Path, default=RESULTS / "whatif.json")
    a = p.parse_args()
    settings = {k: v for k, v in vars(a).items() if k not in ("file", "only")}
    results: list[dict[str, Any]] = known(a.file, settings).get("results", [])
    models = a.models.split(",")
    for name in models[len(results) :][: a.only]:
        results.append(measure(name, a.repeats))
        save(a.file, settings, {"results": results}, finished=False)
        show(results[-1])
    if len(results) < len(models):
        return
    worst = max(abs(p[k]["error"]) for r in results for p in r["predictions"] for k in ("ttft", "tpot"))
    save(a.file, settings, {"limit": LIMIT, "largest_error": worst, "results": results}, finished=True)
    print(f"largest error {worst:.1%}, limit {LIMIT:.0%}: {'kept' if worst <= LIMIT else 'NOT kept'}")


if __name__ == "__main__":
    main()
