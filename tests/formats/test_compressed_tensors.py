import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from lowbit.algorithms.rtn import rtn
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import (
    code_bits,
    format_of,
    pack,
    pack_bits,
    quantization_config,
    read_schemes,
    unpack,
    unpack_bits,
    unpack_input,
)
from lowbit.scheme import Scheme

SCHEMES = [
    "w4a16-g32",
    "w4a16-g32-asym",
    "w3a16-g64",
    "w5a16-g64-asym",
    "w2a16-g128",
    "w7a16-channel",
    "w6a16-channel-asym",
    "w8a16-channel",
    "w8a16-tensor",
    "w4a16-tensor-asym",
    "w8a8",
    "w8a8-tensor",
    "w8a8-static",
    "w4a8-g64",
    "w4afp8-g64",
    "fp8",
    "fp8-static",
    "fp8-tensor",
    "fp8-block",
]
WIDTHS = [1, 7, 31, 32, 33, 64, 65, 128, 200]


def random_codes(bits: int, rows: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(bits * 1000 + n)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, n), generator=g).to(torch.int8)


def pack_one_bit_at_a_time(codes: Tensor, bits: int) -> list[list[int]]:
    """The layout in words: bit t of the row's stream is bit t % bits of code t // bits, words little-endian."""
    rows = []
    for row in codes.tolist():
        words = [0] * -(-len(row) * bits // 32)
        for i, code in enumerate(row):
            for b in range(bits):
                if (code + 2 ** (bits - 1)) >> b & 1:
                    t = i * bits + b
                    words[t // 32] |= 1 << (t % 32)
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return rows


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_the_naive_bit_stream(bits: int, n: int) -> None:
    codes = random_codes(bits, 3, n)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == pack_one_bit_at_a_time(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.interop
@pytest.mark.parametrize("n", [32, 64, 96, 128, 200])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_what_compressed_tensors_packs(bits: int, n: int) -> None:
    codes = random_codes(bits, 4, n)
    assert torch.equal(pack_bits(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack_bits(codes, bits), bits, codes.shape), codes)


def test_the_drawing_in_the_docstring() -> None:
    assert pack_bits(torch.tensor([[-8, -7, 7, 0]], dtype=torch.int8), 4).tolist() == [[0x8F10]]
    codes = torch.full((1, 11), -4, dtype=torch.int8)
    codes[0, 10] = 3  # the eleventh 3-bit code: two bits in word 0, one in word 1
    assert pack_bits(codes, 3).tolist() == [[0xC0000000 - 2**32, 1]]


@pytest.mark.parametrize("text", SCHEMES)
def test_unpack_inverts_pack(text: str) -> None:
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, scheme.weight, torch.bfloat16)
    tensors = pack("model.a", quantized, scheme)
    assert all(name.startswith("model.a.weight") for name in tensors)
    back = unpack("model.a", tensors.__getitem__, scheme)
    assert back.scheme == quantized.scheme
    assert torch.equal(back.codes.float(), quantized.codes.float())
    assert back.codes.dtype == quantized.codes.dtype
    assert torch.equal(back.scale, quantized.scale)
    assert (back.zero_point is None) == (quantized.zero_point is None)
    if back.zero_point is not None:
        assert torch.equal(back.zero_point, quantized.zero_point)
    assert torch.equal(back.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("rows", [3, 7, 8, 33])
def test_zero_points_are_packed_down_the_rows_at_any_height(rows: int) -> None:
    scheme = Scheme.parse("w3a16-g32-asym")
    assert scheme.weight is not None
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    quantized = rtn(weight, scheme.weight, torch.bfloat16)
    tensors = pack("a", quantized, scheme)
    assert tensors["a.weight_zero_point"].shape == (-(-rows * 3 // 32), 3)
    assert torch.equal(unpack("a", tensors.__getitem__, scheme).dequantize(), quantized.dequantize())


def test_sizes_on_disk() -> None:
    scheme = Scheme.parse("w4a16-g128-asym")
    assert scheme.weight is not None
    tensors = pack("a", rtn(torch.randn(64, 256), scheme.weight, torch.bfloat16), scheme)
    shapes = {name.removeprefix("a."): (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert shapes == {
        "weight_packed": (torch.int32, (64, 32)),
        "weight_scale": (torch.bfloat16, (64, 2)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (8, 2)),
    }


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("weight_packed", lambda t: t[:, 1:].contiguous(), r"int32 \[64, 31\].*need int32 \[64, 32\]"),
        ("weight_packed", lambda t: t.long(), "weight_packed is torch.int64"),
        ("weight_scale", lambda t: t[:, :1].contiguous(), r"has 64 entries, w4a16-g128-asym .* needs \(64, 2\)"),
        ("weight_shape", lambda t: t[:1], r"weight_packed is .* shape \[64\] need"),
    ],
)  # fmt: skip
def test_shapes_that_disagree_with_the_scheme(part: str, damage: object, message: str) -> None:
    scheme = Scheme.parse("w4a16-g128-asym")
    assert scheme.weight is not None
    tensors = pack("a", rtn(torch.randn(64, 256), scheme.weight, torch.bfloat16), scheme)
    tensors[f"a.{part}"] = damage(tensors[f"a.{part}"])  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        unpack("a", tensors.__getitem__, scheme)


@pytest.mark.interop
@pytest.mark.parametrize("text", SCHEMES)
def test_config_is_a_valid_quantization_config(text: str) -> None:
    scheme = Scheme.parse(text)
    config = quantization_config({"model.layers.0.a": scheme, "lm_head": Scheme(None)})
    parsed = QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert group.weights is not None
    assert scheme.weight is not None
    assert (group.weights.num_bits, group.weights.symmetric) == (scheme.weight.bits, scheme.weight.symmetric)
    assert group.weights.strategy == scheme.weight.granularity
    assert (group.input_activations is not None) == (scheme.activation is not None)
    assert parsed.ignore == ["lm_head"]
    assert config["format"] == format_of(scheme)


@pytest.mark.interop
@pytest.mark.parametrize("text", [*SCHEMES[:10], "w4a16-channel-asym", "w3a16-g64-asym"])
def test_compressed_tensors_own_compressor_writes_and_reads_the_same(text: str) -> None:
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, scheme.weight, torch.bfloat16)
    mine = {n.removeprefix("a."): t for n, t in pack("a", quantized, scheme).items()}
    config = QuantizationConfig.model_validate(quantization_config({"a": scheme}))
    theirs = config.config_groups["group_0"]
    state = {"weight": quantized.dequantize(), "weight_scale": mine["weight_scale"].float()}
    if quantized.zero_point is not None:
        tensor = scheme.weight.granularity == "tensor"
        state["weight_zero_point"] = quantized.zero_point.reshape(1) if tensor else quantized.zero_point
    written = PackedQuantizationCompressor.compress(state, theirs)
    assert written.keys() == mine.keys()
    for name in mine.keys() - {"weight_scale"}:
        assert torch.equal(written[name], mine[name]), name
    read = PackedQuantizationCompressor.decompress(mine | {"weight_scale": state["weight_scale"]}, theirs)
    assert torch.equal(read["weight"], quantized.dequantize())


# Every scheme that vLLM has kernels for
SERVED = [
    "w4a16-g128", "w4a16-g32-asym", "w4a16-channel", "w8a16-g128", "w8a16-channel", "w8a8", "w8a8-static", "fp8-tensor",
    "fp8", "fp8-block", "fp8-static", "fp8-tensor-static", "w4a8-g128", "w4a8-channel", "w4afp8-g128", "nvfp4", "mxfp4",
]  # fmt: skip


@pytest.mark.interop
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in one mixed model"])
@pytest.mark.parametrize("text", SERVED)
def test_the_librarys_reader_gives_the_kept_weights(text: str, *, alone: bool) -> None:
    """The config says which of its readers a layer is for; that reader gives what lowbit kept, exactly. (NVFP4's is in
    bfloat16 arithmetic, where a product of two scales rounds.)"""
    names = {t: f"model.layers.{i}.a" for i, t in enumerate(SERVED)}
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    layers = {names[t]: Scheme.parse(t) for t in ([text] if alone else SERVED)}
    config = QuantizationConfig.model_validate(quantization_config(layers))
    (group,) = [g for g in config.config_groups.values() if g.targets == ["Linear"] or names[text] in g.targets]
    reader = BaseCompressor.get_value_from_registry(group.format or config.format)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, scheme.weight, torch.bfloat16)
    given = torch.tensor([0.5], dtype=torch.bfloat16) if scheme.static else None
    stored = {n.rpartition(".")[2]: t for n, t in pack(names[text], quantized, scheme, given).items()}
    if stored["weight_scale"].dtype == torch.bfloat16:
        stored["weight_scale"] = stored["weight_scale"].float()  # else its product is rounded to bfloat16
    read = reader.decompress(stored, group)["weight"].float()
    assert torch.allclose(read, quantized.dequantize(), rtol=2**-7 if text == "nvfp4" else 0, atol=0)


@pytest.mark.interop
def test_mixed_schemes_are_a_valid_config_and_come_back() -> None:
    names = ["a.q", "a.k", "b.q", "b.up", "c.q", "lm_head"]
    texts = ["w4a16-g32", "w4a16-g32", "w8a8", "fp8", "w4a16-g32-asym", "none"]
    schemes = {n: Scheme.parse(t) for n, t in zip(names, texts, strict=True)}
    config = quantization_config(schemes)
    assert config["format"] == "mixed-precision"
    assert len(QuantizationConfig.model_validate(config).config_groups) == 4
    assert read_schemes(config, names) == {n: s for n, s in schemes.items() if s.weight is not None}


@pytest.mark.parametrize("text", ["w8a8-static", "fp8-static"])
def test_the_stored_input_scale_comes_back_or_is_refused(text: str) -> None:
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    quantized = rtn(torch.eye(32), scheme.weight, torch.bfloat16)
    tensors = pack("a", quantized, scheme, torch.tensor([0.25], dtype=torch.bfloat16))
    grid = unpack_input("a", tensors.__getitem__, scheme)
    assert grid is not None
    x = torch.tensor([[0.3, -0.1, 1e6, -1e6]])
    largest, least = (31.75, -32.0) if text == "w8a8-static" else (112.0, -112.0)
    assert grid.round(x)[0, 2:].tolist() == [largest, least]
    assert grid.scale is not None
    assert torch.allclose(grid.round(x)[0, :2], torch.tensor([0.25, 0.0]) if "w8" in text else x[0, :2], rtol=0.07)
    for bad in (0.0, float("nan"), -1.0):
        with pytest.raises(InputError, match=r"a.input_scale is .*: expected one positive number"):
            unpack_input("a", {"a.input_scale": torch.tensor([bad])}.__getitem__, scheme)
    assert unpack_input("a", tensors.__getitem__, Scheme.parse("w4a16-g32")) is None


def test_four_bit_codes_beside_int8_activations_are_stored_as_int8() -> None:
    """vLLM's layer for them reads int8; beside FP8 activations its layer reads packed words."""
    for text, dtype, name in (("w4a8-g32", torch.int8, "a.weight"), ("w4afp8-g32", torch.int32, "a.weight_packed")):
        scheme = Scheme.parse(text)
        assert scheme.weight is not None
        tensors = pack("a", rtn(torch.randn(16, 64), scheme.weight, torch.bfloat16), scheme)
        assert tensors[name].dtype == dtype
        assert tensors[name].element_size() * tensors[name].numel() * 8 == 16 * 64 * code_bits(scheme)


@pytest.mark.parametrize("text", SCHEMES)
def test_read_schemes_inverts_the_config(text: str) -> None:
    schemes = {"m.0.a": Scheme.parse(text), "m.1.a": Scheme.parse(text), "lm_head": Scheme(None)}
    back = read_schemes(quantization_config(schemes), schemes)
    assert back == {"m.0.a": Scheme.parse(text), "m.1.a": Scheme.parse(text)}


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*head", "re:lm_.*"])
def test_ignore_patterns_of_other_writers(pattern: str) -> None:
    config = quantization_config({"a": Scheme.parse("w4a16-g32")}) | {"ignore": [pattern]}
    assert set(read_schemes(config, ["a", "lm_head"])) == {"a"}


def test_configs_that_cannot_be_read_name_the_reason() -> None:
    with pytest.raises(InputError, match="already quantized by 'gptq'"):
        read_schemes({"quant_method": "gptq"}, ["a"])
    config = quantization_config({"a": Scheme.parse("w8a8")})
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(InputError, match="dynamic=False"):
        read_schemes(config, ["a"])
    config = quantization_config({"a": Scheme.parse("fp8")})
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    with pytest.raises(InputError, match="cannot read 4-bit float weights"):
        read_schemes(config, ["a"])


def test_packing_does_not_touch_its_input() -> None:
    codes = random_codes(3, 4, 50)
    before = codes.clone()
    unpacked = unpack_bits(pack_bits(codes, 3), 3, 50)
    assert torch.equal(codes, before)
    assert unpacked.numpy().dtype == np.int8
