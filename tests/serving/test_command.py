"""`lowbit serve` as a user runs it: a process, its address, its report in a browser, Ctrl-C."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lowbit.errors import InputError
from lowbit.report.catalog import read_catalog
from lowbit.serving.tuned import recommended

CHROMIUM = Path("/usr/bin/chromium")
Started = tuple[subprocess.Popen[str], str]


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Starts the command; gives the process and its address once it listens."""
    processes: list[subprocess.Popen[str]] = []

    def run(*words: str, key: str | None = None) -> Started:
        environment = {k: v for k, v in os.environ.items() if k != "LOWBIT_API_KEY"}
        environment |= {} if key is None else {"LOWBIT_API_KEY": key}
        command = [sys.executable, "-m", "lowbit", "serve", *words, "--port", "0"]
        made = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        processes.append(made)
        assert made.stderr is not None
        line = ""
        while ": http://" not in line:
            line = made.stderr.readline()
            assert line, f"ended with {made.wait()}"
        return made, line.split(": ", 1)[1].split("/v1")[0]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def tuned(path: Path, model: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A directory as `lowbit tune` leaves it, which recommends a model that works."""
    shutil.copytree(model, path / "candidates/w4")
    document = {
        "model": str(model),
        "catalog": read_catalog(),
        "grid": rows or [],
        "peak_bandwidth_bytes_per_s": 5e10,
        "original": {"name": "original", "bench": (rows or [None])[0], "noise_floor": {"kl": 1e-5}},
        "candidates": [{"name": "w4", "path": "out/candidates/w4", "bench": None, "verdict": "ok", "error": None}],
        "recommendation": {"name": "w4", "reasons": []},
    }
    (path / "tune.json").write_text(json.dumps(document))
    return path


def measured(model: str) -> list[dict[str, Any]]:
    """What tune's grid says of a machine on which a token takes 10 ms and reads 1 ms more for each thousand before."""
    return [
        {
            "model": model, "weight_bytes": 1e9, "peak_memory_bytes": 1.5e9, "kv_bytes_per_context_token": 1e5,
            "scenario": {"prompt_length": prompt, "output_length": output, "batch_size": batch},
            "ttft_s": {"median": 1e-4 * prompt * batch}, "tpot_s": {"median": 0.01 + 1e-6 * prompt * batch},
            "runs": {"ttft_s": [1e-4 * prompt * batch] * 4, "tpot_s": [0.01 + 1e-6 * prompt * batch] * 4},
        }
        for prompt, output, batch in ((32, 16, 1), (512, 16, 1), (32, 16, 4), (512, 16, 4), (128, 64, 2), (256, 32, 8))
    ]  # fmt: skip


def test_a_model_answers_until_ctrl_c(start: Callable[..., Started], tiny: Path) -> None:
    process, address = start(str(tiny))
    asked = {"model": "tiny", "prompt": "def", "max_tokens": 3}
    assert httpx2.post(f"{address}/v1/completions", json=asked).json()["usage"]["completion_tokens"] == 3
    assert httpx2.get(f"{address}/").status_code == 404  # no report
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")


def test_the_documentation_shows_what_is_said(start: Callable[..., Started]) -> None:
    """The request of docs/serving.md gets the shown answer: the same fields, and the same text where it is greedy."""
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    asked = json.loads(text.split("-d '")[1].split("'")[0])
    shown = json.loads(next(line for line in text.splitlines() if line.startswith('{"id"')))
    _, address = start("demo")
    said = httpx2.post(f"{address}/v1/completions", json=asked).json()
    assert [*said, *said["choices"][0]] == [*shown, *shown["choices"][0]]
    for key in ("object", "model", "choices", "usage"):
        assert said[key] == shown[key]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo", "--host", "0.0.0.0"], "set an API key first"),
        (["demo", "--host", "no.such.host.invalid"], "API key"),
        (["/nonexistent"], "nonexistent"),
        (["demo", "--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
    ],
)
def test_what_cannot_be_served_is_an_error_of_the_users(words: list[str], says: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(taken.getsockname()[1]) if w == "TAKEN" else w for w in words]
        command = [sys.executable, "-m", "lowbit", "serve", *words]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert says in run.stderr
    assert "Traceback" not in run.stderr


def test_an_open_address_wants_the_key(start: Callable[..., Started], tiny: Path) -> None:
    _, address = start(str(tiny), "--host", "0.0.0.0", "--name", "small", key="s3cret")
    address = address.replace("0.0.0.0", "127.0.0.1")
    assert httpx2.get(f"{address}/v1/models").status_code == 401
    answer = httpx2.get(f"{address}/v1/models", headers={"Authorization": "Bearer s3cret"})
    assert answer.json()["data"][0]["id"] == "small"


def test_which_model_of_a_tuning_is_served(tmp_path: Path, tiny: Path) -> None:
    directory = tuned(tmp_path / "out", tiny)
    assert recommended(directory) == str(directory / "candidates/w4")
    document = json.loads((directory / "tune.json").read_text())

    def recommending(name: Any) -> str:
        (directory / "tune.json").write_text(json.dumps(document | {"recommendation": {"name": name}}))
        return recommended(directory)

    assert recommending("original") == str(tiny)
    for name, says in (
        (None, "recommended no model"),
        ("gone", "not there any more"),
        ("../candidates/w4", "not there"),
    ):
        with pytest.raises(InputError, match=says):
            recommending(name)
    (directory / "tune.json").write_text("[")
    with pytest.raises(InputError, match="not readable as JSON"):
        recommended(directory)


@pytest.mark.browser
def test_what_a_reader_chooses_is_kept(start: Callable[..., Started], tiny: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium: apt-get install chromium")
    directory = tuned(tmp_path / "out", tiny, measured(str(tiny)))
    document = json.loads((directory / "tune.json").read_text())
    document["original"]["name"] = str(tiny)
    (directory / "tune.json").write_text(json.dumps(document))
    _, address = start(str(directory))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--headless", "--no-sandbox"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(address)
        page.select_option("[name=compare]", "OpenAI gpt-4o")
        page.get_by_text("Kept on this server: 1 selection of yours.").wait_for()
        page.fill("[name=requests_per_day]", "777")
        page.locator("[name=requests_per_day]").blur()
        page.get_by_text("Kept on this server: 2 selections of yours.").wait_for()
        shown = json.loads(page.inner_text("#whatif-export code"))
        assert complaints == []
        browser.close()
    kept = httpx2.get(f"{address}/selections").json()["selections"]
    assert [k["user_selections"]["compare"] for k in kept] == ["OpenAI gpt-4o"] * 2
    assert kept[-1]["user_selections"]["requests_per_day"] == 777
    for key in ("calculated_monthly_cost", "comparison_delta"):
        assert kept[-1][key] == shown[key]
    assert len((directory / "selections.jsonl").read_text().splitlines()) == 2
