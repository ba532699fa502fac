"""Tasks: the harness' own backend gives the same answers, and two models are compared question by question."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lowbit.accuracy import evaluate
from lowbit.accuracy.task_files import task_spec
from lowbit.accuracy.tasks import compare
from lowbit.cli.measure import task_table
from lowbit.errors import InputError
from lowbit.model.checkpoint import DEMO
from lowbit.pipeline import quantize
from lowbit.runtime.engine import load
from lowbit.serving.app import Service
from lowbit.serving.worker import Worker

HARNESS = "needs lm-eval: pip install 'lowbit[tasks]'"
CHOICE = """
task: next_line
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: write_line
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{before}}"
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: whole_text
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{before}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three task files about the demo's text: which line comes next, write it, how likely is it all."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (DEMO / "evaluation.txt").read_text(encoding="utf-8").split("\n")
    draw, rows = random.Random(0), []
    for at in range(50, 50 + 17 * 10, 17):
        choices = [lines[at + 6], *(draw.choice([x for x in lines if x.strip()]) for _ in range(2))]
        draw.shuffle(choices)
        rows.append({"before": "\n".join(lines[at : at + 6]) + "\n", "choices": choices,
                     "right": choices.index(lines[at + 6])})  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["choices"][r["right"]].strip()))
    for name, text in (("next", CHOICE), ("write", WRITING), ("whole", ROLLING)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network: what needs the hub fails."""
    pytest.importorskip("lm_eval", reason=HARNESS)
    import datasets

    for word in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(word, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.model
@pytest.mark.interop
@pytest.mark.usefixtures("offline")
def test_the_harness_own_backend_agrees(tasks: Path) -> None:
    """Likelihoods of every choice, accuracy, texts written and rolling perplexity, demo model in float32."""
    import lm_eval

    names = [str(tasks / f"{n}.yaml") for n in ("next", "write", "whole")]
    document = evaluate(["demo"], against="demo", runtime="float32", tasks=names)
    own = document["results"][0]["tasks"]
    specs = [task_spec(n) for n in names]
    path = str(DEMO / "model")
    theirs = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": path, "dtype": "float32", "device": "cpu"}, tasks=specs, bootstrap_iters=0
    )
    for task in ("next_line", "write_line", "whole_text"):
        rows = sorted(theirs["samples"][task], key=lambda r: r["doc_id"])
        assert len(rows) == len(own[task]["samples"]) >= 8
        for mine, row in zip(own[task]["samples"], rows, strict=True):
            expected = row["filtered_resps"]
            if task == "write_line":
                assert mine["responses"] == expected
            elif task == "next_line":
                assert [c[0] for c in mine["responses"]] == pytest.approx([c[0] for c in expected], abs=1e-3)
                assert [c[1] for c in mine["responses"]] == [c[1] for c in expected]
            else:
                assert mine["responses"] == pytest.approx(expected, rel=1e-5)
    for task, metrics in (("next_line", ("acc", "acc_norm")), ("write_line", ("exact_match",))):
        for metric in metrics:
            assert own[task]["metrics"][metric]["value"] == pytest.approx(theirs["results"][task][f"{metric},none"])
    word = own["whole_text"]["metrics"]["word_perplexity"]["value"]
    assert word == pytest.approx(theirs["results"]["whole_text"]["word_perplexity,none"], rel=1e-4)
    assert own["next_line"]["metrics"]["acc"]["stderr"] is not None
    assert "next_line" in task_table(document)


@pytest.fixture
def server(serve: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    """The demo model behind `lowbit serve`."""
    worker = Worker(load("demo", "float32"))
    with serve(Service(worker, "served")) as url:
        yield url
    worker.stop()


@pytest.mark.model
@pytest.mark.interop
@pytest.mark.usefixtures("offline")
def test_a_server_gives_what_the_same_model_gives_here(tasks: Path, server: str) -> None:
    names = [str(tasks / f"{n}.yaml") for n in ("next", "write", "whole")]
    document = evaluate([server], against="demo", tasks=names, limit=4)
    here, there = document["reference"]["tasks"], document["results"][0]["tasks"]
    assert document["results"][0]["perplexity"] is None
    for mine, other in zip(here["next_line"]["samples"], there["next_line"]["samples"], strict=True):
        assert [r[0] for r in mine["responses"]] == pytest.approx([r[0] for r in other["responses"]], abs=1e-3)
    assert [s["responses"] for s in here["write_line"]["samples"]] == [
        s["responses"] for s in there["write_line"]["samples"]
    ]
    words = [m["whole_text"]["metrics"]["word_perplexity"]["value"] for m in (here, there)]
    assert words[0] == pytest.approx(words[1], rel=1e-5)
    for c in document["task_comparisons"]:
        assert c["difference"]["estimate"] == 0
        assert c["mcnemar"]["p_value"] == 1


def test_models_are_compared_question_by_question() -> None:
    """20 disagreements, 16 of them for one side: significant, although the accuracies' own errors overlap."""
    rng = np.random.default_rng(0)
    both = rng.integers(0, 2, 180).tolist()

    def samples(scores: list[int]) -> list[dict[str, Any]]:
        return [{"doc_hash": str(i), "scores": {"acc": float(s), "f1": s / 3}} for i, s in enumerate(scores)]

    a, b = samples(both + [1] * 16 + [0] * 4), samples(both + [0] * 16 + [1] * 4)
    found = compare(a, b, "acc")
    assert found["difference"]["estimate"] == pytest.approx(12 / 200)
    assert found["difference"]["low"] > 0
    assert found["mcnemar"] == {"only_own": 16, "only_other": 4, "p_value": stats.binomtest(16, 20).pvalue}
    assert compare(a, b, "f1")["mcnemar"] is None
    with pytest.raises(ValueError, match="same questions"):
        compare(a, b[::-1], "acc")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [", "not YAML"),
        ("- a\n- b", "needs 'task: NAME'"),
        ("task: x\ndataset_kwargs: {data_files: none.jsonl}", "there is no data file"),
        ("task: x\ndoc_to_text: !function evil.run", r"runs Python code .* --trust-remote-code"),
    ],
)
def test_a_task_file_that_makes_no_sense_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        task_spec(str(tmp_path / "t.yaml"))


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        task_spec(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="say which model it serves with --against"):
        evaluate(["http://127.0.0.1:9"], tasks=["x"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'lowbit\[tasks\]'"):
        evaluate(["demo"], tasks=["x"])


@pytest.mark.usefixtures("offline")
def test_with_a_text_both_are_measured(tasks: Path, tiny: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny, out, scheme="w8a8", method="rtn")
    names = [str(tasks / "next.yaml")]
    document = evaluate([out], text_file, against=tiny, seq_len=64, windows=2, tasks=names, limit=3)
    assert document["results"][0]["perplexity"] > 1
    assert document["results"][0]["tasks"]["next_line"]["n"] == 3
    assert document["reference"]["tasks"]["next_line"]["n"] == 3
    assert {c["against"] for c in document["task_comparisons"]} == {document["reference"]["model"]}
    kept = json.loads((out / "evaluate.json").read_text())["results"][0]
    assert len(kept["tasks"]["next_line"]["samples"]) == 3
    assert "McNemar" in task_table(document)


@pytest.mark.usefixtures("offline")
def test_what_the_harness_refuses_is_said(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the harness has no such task.*Did you mean hellaswag"):
        evaluate(["demo"], tasks=["helaswag"])
    with pytest.raises(InputError, match="at least 1 sample"):
        evaluate(["demo"], tasks=[str(tasks / "next.yaml")], limit=0)
    with pytest.raises(InputError, match=r"cannot be reached"):
        evaluate(["http://127.0.0.1:9"], against="demo", tasks=[str(tasks / "next.yaml")], limit=1)
    for name in ("next.yaml", "lines.jsonl"):
        shutil.copy(tasks / name, tmp_path / name)
    (tmp_path / "lines.jsonl").write_text('{"before": ')
    with pytest.raises(InputError, match="the tasks cannot be run"):
        evaluate(["demo"], tasks=[str(tmp_path / "next.yaml")])
