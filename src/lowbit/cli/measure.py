"""lowbit evaluate, lowbit bench"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import (
    Json,
    Kv,
    Program,
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
    words,
)
from lowbit.errors import QualityGateError

Models = Annotated[
    list[str],
    typer.Argument(help="Model directories, GGUF files, ONNX directories, hub ids, 'demo', or servers' URLs."),
]
Against = Annotated[str | None, typer.Option(help="The model to compare with.")]


def evaluate(
    models: Models,
    against: Against = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="A .txt or .jsonl to measure on.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window (default: the context, at most 2048).")] = None,
    windows: Annotated[int | None, typer.Option(help="Only so many windows, spread over the text.", min=1)] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(metavar="1%", help="Gate: exit 3 above this.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: exit 3 above this KL divergence.", min=0)] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness, or YAML files of yours.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task only so many samples.")] = None,
    runtime: Runtime = "auto",
    program: Program = None,
    kv: Kv = None,
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy: perplexity, KL divergence and agreement with the original."""
    begin(quiet, verbose, trust_remote_code)
    most = percent(max_ppl_increase, "--max-ppl-increase")
    kind = check_runtime(runtime)
    from lowbit.accuracy import evaluate as run

    with tempfile.TemporaryDirectory() as work:
        floor = _original_in_its_format(kind, against, Path(work))
        document = run(
            models, text, against=against, seq_len=seq_len, windows=windows, runtime=kind, program=program, kv=kv,
            floor=floor, max_ppl_increase=most, max_kl=max_kl, tasks=words(tasks), limit=limit,
        )  # fmt: skip
    shown = [accuracy_table(document)] if "text" in document else []
    finish("evaluate", document, json, "\n\n".join([*shown, *([task_table(document)] if tasks else [])]))
    missed = [(r["model"], g) for r in document["results"] for g in r.get("gates", ()) if not g["met"]]
    if missed:
        lines = [f"{m}: {g['gate']} is {g['value']:.4g}, above the limit {g['limit']:.4g}" for m, g in missed]
        raise QualityGateError("quality gate not met: " + "; ".join(lines))


# runtime -> format and type of full precision that it reads
_READS = {"llama.cpp": ("gguf", "f32"), "onnx": ("onnx", "float")}


def _original_in_its_format(runtime: str, original: str | None, work: Path) -> Path | None:
    """The model to compare with, for the noise floor of an engine with a format of its own: in full precision."""
    if runtime not in _READS or original is None or original.endswith(".gguf"):
        return None
    from lowbit.exporting import export

    format, type = _READS[runtime]
    target = work / f"original.{format}"
    export(original, target, format, type=type)
    return target


def accuracy_table(document: dict[str, Any]) -> str:
    reference, floor = document["reference"], document["noise_floor"]
    rows = [[f"{reference['model']} (reference)", f"{reference['perplexity']:.4f}", "", "", "", reference["runtime"]]]
    if floor is not None:
        increase = floor["perplexity"] / reference["perplexity"] - 1
        row = ["noise floor", f"{floor['perplexity']:.4f}", f"{increase:+.2%}", f"{floor['kl']:.5f}"]
        rows.append([*row, f"{floor['top1_agreement']:.1%}", floor["runtime"]])
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


def task_table(document: dict[str, Any]) -> str:
    """Every task's metrics, and for each model what speaks for a difference from the reference."""
    reference = document["reference"]
    rows = [[f"{reference['model']} (reference)", *r] for r in _task_cells(reference["tasks"])]
    rows += [[result["model"], *r] for result in document["results"] for r in _task_cells(result["tasks"])]
    return "\n".join(
        [
            table(["model", "task", "samples", "metric", "value"], rows),
            *map(_task_comparison, document["task_comparisons"]),
        ]
    )


def _task_cells(tasks: dict[str, Any]) -> list[list[str]]:
    return [
        [task, str(t["n"]), metric, f"{m['value']:.4f}" + ("" if m["stderr"] is None else f" ± {m['stderr']:.4f}")]
        for task, t in tasks.items()
        for metric, m in t["metrics"].items()
    ]


def _task_comparison(c: dict[str, Any]) -> str:
    d, m = c["difference"], c["mcnemar"]
    test = (
        ""
        if m is None
        else f", {m['only_own']} only here, {m['only_other']} only there, McNemar p = {m['p_value']:.2g}"
    )
    around = f"{d['confidence']:.0%}: {d['low']:+.4f} to {d['high']:+.4f}"
    return f"{c['model']} against {c['against']}: {c['task']} {c['metric']} {d['estimate']:+.4f} ({around}{test})"


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
    program: Program = None,
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
        program=program,
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
                "" if r["energy"]["joules_per_token"] is None else f"{r['energy']['joules_per_token']:.3g} J",
            ]
        )
    headers = ["model", "tokens x batch", "TTFT", "TPOT", "speed-up", "tokens/s", "MBU", "weights", "peak memory"]
    reasons = {r["energy"]["unavailable"] for r in document["results"]}
    if None in reasons:
        headers.append("energy/token")
    else:
        rows = [row[:-1] for row in rows]
    runtimes = "\n".join(dict.fromkeys(f"{r['model']}: {r['runtime']}" for r in document["results"]))
    served = [_load_line(r) for r in document["results"] if "load" in r]
    if served:
        return "\n".join([table(headers, rows), *served])
    peak = f"read bandwidth measured here: {document['peak_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    energy = [f"energy: unavailable: {reason}" for reason in reasons if reason]
    return "\n".join([table(headers, rows), peak, *energy, runtimes])


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
