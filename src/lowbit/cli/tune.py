"""lowbit tune"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Json, Quiet, Seed, Verbose, begin, finish, percent, size


def tune(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for report and candidates.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Your own text: .txt or .jsonl.")] = None,
    max_ppl_increase: Annotated[str, typer.Option(metavar="1%", help="The accuracy you can give up.")] = "1%",
    max_memory: Annotated[str | None, typer.Option(metavar="4GB", help="Peak memory of the running model.")] = None,
    optimize: Annotated[str, typer.Option(help="tpot, ttft, throughput or memory.")] = "tpot",
    repeats: Annotated[int, typer.Option(help="Counted runs of each speed measurement.")] = 5,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize in several ways, measure each on your text and machine, and recommend one (or none)."""
    begin(quiet, verbose)
    limit = percent(max_ppl_increase, "--max-ppl-increase")
    memory = size(max_memory, "--max-memory")
    from lowbit.tuning import summary
    from lowbit.tuning import tune as run

    assert limit is not None
    document = run(
        model,
        output,
        text,
        max_ppl_increase=limit,
        max_memory=memory,
        optimize=optimize,
        repeats=repeats,
        seed=seed,
        force=force,
    )
    finish("tune", document, json, summary(document), seed)
