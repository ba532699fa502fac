"""lowbit tune"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Json, Quiet, Seed, Verbose, begin, finish, numbers, percent, reals, seconds, size, words
from lowbit.errors import InputError, QualityGateError, nearest

_TASKS = ("chat", "code", "math")


def tune(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for candidates and report.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Your own text, .txt or .jsonl.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Calibrate on this instead of a part of --text.")
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="M,...", help="Methods to try (default: gptq).")] = None,
    schemes: Annotated[str | None, typer.Option(metavar="S,...", help="Schemes to try.")] = None,
    group_sizes: Annotated[str | None, typer.Option(metavar="N,...", help="Group sizes to try.")] = None,
    mixed: Annotated[str | None, typer.Option(metavar="BITS,...", help="Mixed precision to try, in bits.")] = None,
    max_ppl_increase: Annotated[str, typer.Option(metavar="1%", help="The accuracy you can give up.")] = "1%",
    max_kl: Annotated[float | None, typer.Option(help="The KL divergence you can accept.", min=0)] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="4GB", help="Peak memory of the running model.")] = None,
    max_ttft: Annotated[str | None, typer.Option(metavar="200ms", help="Time to the first token.")] = None,
    max_tpot: Annotated[str | None, typer.Option(metavar="20ms", help="Time per token.")] = None,
    optimize: Annotated[str, typer.Option(help="tpot, ttft, throughput or memory.")] = "tpot",
    task: Annotated[str | None, typer.Option(help="What the model is for: chat, code or math.")] = None,
    catalog: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prices for the report, in the form of model-catalog.json.")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(metavar="30min", help="For one candidate's job.")] = None,
    memory_limit: Annotated[str | None, typer.Option(metavar="8GB", help="For one candidate's job.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted runs of each speed measurement, at least.")] = 5,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Make and measure every candidate, even the hopeless.")
    ] = False,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on: finished candidates are kept.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize in several ways, measure each on your text and machine, and recommend one (or none)."""
    begin(quiet, verbose)
    if task is not None and task not in _TASKS:
        raise InputError(f"--task {task}: {nearest(task, _TASKS)}")
    limit = percent(max_ppl_increase, "--max-ppl-increase")
    assert limit is not None
    most = {"max_memory": size(max_memory, "--max-memory"), "max_kl": max_kl}
    most |= {"max_ttft": seconds(max_ttft, "--max-ttft"), "max_tpot": seconds(max_tpot, "--max-tpot")}
    job_seconds, job_memory = seconds(time_limit, "--time-limit"), size(memory_limit, "--memory-limit")
    from lowbit.tuning import summary
    from lowbit.tuning import tune as run
    from lowbit.tuning.candidates import make_candidates
    from lowbit.tuning.isolate import JobLimits

    candidates = None
    if methods or schemes or group_sizes or mixed:
        candidates = make_candidates(
            words(methods),
            words(schemes),
            numbers(group_sizes, "--group-sizes") if group_sizes else (),
            reals(mixed, "--mixed") if mixed else (),
        )
    document = run(
        model,
        output,
        text,
        calibration=calibration,
        candidates=candidates,
        job_limits=JobLimits(job_seconds or JobLimits.seconds, job_memory),
        task=task,  # type: ignore[arg-type]
        catalog=catalog,
        repeats=repeats,
        exhaustive=exhaustive,
        seed=seed,
        resume=resume,
        force=force,
        max_ppl_increase=limit,
        optimize=optimize,
        **most,
    )
    finish("tune", document, json, summary(document), seed)
    if document["recommendation"]["name"] is None:
        raise QualityGateError(document["recommendation"]["reasons"][1])
