"""Costs by hand, a roofline that recovers the machine it was drawn from, and a page that computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.report import write_report
from lowbit.report.catalog import read_catalog
from lowbit.report.cost import Traffic, break_even_requests_per_day, hosted_cost, own_cost
from lowbit.report.roofline import fit
from lowbit.report.whatif import whatif_data
from lowbit.tuning.run import grid

CHROMIUM = Path("/usr/bin/chromium")
WEIGHTS, KV, BANDWIDTH, RATE = 1e9, 1e5, 5e10, 2e11  # bytes, bytes a token, bytes/s, weights/s


def row(model: str, prompt: int, output: int, batch: int, noise: float = 1.0, overhead: float = 2e-3) -> dict[str, Any]:
    """A bench row of a machine that follows the roofline exactly: attention reads the cache, or multiplies with it."""
    read = WEIGHTS + batch * KV * (prompt + output / 2)
    pairs = batch * prompt**2 / 2
    ttft = noise * (overhead + WEIGHTS / BANDWIDTH + batch * prompt * WEIGHTS / RATE + pairs * 1e-7)
    tpot = noise * (overhead + read / BANDWIDTH + batch * WEIGHTS / RATE)
    return {
        "model": model,
        "scenario": {"prompt_length": prompt, "output_length": output, "batch_size": batch},
        "ttft_s": {"median": ttft},
        "tpot_s": {"median": tpot},
        "runs": {"ttft_s": [ttft] * 4, "tpot_s": [tpot] * 4},
        "weight_bytes": WEIGHTS,
        "peak_memory_bytes": 1.5e9,
        "kv_bytes_per_context_token": KV,
    }


GRID = [(s.prompt_length, s.output_length, s.batch_size) for s in grid(2048)]


def test_roofline_predicts_sizes_it_has_not_seen() -> None:
    roofline = fit([row("m", *s) for s in GRID], [row("m", 128, 64, 1)], KV)
    assert roofline.error["tpot"] == pytest.approx(0, abs=1e-6)
    assert roofline.error["ttft"] == pytest.approx(0, abs=1e-6)
    for shape in ((1024, 256, 1), (64, 32, 16)):
        expected = row("m", *shape)
        ttft, tpot = roofline.predict(*shape)
        assert ttft == pytest.approx(expected["ttft_s"]["median"], rel=1e-6)
        assert tpot == pytest.approx(expected["tpot_s"]["median"], rel=1e-3)


def test_held_out_error_is_that_of_the_held_out_rows() -> None:
    """Timings 10 % off on the held-out scenario are an error of about 10 %, and noise in the fit shows."""
    rng = np.random.default_rng(0)
    rows = [row("m", *s, noise=float(rng.uniform(0.95, 1.05))) for s in GRID]
    error = fit(rows, [row("m", 128, 64, 1, noise=1.1)], KV).error
    assert error["tpot"] is not None
    assert 0.02 < error["tpot"] < 0.2
    assert all(v >= 0 for line in (fit(rows, [], KV).ttft, fit(rows, [], KV).tpot) for v in vars(line).values())


def test_rounds_on_a_busy_machine_bend_no_prediction() -> None:
    """From the middle of the fourth of seven rounds on everything takes three times as long, as if another job had
    begun: half of the scenarios have a median of slow rounds. All predictions are then late by the same factor."""
    rows = [row("m", *s) for s in GRID]
    for n, r in enumerate(rows):
        r["runs"] = {k: [v[0]] * 3 + [v[0] * (3 if n > 3 else 1)] + [v[0] * 3] * 3 for k, v in r["runs"].items()}
    late = []
    for shape in ((128, 32, 2), (384, 64, 1), (64, 48, 3)):
        expected = row("m", *shape)
        predicted = fit(rows, [], KV).predict(*shape)
        late += [p / expected[k]["median"] for p, k in zip(predicted, ("ttft_s", "tpot_s"), strict=True)]
    assert max(late) / min(late) == pytest.approx(1, abs=0.01)
    assert 1 <= min(late) <= 3


def test_costs_by_hand() -> None:
    traffic = Traffic(prompt=1000, output=101, batch=2, requests_per_day=86400 * 3, utilization=0.5)
    cost = own_cost(ttft=0.5, tpot=0.005, usd_per_hour=2.0, traffic=traffic)  # 1 s a request: 1 request/s a machine
    assert cost["machines"] == 3
    assert cost["per_month"] == pytest.approx(3 * 2 * 730)
    assert cost["per_million_output_tokens"] == pytest.approx(2 / 3600 / 101 * 1e6)
    hosted = hosted_cost(3.0, 15.0, traffic)
    assert hosted["per_request"] == pytest.approx(0.003 + 0.001515)
    assert hosted["per_month"] == pytest.approx(hosted["per_request"] * 86400 * 3 * 730 / 24)
    needed = break_even_requests_per_day(0.5, 0.005, 2.0, hosted["per_request"], traffic)
    assert needed == pytest.approx(48 / hosted["per_request"])
    at_that = Traffic(1000, 101, 2, needed or 0, 0.5)
    assert own_cost(0.5, 0.005, 2.0, at_that)["per_month"] == pytest.approx(
        hosted_cost(3.0, 15.0, at_that)["per_month"]
    )
    assert break_even_requests_per_day(0.5, 0.005, 2.0, 1e-9, traffic) is None


def test_the_catalog_has_its_models_and_takes_the_users(tmp_path: Path) -> None:
    built_in = read_catalog()
    sonnet = next(m for m in built_in["models"] if m["model"] == "claude-3-5-sonnet")
    assert (sonnet["input_per_million"], sonnet["output_per_million"], sonnet["context"]) == (3, 15, 200_000)
    own = tmp_path / "catalog.json"
    own.write_text(
        json.dumps({"models": [sonnet | {"input_per_million": 2.5}], "hardware": [{"name": "mine", "usd_per_hour": 1}]})
    )
    merged = read_catalog(own)
    assert len(merged["models"]) == len(built_in["models"])
    assert next(m for m in merged["models"] if m["model"] == "claude-3-5-sonnet")["input_per_million"] == 2.5
    assert merged["hardware"][-1]["name"] == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected"),
        ('{"modles": []}', "expected"),
        ('{"models": {}}', "must be a list"),
        ('{"models": [{"provider": "x", "model": "y", "input_per_million": "3", "output_per_million": 1}]}', "a price"),
        ('{"hardware": [{"name": "", "usd_per_hour": 1}]}', "must be a name"),
        ('{"hardware": [{"name": "x", "usd_per_hour": -1}]}', "a price"),
    ],
)
def test_a_catalog_that_makes_no_sense_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=says):
        read_catalog(tmp_path / "c.json")


@pytest.fixture
def document() -> dict[str, Any]:
    """A tune document with a grid: the original and one candidate that is twice as fast."""
    rows = [row("demo", *s) for s in GRID] + [row("out/w4", *s, noise=0.5) for s in GRID]
    return {
        "model": "demo",
        "grid": rows,
        "catalog": read_catalog(),
        "peak_bandwidth_bytes_per_s": 5e10,
        "original": {"name": "demo", "bench": row("demo", 128, 64, 1), "noise_floor": {"kl": 1e-5}},
        "candidates": [
            {"name": "w4-gptq", "path": "out/w4", "bench": row("out/w4", 128, 64, 1, noise=0.5), "verdict": "ok",
             "evaluate": {"perplexity_increase": 0.004, "kl": {"mean": 0.003}}, "error": None},
            {"name": "broken", "path": "out/w3", "error": "killed", "verdict": "failed: killed"},
        ],
        "recommendation": {"name": "w4-gptq", "reasons": []},
    }  # fmt: skip


def test_what_was_not_measured_is_no_choice(document: dict[str, Any]) -> None:
    data = whatif_data(document)
    assert data is not None
    assert [m["name"] for m in data["models"]] == ["original", "w4-gptq"]
    assert (data["defaults"]["model"], data["defaults"]["compare"]) == ("w4-gptq", "original")
    assert whatif_data({**document, "grid": []}) is None


@pytest.mark.browser
def test_the_page_computes_what_python_does_and_exports_it(document: dict[str, Any], tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium: apt-get install chromium")
    write_report(document, tmp_path / "report.html")
    traffic = Traffic(prompt=800, output=200, batch=8, requests_per_day=250_000, utilization=0.4)
    roofline = fit([row("out/w4", *s, noise=0.5) for s in GRID], [], KV)
    ttft, tpot = roofline.predict(traffic.prompt, traffic.output, traffic.batch)
    own, hosted = own_cost(ttft, tpot, 1.5, traffic), hosted_cost(5.0, 15.0, traffic)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto((tmp_path / "report.html").as_uri())
        page.select_option("[name=compare]", "OpenAI gpt-4o")
        for name, value in vars(traffic).items():
            page.fill(f"[name={name}]", str(value))
        page.fill("[name=usd_per_hour]", "1.5")
        with page.expect_download() as download:
            page.click("#whatif-export button")
        record = json.loads(Path(download.value.path()).read_text())
        assert record["user_selections"]["model"] == "w4-gptq"
        assert record["user_selections"]["requests_per_day"] == 250_000
        assert record["calculated_monthly_cost"]["choice"] == pytest.approx(own["per_month"])
        assert record["calculated_monthly_cost"]["compared_with"] == pytest.approx(hosted["per_month"])
        assert record["comparison_delta"]["per_month"] == pytest.approx(own["per_month"] - hosted["per_month"])
        page.select_option("[name=compare]", "original")
        other = json.loads(page.inner_text("#whatif-export code"))["comparison_delta"]
        assert other["tpot_s"] == pytest.approx(-tpot)  # half as long as the original's
        page.fill("[name=utilization]", "7")
        assert "no number in their range" in page.inner_text("#whatif-note")
        page.set_viewport_size({"width": 375, "height": 800})  # at once: the picture may not be redrawn yet
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert complaints == []
        browser.close()
