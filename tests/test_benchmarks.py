"""The benchmarks' own code: what the documentation shows is what the results say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.scheme import Scheme

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/ as a module; scripts import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("compare_gptq", None)
    return module


def test_the_methods_table_is_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = script("methods_table", monkeypatch)
    text = methods.DOCS.read_text()
    assert text.split(methods.BEGIN)[1].split(methods.END)[0] == methods.table(methods.read_rows())


def test_every_row_of_the_methods_table_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = script("methods_table", monkeypatch).every_case()
    assert len(cases) == len(set(cases)) > 40
    for _, scheme, method, settings in cases:
        Scheme.parse(scheme)
        settings_of(parse_method(method), dict(pair.split("=") for pair in settings.split(",") if pair))


def test_the_ratio_of_two_kls_is_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = script("compare_peers", monkeypatch).kl_ratio
    rng = np.random.default_rng(0)
    common = rng.lognormal(0, 1, 300)  # windows differ by far more than the two sides of one window do
    own, other = common * 0.9 * rng.lognormal(0, 0.05, 300), common
    found = ratio(own, other)
    assert found["low"] < found["estimate"] < found["high"] < 0.95
    shuffled = ratio(rng.permutation(own), other)
    assert shuffled["high"] > 1, "not paired, the same difference drowns in the noise"
