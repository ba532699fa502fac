"""lowbit evaluate, lowbit bench"""

from typing import Annotated, Any

import typer

from lowbit.cli.options import (
    Json,
    Kv,
    Quiet,
    Runtime,
    Seed,
    Trust,
    Verbose,
    begin,
    check_runtime,
    finish,
    megabytes,
    numbers,
    percent,
    seconds,
    table,
)
from lowbit.errors import QualityGateError

Models = Annotated[list[str], typer.Argument(help="Model directories, hub ids, 'demo', or for bench URLs.")]
Against = Annotated[str | None, typer.Option(help="The model to compare with.")]


def evaluate(
    models: Models,
    against: Against = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="A .txt or .jsonl to measure on.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window (default: the context, at most 2048).")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(metavar="1%", help="Gate: exit 3 above this.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: exit 3 above this KL divergence.", min=0)] = None,
    runtime: Runtime = "auto",
    kv: Kv = None,
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy: perplexity, KL divergence and agreement with the original."""
    begin(quiet, verbose, trust_remote_code)
    limit = percent(max_ppl_increase, "--max-ppl-increase")
    kind = check_runtime(runtime)
    from lowbit.accuracy import evaluate as run

    document = run(
        models, text, against=against, seq_len=seq_len, runtime=kind, kv=kv, max_ppl_increase=limit, max_kl=max_kl
    )
    finish("evaluate", document, json, accuracy_table(document))
    missed = [(r["model"], g) for r in document["results"] for g in r["gates"] if not g["met"]]
    if missed:
        lines = [f"{m}: {g['gate']} is {g['value']:.4g}, above the limit {g['limit']:.4g}" for m, g in missed]
        raise QualityGateError("quality gate not met: " + "; ".join(lines))


def accuracy_table(document: dict[str, Any]) -> str:
    reference, floor = document["reference"], document["noise_floor"]
    rows = [
        [f"{reference['model']} (reference)", f"{reference['perplexity']:.4f}", "", "", "", reference["runtime"]],
        [
            "noise floor",
            f"{floor['perplexity']:.4f}",
            f"{floor['perplexity'] / reference['perplexity'] - 1:+.2%}",
            f"{floor['kl']:.5f}",
            f"{floor['top1_agreement']:.1%}",
            floor["runtime"],
        ],
    ]
    for r in document["results"]:
        rows.append(
            [
                r["model"],
                f"{r['perplexity']:.4f}",
                f"{r['perplexity_increase']:+.2%} ± {r['perplexity_increase_stderr']:.2%}",
                f"{r['kl']['mean']:.5f} ± {r['kl']['stderr']:.5f}",
                f"{r['top1_agreement']:.1%}",
                r["runtime"],
            ]
        )
    head = f"{document['text']}: {document['tokens']} tokens in {document['windows']} windows of {document['seq_len']}"
    shown = head + "\n" + table(["model", "perplexity", "increase", "KL", "same top token", "runtime"], rows)
    return "\n".join([shown, *map(_comparison, document["comparisons"])])


def _comparison(c: dict[str, Any]) -> str:
    d = c["kl_difference"]
    verdict = "closer to the original than" if d["high"] < 0 else "not outside the noise against"
    return (
        f"{c['model']}: {verdict} {c['against']}, KL {d['estimate']:+.5f} "
        f"({d['confidence']:.0%}: {d['low']:+.5f} to {d['high']:+.5f})"
    )


def bench(
    models: Models,
    against: Against = None,
    prompt_lengths: Annotated[str, typer.Option(metavar="N,...", help="Prompt tokens.")] = "128",
    output_lengths: Annotated[str, typer.Option(metavar="N,...", help="Generated tokens.")] = "64",
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Sequences at once.")] = "1",
    repeats: Annotated[int, typer.Option(help="Counted runs of each, after one warm-up.")] = 5,
    precision: Annotated[
        str | None, typer.Option(metavar="2%", help="Go on until the ratios' intervals are this narrow (at most 3 x).")
    ] = None,
    requests: Annotated[int, typer.Option(help="Of a server (URL): requests a scenario.")] = 32,
    rate: Annotated[
        float | None, typer.Option(help="Of a server: requests a second, at random (default: as fast as it answers).")
    ] = None,
    max_ttft: Annotated[str | None, typer.Option(metavar="200ms", help="Of a server: limit for goodput.")] = None,
    max_tpot: Annotated[str | None, typer.Option(metavar="20ms", help="Of a server: limit for goodput.")] = None,
    runtime: Runtime = "auto",
    kv: Kv = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure speed and memory, models taking turns; or a server by its URL, under load."""
    begin(quiet, verbose, trust_remote_code)
    kind = check_runtime(runtime)
    first, each = seconds(max_ttft, "--max-ttft"), seconds(max_tpot, "--max-tpot")
    from lowbit.speed import Load
    from lowbit.speed import bench as run

    document = run(
        models,
        against=against,
        prompt_lengths=numbers(prompt_lengths, "--prompt-lengths"),
        output_lengths=numbers(output_lengths, "--output-lengths"),
        batch_sizes=numbers(batch_sizes, "--batch-sizes"),
        repeats=repeats,
        precision=percent(precision, "--precision"),
        load=Load(requests, rate=rate, max_ttft=first, max_tpot=each),
        runtime=kind,
        kv=kv,
        seed=seed,
    )
    finish("bench", document, json, speed_table(document), seed)


