"""auto: schemes stay within the budget, one a group, and are a recipe that can be repeated."""

import json
from pathlib import Path

import pytest

from lowbit.accuracy import evaluate
from lowbit.errors import InputError
from lowbit.kernels import pack
from lowbit.recipe import Recipe, read_recipe
from lowbit.tuning.kernel_times import product_seconds
from lowbit.tuning.mixed import Budget, quantize

WORDS = {"method": "rtn", "samples": 16, "seq_len": 64}
CHOICES = "w2a16-g32,w3a16-g32,w4a16-g32,w8a16-g32"


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("auto:3.5", 3.5, "bits"), ("auto:20MB", 20e6, "bytes"), ("auto:1.5ms", 1.5e-3, "seconds"), ("auto:4", 4, "bits")],
)
def test_a_budget_is_a_number_and_a_unit(text: str, amount: float, unit: str) -> None:
    assert (Budget.parse(text).amount, Budget.parse(text).unit) == (pytest.approx(amount), unit)
    assert Budget.parse(f"{text}:w2a16,w4a16-g64").schemes == ("w2a16", "w4a16-g64")


@pytest.mark.parametrize(
    "text", ["auto:", "auto:x", "auto:3.5bits", "auto:3.5:", "auto:-1", "auto:3.5:w99a16", "auto:3:none"]
)
def test_a_budget_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Budget.parse(text)


def test_mixed_stays_within_its_bits_and_beats_the_uniform_scheme(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the average bits of uniform 3 bits, choosing where they go loses less."""
    words = WORDS | {"calibration": str(text_file)}
    document = quantize(tiny, tmp_path / "mixed", scheme=f"auto:3.5:{CHOICES}", sensitivity_by="direct", **words)
    quantize(tiny, tmp_path / "uniform", scheme="w3a16-g32", **words)  # 3 + 16/32 = 3.5 bits
    assert document["bits_per_weight"] <= 3.5
    scores = evaluate(
        [tmp_path / "mixed", tmp_path / "uniform"], text_file, against=tiny, seq_len=64, runtime="float32"
    )
    mixed, uniform = (r["kl"]["mean"] for r in scores["results"])
    assert mixed < uniform
    layers = {r["name"]: r["scheme"] for r in document["layers"]}
    assert len(set(layers.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({layers[f"{block}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert layers[f"{block}.mlp.gate_proj"] == layers[f"{block}.mlp.up_proj"]
    # the manifest is a recipe that makes the same again
    recipe = Recipe(**read_recipe(tmp_path / "mixed" / "lowbit.json"))
    assert {n: str(recipe.scheme_of(n)) for n in layers} == layers
    record = json.loads((tmp_path / "mixed" / "allocation.json").read_text())
    assert record["expected_kl"] == pytest.approx(record["bound"])
    # a finished run is resumed without choosing again, and without a difference
    monkeypatch.setattr("lowbit.tuning.mixed.choose", None)
    words["sensitivity_by"] = "direct"
    again = quantize(tiny, tmp_path / "mixed", scheme=f"auto:3.5:{CHOICES}", resume=True, **words)
    assert again["layers"] == document["layers"]
    assert again["allocation"] == document["allocation"]


@pytest.mark.model
def test_at_three_and_a_half_bits_the_demo_loses_half_of_what_it_does_uniformly(tmp_path: Path) -> None:
    """GPTQ: 3.5 bits where they matter against 3.125 bits everywhere, and against 3.5 bits everywhere."""
    words = {"method": "gptq", "samples": 16, "seq_len": 512}
    schemes = {"mixed": "auto:3.5", "g128": "w3a16-g128", "g32": "w3a16-g32"}
    made = {name: quantize("demo", tmp_path / name, scheme=scheme, **words) for name, scheme in schemes.items()}
    assert made["mixed"]["bits_per_weight"] <= 3.5 == made["g32"]["bits_per_weight"]
    document = evaluate([tmp_path / n for n in schemes], against="demo", seq_len=512, windows=16, runtime="float32")
    kl = {name: r["kl"]["mean"] for name, r in zip(schemes, document["results"], strict=True)}
    assert kl["mixed"] < 0.55 * kl["g128"]
    assert kl["mixed"] < 0.8 * kl["g32"]


def test_what_the_user_says_of_a_layer_stands(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    words = WORDS | {"calibration": str(text_file), "ignore": ("down_proj",), "override": (("o_proj", "w8a16-g32"),)}
    document = quantize(tiny, tmp_path / "out", scheme=f"auto:3:{CHOICES}", **words)
    layers = {r["name"]: r["scheme"] for r in document["layers"]}
    assert not any("down_proj" in n for n in layers)
    assert {s for n, s in layers.items() if "o_proj" in n} == {"w8a16-g32"}
    assert all("o_proj" not in n for g in document["allocation"]["groups"] for n in g["names"])


def test_a_budget_below_the_fewest_bits_is_refused(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    for scheme in (f"auto:2.1:{CHOICES}", "auto:1KB:w4a16-g32"):
        with pytest.raises(InputError, match="the budget cannot be met"):
            quantize(tiny, tmp_path / "out", scheme=scheme, **WORDS, calibration=str(text_file))
    with pytest.raises(InputError, match="divides every layer's shape"):
        quantize(tiny, tmp_path / "out", scheme="auto:3:w4a16-g128", **WORDS, calibration=str(text_file))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_budget_in_time_is_kept(
    share: float, tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernel times by the bits, a budget between the fastest and the slowest choice buys what lies between."""

    def seconds(shape: tuple[int, int], scheme: str) -> float:
        return 1e-9 * shape[0] * shape[1] * int(scheme[1])

    monkeypatch.setattr("lowbit.tuning.kernel_times.product_seconds", seconds)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    least, most = 2e-9 * weights, 8e-9 * weights
    budget = least + share * (most - least)
    scheme = f"auto:{budget * 1e6 * 1.000001:.6f}us:{CHOICES}"
    document = quantize(tiny, tmp_path / "out", scheme=scheme, calibration=str(text_file), **WORDS)
    assert document["allocation"]["cost"] <= budget * 1.00001
    bits = {int(r["scheme"][1]) for r in document["layers"]}
    assert bits == {2} if share == 0 else bits == {8} if share == 1 else len(bits) > 1


@pytest.mark.skipif(pack.native is None, reason="needs the compiled kernels")
def test_kernel_times_are_of_the_matrix_and_not_of_nothing() -> None:
    assert product_seconds((4096, 4096), "w4a16-g128") > 4 * product_seconds((256, 256), "w4a16-g128")
    with pytest.raises(InputError, match="no kernel"):
        product_seconds((64, 64), "w5a16-g32")
    with pytest.raises(InputError, match="no kernel time"):
        product_seconds((64, 64), "fp8")
    assert all(product_seconds((256, 256), s) > 0 for s in ("none", "any4", "nf4", "w8a8", "w4a8"))
