"""Results that are written as they are measured: an interrupted script goes on where it was."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def known(file: Path, settings: dict[str, Any], *, any_commit: bool = False) -> dict[str, Any]:
    """What an earlier run with the same settings has left unfinished, else nothing. Times of two commits are not mixed;
    accuracy may be, with `any_commit`."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = found.get("settings") == json.loads(json.dumps(settings))
    same = same and (any_commit or found.get("commit") == commit())
    return found if same and not found.get("finished") else {}


def save(file: Path, settings: dict[str, Any], found: dict[str, Any], *, finished: bool) -> dict[str, Any]:
    """Write what is measured so far, with machine, commit and date."""
    document = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "commit": commit(),
        "settings": settings, "finished": finished, **found,
    }  # fmt: skip
    part = file.with_suffix(".partial")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    part.rename(file)
    return document


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()