def _ratio(ratio: dict[str, Any]) -> str:
    interval = (ratio["intervals"] or {}).get("tpot")
    around = f" ({interval['low']:.2f} to {interval['high']:.2f})" if interval else ""
    return f"{ratio['tpot']:.2f}x{around}"


def speed_table(document: dict[str, Any]) -> str:
    rows = []
    for r in document["results"]:
        s = r["scenario"]
        ratio = next((q for q in document["ratios"] if q["model"] == r["model"] and q["scenario"] == s), None)
        rows.append(
            [
                r["model"],
                f"{s['prompt_length']}+{s['output_length']} x {s['batch_size']}",
                f"{r['ttft_s']['median'] * 1e3:.1f} ms",
                f"{r['tpot_s']['median'] * 1e3:.2f} ms",
                "" if ratio is None else _ratio(ratio),
                f"{r['throughput_tokens_per_s']:.0f}",
                "" if r["mbu"] is None else f"{r['mbu']:.0%}",
                "" if r["weight_bytes"] is None else megabytes(r["weight_bytes"]),
                "" if r["peak_memory_bytes"] is None else megabytes(r["peak_memory_bytes"]),
            ]
        )
    headers = ["model", "tokens x batch", "TTFT", "TPOT", "speed-up", "tokens/s", "MBU", "weights", "peak memory"]
    runtimes = "\n".join(dict.fromkeys(f"{r['model']}: {r['runtime']}" for r in document["results"]))
    served = [_load_line(r) for r in document["results"] if "load" in r]
    if served:
        return "\n".join([table(headers, rows), *served])
    peak = f"read bandwidth measured here: {document['peak_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    return table(headers, rows) + "\n" + peak + "\n" + runtimes


def _load_line(row: dict[str, Any]) -> str:
    load, queue = row["load"], row["load"]["queue_s"]
    gap = load["gap_s"]["p90"]
    within = f"{load['within_limits']:.0%} within the limits"
    text = (
        f"{row['model']}: {load['kind']} loop, {load['requests']} requests, {load['requests_per_s']:.2f} answered a "
        f"second, goodput {load['goodput_requests_per_s']:.2f} a second ({within}), "
        f"gap between tokens p90 {gap * 1e3:.1f} ms, client queue p90 {queue['p90'] * 1e3:.1f} ms"
    )
    if load["client_bound"]:
        text += "\n  the load generator was the bottleneck: these are its figures, not the server's"
    return "\n".join([text, *(f"  {n} failed: {reason}" for reason, n in load["failures"].items())])
