"""lowbit tune"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Quiet, Seed, Verbose, begin, finish, numbers, percent, reals, seconds, size, words
from lowbit.errors import InputError, QualityGateError, nearest

_TASKS = ("chat", "code", "math")

# what is tried
Methods = Annotated[str | None, typer.Option(metavar="M,...", help="Methods to try (default: gptq).")]
Schemes = Annotated[str | None, typer.Option(metavar="S,...", help="Schemes to try.")]
GroupSizes = Annotated[str | None, typer.Option(metavar="N,...", help="Group sizes to try.")]
Mixed = Annotated[str | None, typer.Option(metavar="BITS,...", help="Mixed precision to try, in bits.")]
# what can be given up
Increase = Annotated[str, typer.Option(metavar="1%", help="The accuracy you can give up.")]
MaxKl = Annotated[float | None, typer.Option(help="The KL divergence you can accept.", min=0)]
Tasks = Annotated[
    str | None, typer.Option(metavar="FILE,...", help="Questions for all models: YAML files, or tasks of lm-eval.")
]
TaskLimit = Annotated[int | None, typer.Option(help="Of each task only so many questions.", min=1)]
TaskDrop = Annotated[
    str | None,
    typer.Option(metavar="2%", help="Right answers you can give up (default: what the paired test does not see)."),
]
MaxMemory = Annotated[str | None, typer.Option(metavar="4GB", help="Peak memory of the running model.")]
MaxTtft = Annotated[str | None, typer.Option(metavar="200ms", help="Time to the first token.")]
MaxTpot = Annotated[str | None, typer.Option(metavar="20ms", help="Time per token.")]
MinThroughput = Annotated[float | None, typer.Option(help="Tokens a second, at --concurrency.", min=0)]
MaxCost = Annotated[
    float | None, typer.Option(metavar="USD", help="US$ per million generated tokens, at --concurrency.", min=0)
]
Concurrency = Annotated[int, typer.Option(help="Sequences at once, for throughput and cost.", min=1)]
Hardware = Annotated[str, typer.Option(metavar="NAME", help="What this machine is in the catalog's prices per hour.")]
Optimize = Annotated[
    str, typer.Option(help="tpot, ttft, throughput, memory, cost; or within limits on those perplexity, kl or tasks.")
]


def tune(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for candidates and report.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Your own text, .txt or .jsonl.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Calibrate on this instead of a part of --text.")
    ] = None,
    methods: Methods = None,
    schemes: Schemes = None,
    group_sizes: GroupSizes = None,
    mixed: Mixed = None,
    max_ppl_increase: Increase = "1%",
    max_kl: MaxKl = None,
    tasks: Tasks = None,
    task_limit: TaskLimit = None,
    max_task_drop: TaskDrop = None,
    max_memory: MaxMemory = None,
    max_ttft: MaxTtft = None,
    max_tpot: MaxTpot = None,
    min_throughput: MinThroughput = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 1,
    hardware: Hardware = "this machine",
    optimize: Optimize = "tpot",
    task: Annotated[str | None, typer.Option(help="What the model is for: chat, code or math.")] = None,
    catalog: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prices, in the form of model-catalog.json.")
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
    limits: dict[str, Any] = {
        "max_ppl_increase": percent(max_ppl_increase, "--max-ppl-increase"), "max_kl": max_kl,
        "tasks": tuple(words(tasks)), "task_limit": task_limit,
        "max_task_drop": percent(max_task_drop, "--max-task-drop"), "max_memory": size(max_memory, "--max-memory"),
        "max_ttft": seconds(max_ttft, "--max-ttft"), "max_tpot": seconds(max_tpot, "--max-tpot"),
        "min_throughput": min_throughput, "max_cost": max_cost, "concurrency": concurrency, "hardware": hardware,
        "optimize": optimize,
    }  # fmt: skip
    job_limits = seconds(time_limit, "--time-limit"), size(memory_limit, "--memory-limit")
    tried = _candidates(methods, schemes, group_sizes, mixed)
    from lowbit.tuning import summary
    from lowbit.tuning import tune as run
    from lowbit.tuning.isolate import JobLimits

    document = run(
        model, output, text, calibration=calibration, candidates=tried,
        job_limits=JobLimits(job_limits[0] or JobLimits.seconds, job_limits[1]), task=task,  # type: ignore[arg-type]
        catalog=catalog, repeats=repeats, exhaustive=exhaustive, seed=seed, resume=resume, force=force, **limits,
    )  # fmt: skip
    finish("tune", document, json, summary(document), seed)
    if document["recommendation"]["name"] is None:
        raise QualityGateError(document["recommendation"]["reasons"][1])


def _candidates(methods: str | None, schemes: str | None, group_sizes: str | None, mixed: str | None) -> Any:
    """What the user wants tried, or None for the defaults."""
    if not (methods or schemes or group_sizes or mixed):
        return None
    from lowbit.tuning.candidates import make_candidates

    sizes = numbers(group_sizes, "--group-sizes") if group_sizes else ()
    return make_candidates(words(methods), words(schemes), sizes, reals(mixed, "--mixed") if mixed else ())
