"""Mixed precision within the time of a uniform scheme against that scheme: KL by window, time per token in turns.

For each uniform scheme of the list: `auto:<its time>us`, its time being what its products take on this machine
(tuning/expected.py). Both round by GPTQ on the demo's calibration text and are evaluated on its evaluation text; then
all take turns on the native decoder, so that what was expected of the speed is measured. The table between the markers
of docs/methods.md is made anew at the end. About six minutes on two cores without AVX-512, on a machine that does
nothing else.

    python benchmarks/mixed_speed.py [--uniform S,...] [--samples 32] [--windows 64] [--output FILE]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from partial import RESULTS, ROOT, save

import lowbit
from lowbit.intervals import kl_difference
from lowbit.model.checkpoint import open_checkpoint
from lowbit.tuning.expected import PLAIN, expected_seconds

FILE, DOCS = RESULTS / "mixed_speed.json", ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- mixed speed: begin -->\n", "<!-- mixed speed: end -->\n"
TEXTS = ROOT / "src" / "lowbit" / "demo"


def measure(a: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Two rows for each uniform scheme, itself and the mix within its time."""
    uniform = a.uniform.split(",")
    times = expected_seconds(open_checkpoint("demo"), uniform)
    assert times is not None, "without kernels there are no times"
    schemes = [s for u in uniform for s in (u, f"auto:{times[u] * 1e6:.2f}us")]
    paths = [place / str(n) for n in range(len(schemes))]
    made = [
        lowbit.quantize(
            "demo", p, scheme=s, method="gptq", samples=a.samples, calibration=str(TEXTS / "calibration.txt")
        )
        for p, s in zip(paths, schemes, strict=True)
    ]  # fmt: skip
    found = lowbit.evaluate(
        paths, TEXTS / "evaluation.txt", against="demo", seq_len=512, windows=a.windows, runtime="float32"
    )["results"]
    speed = lowbit.bench(paths, against="demo", repeats=a.repeats)
    ratios = {r["model"]: r for r in speed["ratios"]}
    tpots = {r["model"]: r["tpot_s"]["median"] for r in speed["results"]}
    runs = {r["model"]: r["runs"]["tpot_s"] for r in speed["results"]}
    return [
        {
            "scheme": s, "bits_per_weight": document["bits_per_weight"],
            "expected_speedup": times[PLAIN] / times[uniform[n // 2]],
            "tpot_s": tpots[str(p)], "tpot_runs_s": runs[str(p)], "speedup": ratios[str(p)]["tpot"],
            "speedup_interval": ratios[str(p)]["intervals"]["tpot"], "kl": row["kl"],
            "perplexity_increase": row["perplexity_increase"],
            "kl_per_window": [float(f"{k:.5g}") for k in row["per_window"]["kl"]],
        }
        for n, (s, p, document, row) in enumerate(zip(schemes, paths, made, found, strict=True))
    ]  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every mix against the uniform scheme whose time it keeps: KL window by window, time per token round by round."""
    pairs = []
    for uniform, mixed in zip(rows[::2], rows[1::2], strict=True):
        own, other = (np.array(r["kl_per_window"]) for r in (uniform, mixed))
        times = np.array(mixed["tpot_runs_s"]) / np.array(uniform["tpot_runs_s"])
        pairs.append(
            {
                "uniform": uniform["scheme"], "mixed": mixed["scheme"], "kl_times": float(own.mean() / other.mean()),
                "kl_difference": kl_difference(own, other).to_dict(), "tpot_of_mixed": float(np.median(times)),
            }
        )  # fmt: skip
    return pairs


def table(document: dict[str, Any]) -> str:
    against = {p["mixed"]: p for p in document["pairs"]}
    lines = [
        "| scheme | bits per weight | time per token | KL | uniform's KL over mixed (95 %) | time over uniform's |",
        "|---|---|---|---|---|---|",
    ]
    for r in document["rows"]:
        p, more = against.get(r["scheme"]), " | "
        if p is not None:
            d = p["kl_difference"]
            more = f"{p['kl_times']:.2f}x ({d['low']:+.5f} to {d['high']:+.5f}) | {p['tpot_of_mixed']:.2f}x"
        lines.append(
            f"| `{r['scheme']}` | {r['bits_per_weight']:.3f} | {r['tpot_s'] * 1e3:.3f} ms "
            f"| {r['kl']['mean']:.5f} ± {r['kl']['stderr']:.5f} | {more} |"
        )
    e = document["environment"]
    return (
        "\n".join(lines) + f"\n\n{e['cpu']}, {e['cores']} cores, {e['instruction_set']}, {document['created'][:10]}.\n"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--uniform", default="w4a16-g128,w4a16-g32")
    for name, value in (("samples", 32), ("windows", 64), ("repeats", 9)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--output", type=Path, default=FILE)
    a = p.parse_args()
    settings = {k: v for k, v in vars(a).items() if k != "output"}
    with tempfile.TemporaryDirectory() as place:
        rows = measure(a, Path(place))
    document = save(a.output, settings, {"rows": rows, "pairs": compared(rows)}, finished=True)
    print(table(document))
    if a.output == FILE:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(before + BEGIN + table(document) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
