"""bench: what is counted, and that broken models are named."""

from pathlib import Path

import pytest

import lowbit.speed as bench_module
from lowbit.errors import InputError, LowbitError
from lowbit.pipeline import quantize
from lowbit.speed import Scenario, Worker, bench
from lowbit.speed.bandwidth import measure_bandwidth


def test_document_is_consistent_with_its_definitions(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="w8a8", method="rtn")
    document = bench(
        [tmp_path / "q"], against=tiny, prompt_lengths=[8, 16], output_lengths=[4], batch_sizes=[2], repeats=2
    )
    assert len(document["results"]) == 4
    for r in document["results"]:
        tokens = r["scenario"]["output_length"]
        for ttft, tpot, end in zip(*(r["runs"][k] for k in ("ttft_s", "tpot_s", "e2e_s")), strict=True):
            assert end == pytest.approx(ttft + tpot * (tokens - 1), rel=1e-6)
        assert len(r["runs"]["e2e_s"]) == 2
        assert r["throughput_tokens_per_s"] == pytest.approx(2 * tokens / r["e2e_s"]["median"])
        assert 0 < r["mbu"] < 1
        assert r["peak_memory_bytes"] > r["weight_bytes"]
        assert r["ttft_s"]["p99"] is None
    assert {q["model"] for q in document["ratios"]} == {str(tmp_path / "q")}
    assert (tmp_path / "q" / "bench.json").exists()


def test_ratio_is_the_median_of_pairs_and_above_one_is_better() -> None:
    def row(model: str, times: list[float], memory: int) -> dict[str, object]:
        runs = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), times)
        return {"model": model, "scenario": vars(scenario), "runs": runs, "peak_memory_bytes": memory}

    scenario = Scenario(8, 4, 1)
    rows = [row("slow", [2.0, 4.0, 2.0], 200), row("fast", [1.0, 1.0, 1.0], 100)]
    (ratio,) = bench_module._ratios(rows, "slow", [scenario])
    assert (ratio["tpot"], ratio["memory"]) == (2.0, 2.0)
    assert ratio["intervals"]["tpot"] == {"estimate": 2.0, "low": 2.0, "high": 4.0, "confidence": pytest.approx(0.75)}


def test_runs_alternate_and_the_first_round_is_dropped() -> None:
    order: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, model: str) -> None:
            self.model = model

        def ask(self, request: dict[str, int]) -> dict[str, float]:
            order.append((self.model, request["seed"]))
            return {"seed": request["seed"]}

    runs = bench_module._alternate([Fake("a"), Fake("b")], [Scenario(8, 4, 1)], 2, seed=7)  # type: ignore[list-item]
    assert order == [("a", 7), ("b", 7), ("a", 8), ("b", 8), ("a", 9), ("b", 9)]
    assert [r["seed"] for r in runs["a", Scenario(8, 4, 1)]] == [8, 9]


def test_bandwidth_is_that_of_memory_not_of_nothing() -> None:
    assert 5e8 < measure_bandwidth(repeats=2) < 5e12


def test_errors_name_model_and_reason(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        bench([tmp_path / "none"])
    with pytest.raises(InputError, match="output length must be at least 2"):
        bench([tiny], output_lengths=[1])
    with pytest.raises(InputError, match="exceed the model's context of 256"):
        bench([tiny], prompt_lengths=[250], output_lengths=[20], repeats=1)


def test_a_worker_that_dies_is_reported(tiny: Path) -> None:
    with Worker(str(tiny), "auto") as worker:
        worker._process.kill()
        with pytest.raises(LowbitError, match="was killed, most likely for want of memory"):
            worker.ask({"prompt_length": 1})


def test_rounds_go_on_until_the_interval_is_narrow_or_the_limit_is_reached() -> None:
    class Fake:
        def __init__(self, model: str, spread: float) -> None:
            self.model, self.spread, self.asked = model, spread, 0

        def ask(self, _request: dict[str, int]) -> dict[str, float]:
            self.asked += 1
            return {"tpot_s": 1 + (self.spread if self.asked % 2 else 0)}

    steady, wild = [Fake("a", 0), Fake("b", 0.001)], [Fake("a", 0), Fake("b", 0.5)]
    scenario = Scenario(8, 4, 1)
    for workers, rounds in ((steady, 6), (wild, 15)):  # five values cannot reach 95 %, so a sixth round is played
        runs = bench_module._alternate(workers, [scenario], 5, seed=0, precision=0.02)  # type: ignore[arg-type]
        assert len(runs["b", scenario]) == rounds
