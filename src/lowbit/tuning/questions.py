"""Tasks in `tune`: the same questions to the original and to every candidate, and whether fewer answers are right.

Both answered the same questions, so only those count that just one of them got right: McNemar's exact test
(intervals.py). A drop is outside the noise where that test would call it so in fewer than one of twenty models that are
just as good. Of a task with several metrics the first with right or wrong answers counts.
"""

from collections.abc import Sequence
from typing import Any

from lowbit.accuracy.tasks import check_tasks
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.tuning.decide import measured
from lowbit.tuning.limits import Limits
from lowbit.tuning.run import Job, Notebook, remembered, together

__all__ = ["check_tasks", "drops", "measure_tasks"]

SIGNIFICANT = 0.05


def measure_tasks(job: Job, rows: list[dict[str, Any]], limits: Limits, notebook: Notebook) -> dict[str, Any] | None:
    """The original's {task: {metrics, n, ...}}; rows get `evaluate.tasks` (with every sample) and `task_drops`."""
    if not limits.tasks or not measured(rows):
        return None

    def ask(left: list[dict[str, Any]]) -> dict[str, Any]:
        request = {
            "job": "tasks", "models": [c["path"] for c in left], "tasks": list(limits.tasks), "against": job.model,
            "limit": limits.task_limit, "seed": job.words["seed"],
        }  # fmt: skip
        return remembered(job, request, left, notebook)

    found = together(rows, ask, "the tasks")
    if not found:
        return None
    answers = {r["model"]: r["tasks"] for r in found["results"]}
    for c in measured(rows):
        c["evaluate"] = c["evaluate"] | {"tasks": answers[c["path"]]}
        against = found["reference"]["model"]
        pairs = [p for p in found["task_comparisons"] if (p["model"], p["against"]) == (c["path"], against)]
        c["task_drops"] = drops(pairs, answers[c["path"]], limits.tasks)
        note(f"{c['name']}: " + "; ".join(d["words"] for d in c["task_drops"]))
    tasks: dict[str, Any] = found["reference"]["tasks"]
    return tasks


def drops(pairs: Sequence[dict[str, Any]], answers: dict[str, Any], asked: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One entry a task: {task, metric, n, drop, low, high, mcnemar, outside_noise, words}, from the comparisons of one
    candidate with the original. Raises InputError for a task without right or wrong answers."""
    found = []
    for task, own in answers.items():
        pair = next((p for p in pairs if p["task"] == task and p["mcnemar"] is not None), None)
        if pair is None:
            raise InputError(
                f"--tasks {','.join(asked)}: {task} has no metric of right or wrong answers, one for each question, "
                f"such as acc or exact_match (it has {', '.join(own['metrics']) or 'none'}), so no paired test."
            )
        found.append(_drop(pair, own["n"]))
    return found


def _drop(pair: dict[str, Any], n: int) -> dict[str, Any]:
    test, change = pair["mcnemar"], pair["difference"]
    drop = -float(change["estimate"])
    words = (
        f"{pair['task']} {pair['metric']} {-100 * drop:+.2f} points of {n} questions: {test['only_own']} right only "
        f"here, {test['only_other']} only in the original, McNemar p = {test['p_value']:.2g}"
    )
    return {
        "task": pair["task"], "metric": pair["metric"], "n": n, "drop": drop, "low": -float(change["high"]),
        "high": -float(change["low"]), "mcnemar": test, "outside_noise": drop > 0 and test["p_value"] < SIGNIFICANT,
        "words": words,
    }  # fmt: skip
