"""A quantized key-value cache: what it stores, what it costs, and that both engines go through it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MambaConfig

from lowbit.calibration import tokenize
from lowbit.errors import InputError
from lowbit.formats.kv_cache import KvCache, scheme_of, unpack, write_config
from lowbit.kernels.pack import native
from lowbit.kv_scales import Seen, kv_report, scale_of
from lowbit.kv_scheme import KV_SCHEMES, KvScheme
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer, open_source, skeleton
from lowbit.pipeline import quantize
from lowbit.runtime.engine import load
from lowbit.runtime.general import GeneralEngine
from lowbit.runtime.kv_cache import QuantizedLayer, decode, encode, make_cache
from lowbit.runtime.native import NativeEngine
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Scheduler

needs_native = pytest.mark.skipif(native is None, reason="the compiled kernels were not built")


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def lively(heads: int = 4, tokens: int = 200, width: int = 32) -> Tensor:
    """Keys (1, heads, tokens, width) whose heads and channels differ in size, as real ones do."""
    gen = torch.Generator().manual_seed(0)
    size = torch.tensor([0.2, 1, 3, 0.5])[:heads, None, None] * torch.rand(heads, 1, width, generator=gen).add(0.2)
    return (torch.randn(heads, tokens, width, generator=gen) * size)[None]


def error(word: str, x: Tensor, scale: Tensor | None = None) -> float:
    """Relative squared error of a round trip, under calibrated scales unless one is given."""
    scheme = KvScheme.parse(word)
    if scheme.static and scale is None:
        seen = Seen()
        seen.add(x)
        scale = scale_of(seen, scheme)
    back = decode(encode(x, scheme, scale), scheme, scale, x.shape[-1])
    return float((back - x).square().sum() / x.square().sum())


def test_words_are_their_schemes() -> None:
    for word in KV_SCHEMES:
        assert str(KvScheme.parse(word)) == word
    with pytest.raises(InputError, match="Did you mean int8"):
        KvScheme.parse("int9")


def test_finer_scales_lose_less() -> None:
    x = lively()
    assert error("int4-head", x) < 0.7 * error("int4-tensor", x)
    assert error("int4", x) < 0.7 * error("int4-head", x)
    assert error("int8-token", x) < error("int8", x) < error("int8-tensor", x) < 0.02 * error("int4-tensor", x)
    assert error("fp8", x) < 2e-3


@pytest.mark.parametrize("word", ["int8", "int4-head"])
def test_calibrated_scales_beat_one(word: str) -> None:
    x = lively() if word == "int8" else 0.1 * lively()
    assert error(word, x) < 0.1 * error(word, x, torch.ones(1))
    assert error("fp8", 1e-3 * x) < 0.2 * error("fp8", 1e-3 * x, torch.ones(1))  # below E4M3's smallest normal number
    assert error("fp8", 1e3 * x) < 0.2 * error("fp8", 1e3 * x, torch.ones(1))  # saturated


@pytest.mark.parametrize("word", list(KV_SCHEMES))
def test_a_layer_stores_few_bits_and_gives_back_the_same_however_it_was_filled(word: str) -> None:
    scheme, k, v = KvScheme.parse(word), lively(), 2 * lively()
    scale = torch.full((4,) if scheme.granularity == "head" else (1,), 0.05) if scheme.static else None
    whole, pieces = (QuantizedLayer(scheme, scale, scale) for _ in range(2))
    expected = whole.update(k, v)
    for a, b in ((0, 150), (150, 151), (151, 200)):
        got = pieces.update(k[:, :, a:b], v[:, :, a:b])
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert whole.nbytes == 2 * k.numel() * scheme.bits_per_value(32) / 8 <= 0.6 * 2 * 2 * k.numel()
    pieces.crop(-60)
    assert pieces.get_seq_length() == 140
    again = pieces.update(k[:, :, 140:], v[:, :, 140:])
    assert torch.equal(again[0], expected[0])


def test_a_layer_without_keys_is_refused() -> None:
    with pytest.raises(InputError, match=r"--kv none"):
        make_cache(MambaConfig(), KvCache(KvScheme.parse("int4")))
    assert len(make_cache(LlamaConfig(num_hidden_layers=3), KvCache(KvScheme.parse("int4"))).layers) == 3


def test_what_no_calibration_reached_is_an_alarm(tmp_path: Path) -> None:
    from lowbit.formats.kv_cache import pack
    from lowbit.shards import write_safetensors

    seen, x = Seen(), lively()
    x[:, 2] = 0
    seen.add(x)
    scheme = KvScheme.parse("int8")
    scale = scale_of(seen, scheme)
    assert scale.flatten()[2] == 1
    assert scale.flatten()[0] < 0.05
    with (tmp_path / "model-1.safetensors").open("wb") as stream:
        write_safetensors(stream, pack("layers.0.self_attn", scale, torch.full((4, 1, 1), 0.1)))
    report = kv_report(scheme, tmp_path)
    assert len(report["alarms"]) == 1
    assert "layers.0.self_attn.k_scale" in report["alarms"][0]


def test_stored_scales_are_checked() -> None:
    scheme, names = KvScheme.parse("fp8"), ["a"]
    with pytest.raises(InputError, match=r"a\.k_scale is in no shard"):
        unpack(scheme, names, 4, {}.__getitem__, "here")
    for bad in (torch.zeros(1), torch.ones(3), torch.tensor([float("nan")])):
        with pytest.raises(InputError, match="expected a positive number"):
            unpack(scheme, names, 4, lambda _n, bad=bad: bad, "here")


@pytest.mark.interop
@pytest.mark.parametrize("word", ["fp8", "fp8-head", "int8", "int8-tensor", "int4-head"])
def test_compressed_tensors_reads_the_config(word: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    base = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    config = write_config({"quantization_config": base}, KvScheme.parse(word))
    read = QuantizationConfig.model_validate(config["quantization_config"]).kv_cache_scheme
    assert read.num_bits == KvScheme.parse(word).bits
    assert read.strategy == {"tensor": "tensor", "head": "attn_head"}[KvScheme.parse(word).granularity]
    assert scheme_of(config) == KvScheme.parse(word)


def made(tiny: Path, target: Path, text_file: Path, **words: Any) -> dict[str, Any]:
    words = {"scheme": "w8a16-channel", "method": "rtn", "calibration": str(text_file), **words}
    return quantize(tiny, target, samples=4, seq_len=64, **words)


TOKENS = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("word", ["fp8", "int8", "int8-tensor", "int4", "int4-head"])
def test_a_directory_runs_through_its_cache_in_both_engines(
    word: str, tiny: Path, tmp_path: Path, text_file: Path
) -> None:
    document = made(tiny, tmp_path / "q", text_file, kv=word)
    scheme = KvScheme.parse(word)
    assert document["kv_cache"]["scheme"] == word
    assert document["kv_cache"]["alarms"] == []
    assert len(document["kv_cache"]["layers"]) == (2 if scheme.static else 0)
    exact, general = load(tmp_path / "q", "float32", kv="none"), load(tmp_path / "q", "float32")
    assert isinstance(general, GeneralEngine)
    lost = kl(exact.logits(TOKENS), general.logits(TOKENS))
    assert 0 < lost < (2e-4 if word.startswith("int8") else 2e-3 if word == "fp8" else 0.05)
    assert general.kv_bytes(100) < 0.8 * load(tmp_path / "q", "bfloat16", kv="none").kv_bytes(100)
    assert "KV cache" in general.runtime
    if native is not None:
        engine = load(tmp_path / "q")
        assert isinstance(engine, NativeEngine)
        assert "KV cache" in engine.runtime
        assert kl(general.logits(TOKENS), engine.logits(TOKENS)) < max(
            2e-3, 0.3 * lost
        )  # activations in int8 move codes
        streamed = torch.stack(list(engine.stream(TOKENS[:, :9], 8)), 1)
        whole = torch.cat([TOKENS[:, :9], streamed], 1)
        assert torch.equal(engine.logits(whole)[:, 8:-1].argmax(-1), streamed)


def test_a_cache_alone(tiny: Path, tmp_path: Path, text_file: Path) -> None:
    """Weights as they were, keys and values in 8 bits."""
    document = made(tiny, tmp_path / "q", text_file, scheme="none", kv="int8")
    assert document["layers"] == []
    assert document["bits_per_weight"] == 16
    lost = kl(load(tiny, "float32").logits(TOKENS), load(tmp_path / "q", "float32").logits(TOKENS))
    assert 0 < lost < 2e-4


def test_a_cache_that_the_engine_steps_through_is_that_of_the_whole_text(tiny: Path) -> None:
    engine = load(tiny, "float32", kv="int4")
    streamed = torch.stack(list(engine.stream(TOKENS[:, :20], 8)), 1)
    whole = torch.cat([TOKENS[:, :20], streamed], 1)
    assert torch.equal(engine.logits(whole)[:, 19:-1].argmax(-1), streamed)
    tokens = TOKENS[0].tolist()
    first, _ = engine.next_logits(tokens, 1, True)
    engine.next_logits([*tokens[:30], 7], 1, True)  # cut back, and on another way
    again, _ = engine.next_logits(tokens, 1, True)
    assert torch.allclose(first, again, atol=1e-5)


def test_run_time_words(tiny: Path, tmp_path: Path, text_file: Path) -> None:
    assert "int8 KV cache (a scale per token and head)" in load(tiny, "float32", kv="int8").runtime
    with pytest.raises(InputError, match="needs scales found by calibration"):
        load(tiny, "float32", kv="fp8")
    made(tiny, tmp_path / "q", text_file, kv="int8-tensor")
    assert "a stored scale per layer" in load(tmp_path / "q", "float32", kv="int8").runtime
    assert "KV cache" not in load(tmp_path / "q", "float32", kv="none").runtime


def test_quantize_refuses(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key-value cache in int8 needs text"):
        quantize(tiny, tmp_path / "q", scheme="w8a16-channel", method="rtn", kv="int8")
    quantize(tiny, tmp_path / "q", scheme="w8a16-channel", method="rtn", kv="int4")  # nothing to calibrate
    assert json.loads((tmp_path / "q" / "config.json").read_text())["lowbit_kv_cache"] == "int4"


@needs_native
@pytest.mark.parametrize("word", ["int8", "int4"])
def test_the_native_cache_halves_its_bytes(word: str, tiny: Path) -> None:
    few, many = load(tiny, "auto", kv=word), load(tiny, "auto")
    assert few.kv_bytes(1000) <= (0.7 if word == "int8" else 0.45) * many.kv_bytes(1000)  # heads of 16 channels


@needs_native
def test_the_scheduler_and_its_prefixes_over_an_int4_cache(tiny: Path) -> None:
    """The bits do not depend on what is computed beside: together, alone and from a cached prefix are the same."""
    engine = load(tiny, "auto", kv="int4")
    assert engine.batch_invariant
    params = SamplingParams(max_new_tokens=12)
    prompts = [TOKENS[0, :40].tolist(), TOKENS[0, :45].tolist(), TOKENS[1, :17].tolist()]
    alone = [[o.token for o in engine.outputs(p, params)] for p in prompts]
    scheduler = Scheduler(engine, cache_tokens=512, step_tokens=24)
    numbers = [scheduler.submit(p, params) for p in (*prompts, prompts[0])]
    got: dict[int, list[int]] = {n: [] for n in numbers}
    while scheduler.busy:
        for event in scheduler.step():
            assert event.output is not None
            got[event.request].append(event.output.token)
    assert [got[n] for n in numbers] == [*alone, alone[0]]
    again = scheduler.submit(prompts[1], params)
    cached = [event for _ in range(40) if scheduler.busy for event in scheduler.step() if event.request == again]
    assert cached[0].cached_tokens == 32
    assert [e.output.token for e in cached if e.output] == alone[1]


def test_plain_caches_stay_plain(tiny: Path) -> None:
    assert type(load(tiny, "float32")._new_cache()) is DynamicCache


@pytest.mark.model
def test_what_the_demo_model_loses(tmp_path: Path) -> None:
    """The claims of docs/methods.md, on two windows of its evaluation text."""
    text = (DEMO / "evaluation.txt").read_text(encoding="utf-8")[200_000:206_000]
    tokens = torch.tensor(tokenize(text, load_tokenizer(open_checkpoint("demo")))[:1024].astype("int64")).view(2, 512)
    truth, lost = load("demo", "float32").logits(tokens), {}
    for word in ("int8", "int8-token", "fp8", "int4", "int4-head", "int4-tensor"):
        scheme = KvScheme.parse(word)
        if scheme.static:
            quantize("demo", tmp_path / word, scheme="none", method="rtn", kv=word, samples=8)
        engine = load(tmp_path / word if scheme.static else "demo", "float32", kv=word)
        lost[word] = kl(truth, engine.logits(tokens))
        if word == "int8":
            ones = KvCache(scheme, ((torch.ones(1), torch.ones(1)),) * 8)
            engine = GeneralEngine(*demo_parts(), torch.float32, kernels=False, kv=ones)
            lost["scale 1.0"] = kl(truth, engine.logits(tokens))
    assert lost["int8-token"] < lost["int8"] < 5e-4
    assert lost["int8"] < 0.05 * lost["scale 1.0"]
    assert lost["fp8"] < 4e-3
    assert lost["int4"] < 0.6 * lost["int4-head"]
    assert lost["int4"] < 0.02


def demo_parts() -> tuple[Any, Any]:
    checkpoint = open_checkpoint("demo")
    net = skeleton(checkpoint)
    return net, open_source(net, checkpoint)
