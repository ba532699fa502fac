"""From `--tasks` to the harness' specifications: names it knows, and the user's own YAML files with their data.

task: my_questions                  # a multiple-choice task; the harness' documentation has the other kinds
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}      # beside this file
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"         # the right choice's number
metric_list: [{metric: acc}]
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lowbit.errors import InputError

_FILES = (".yaml", ".yml")


def task_spec(name: str) -> str | dict[str, Any]:
    """A name as it is; a YAML file as the harness' configuration, its data files found beside it."""
    if not name.endswith(_FILES):
        return name
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--tasks {name}: cannot be read ({error.strerror}).") from error
    if "!function" in text and not os.environ.get("LOWBIT_TRUST_REMOTE_CODE"):
        raise InputError(f"--tasks {name}: runs Python code (!function). Read it, then allow it: --trust-remote-code.")
    if "!function" in text or "include:" in text:
        return str(path.resolve())  # the harness reads these itself; data files are then relative to where one stands
    try:
        words: dict[str, Any] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--tasks {name}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(words, dict) or not isinstance(words.get("task"), str):
        raise InputError(f"--tasks {name}: a task file needs 'task: NAME'.")
    files = (words.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        words["dataset_kwargs"] = {**words["dataset_kwargs"], "data_files": _beside(path, files)}
    return words


def _beside(path: Path, files: Any) -> Any:
    """Relative data files are the task file's neighbours, whatever directory the user stands in."""
    if isinstance(files, dict):
        return {k: _beside(path, v) for k, v in files.items()}
    if isinstance(files, list):
        return [_beside(path, v) for v in files]
    own = path.resolve().parent / str(files)
    if "://" in str(files) or any(c in str(files) for c in "*?["):
        return str(files) if "://" in str(files) else str(own)
    if not own.is_file():
        raise InputError(f"--tasks {path}: there is no data file {own}.")
    return str(own)


def task_manager(specs: Sequence[str | dict[str, Any]], tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    names = [s for s in specs if isinstance(s, str) and not s.endswith(_FILES)]
    manager = TaskManager(include_defaults=bool(names))
    known = manager.all_tasks
    for spec in names:
        if spec not in known:
            close = difflib.get_close_matches(spec, known, n=3, cutoff=0.5)  # it has thousands: all would be a book
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"--tasks {spec}: the harness has no such task.{hint} A task of your own is a .yaml file.")
    if len(set(tasks)) < len(tasks):
        raise InputError(f"--tasks {','.join(tasks)}: names a task twice.")
    return manager
