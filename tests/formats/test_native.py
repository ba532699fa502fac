import pytest
import torch

from lowbit.algorithms.any4 import Any4Settings, any4
from lowbit.algorithms.quip import QuipSettings, quip
from lowbit.algorithms.rtn import rtn
from lowbit.errors import InputError
from lowbit.formats import native
from lowbit.formats.choose import FORMATS, format_for
from lowbit.formats.readers import find_reader
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

ALL = [
    "any4",
    "any3",
    "any2",
    "nf4",
    "nf4-g128",
    "w2a16-midrise",
    "e8p2",
    "e8p3",
    "e8p4",
    "w2a16",
    "w3a16-g32-asym",
    "nvfp4",
    "fp8",
]


def made(text: str) -> tuple[QuantizedTensor, Scheme]:
    """A quantized tensor of that scheme, rotated where quip makes such."""
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 256, generator=g), torch.randn(400, 256, generator=g)
    H = x.T @ x / 400
    if scheme.weight.kind == "learned":
        return any4(weight, H, scheme.weight, Any4Settings(), torch.bfloat16), scheme
    if scheme.weight.kind in ("int", "midrise", "e8p"):
        return quip(weight, H, scheme.weight, QuipSettings(sweeps=0), torch.bfloat16)[0], scheme
    return rtn(weight, scheme.weight, torch.bfloat16), scheme


@pytest.mark.parametrize("text", ALL)
def test_unpack_inverts_pack(text: str) -> None:
    quantized, scheme = made(text)
    tensors = native.pack("m.a", quantized, scheme)
    back = native.unpack("m.a", tensors.__getitem__, scheme)
    assert torch.equal(back.codes.float(), quantized.codes.float())
    assert (back.rotation is None) == (quantized.rotation is None)
    assert back.stored_bits == quantized.stored_bits
    assert torch.equal(back.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("text", [t for t in ALL if t not in ("nvfp4", "fp8")])
def test_stored_shapes_are_those_of_the_tensors(text: str) -> None:
    quantized, scheme = made(text)
    tensors = native.pack("a", quantized, scheme)
    expected = native.stored_shapes(scheme, (48, 256), torch.bfloat16, rotated=quantized.rotation is not None)
    assert {n.removeprefix("a."): (tuple(t.shape), t.dtype) for n, t in tensors.items()} == expected


@pytest.mark.parametrize("text", ["any4", "e8p2", "e8p3", "e8p4"])
def test_bytes_on_disk_are_the_bits_counted(text: str) -> None:
    quantized, scheme = made(text)
    tensors = native.pack("a", quantized, scheme)
    shape = tensors.pop("a.weight_shape")
    assert shape.tolist() == [48, 256]
    assert 8 * sum(t.nbytes for t in tensors.values()) == quantized.stored_bits


def test_lattice_codes_are_the_indices_bit_by_bit() -> None:
    quantized, scheme = made("e8p2")
    stored = native.pack("a", quantized, scheme)["a.weight_packed"]
    assert [v % 65536 for v in stored.flatten().tolist()] == quantized.codes.flatten().tolist()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weight_packed", "expected"),
        ("weight_scale", "needs"),
        ("weight_in_signs", "signs need"),
        ("weight_table", "expected"),
    ],
)
def test_damaged_shapes_are_named(part: str, message: str) -> None:
    quantized, scheme = made("any4" if part == "weight_table" else "e8p2")
    tensors = native.pack("a", quantized, scheme)
    tensors[f"a.{part}"] = tensors[f"a.{part}"][..., :-1].contiguous()
    with pytest.raises(InputError, match=f"a.{part} .*{message}"):
        native.unpack("a", tensors.__getitem__, scheme)


def test_config_comes_back_and_other_versions_are_refused() -> None:
    schemes = {"m.a": Scheme.parse("any4"), "m.b": Scheme.parse("e8p2"), "lm_head": Scheme(None)}
    config = native.quantization_config(schemes, ["m.b"])
    assert config["rotated"] == ["m.b"]
    assert native.read_schemes(config, schemes) == {n: s for n, s in schemes.items() if s.weight is not None}
    with pytest.raises(InputError, match="reads version 1"):
        native.read_schemes(config | {"format_version": 2}, schemes)


def test_the_standard_format_is_chosen_wherever_it_can_say_it() -> None:
    standard, own = FORMATS["compressed-tensors"], FORMATS["lowbit"]
    assert format_for([Scheme.parse("w4a16"), Scheme.parse("nvfp4")], own_layout=False) is standard
    assert format_for([Scheme.parse("w4a16"), Scheme.parse("any4")], own_layout=False) is own
    assert format_for([Scheme.parse("w4a16")], own_layout=True) is own
    with pytest.raises(InputError, match=r"already quantized by 'bitsandbytes'; lowbit reads .*, lowbit, gptq"):
        find_reader({"quant_method": "bitsandbytes"})
