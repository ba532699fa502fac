import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import InputError
from lowbit.scheme import EXAMPLES, PRESETS, Scheme, TensorScheme

granularities = st.one_of(st.just(""), st.just("-channel"), st.just("-tensor"), st.integers(1, 4096).map("-g{}".format))
MIXED = [
    "w8a8", "w8a8-channel", "w8a8-tensor", "w8a8-static", "w8a8-tensor-static", "w4a8", "w4a8-g32", "w4a8-channel",
    "w4afp8", "w4afp8-g64", "w4afp8-channel", *PRESETS,
]  # fmt: skip
weight_only = st.builds("w{}a16{}{}".format, st.integers(2, 8), granularities, st.sampled_from(["", "-asym"]))
midrise = st.builds("w{}a16{}-midrise".format, st.integers(2, 4), st.sampled_from(["", "-g64", "-channel"]))
tables = st.sampled_from(["nf4", "nf4-g128", "any4", "any3-g64", "any2"])
strings = st.one_of(weight_only, midrise, tables, st.sampled_from(MIXED))


@given(strings)
def test_string_round_trip(text: str) -> None:
    scheme = Scheme.parse(text)
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("w4a16", "w4a16-g128"), ("w8a8-channel", "w8a8"), ("w3a16-g64-asym", "w3a16-g64-asym"), ("none", "none")],
)
def test_defaults_are_spelled_out(text: str, canonical: str) -> None:
    assert str(Scheme.parse(text)) == canonical


def test_meaning_of_strings() -> None:
    assert Scheme.parse("w4a16-g32-asym") == Scheme(TensorScheme("int", 4, "group", 32, symmetric=False))
    assert Scheme.parse("w8a8") == Scheme(TensorScheme("int", 8, "channel"), TensorScheme("int", 8, "token"))
    assert Scheme.parse("fp8").weight == TensorScheme("float", 8, "channel")
    assert Scheme.parse("none").weight is None
    for text in EXAMPLES:
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("w4a61", "w4a16"),
        ("w4a16-128", "w4a16-g128"),
        ("W8A8", "w8a8"),
        ("fp8-blok", "fp8-block"),
        ("w9a16", "w8a16"),
        ("w1a16", "w8a16"),
        ("w4a16-asym-g32", "w4a16-g32-asym"),
    ],
)
def test_unknown_strings_name_their_neighbours(text: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"unknown scheme '{text}'. Did you mean .*\b{near}\b.*\? Known:"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["", "banana", "w4a16-g", "w4a16 ", "w4a16-g0128x", "w٤a16", "w4a16-g٣٢"])
def test_nonsense_lists_what_is_known(text: str) -> None:
    with pytest.raises(InputError, match="Known: w4a16"):
        Scheme.parse(text)


def test_static_and_mixed_schemes() -> None:
    token, tensor = TensorScheme("int", 8, "token"), TensorScheme("int", 8, "tensor")
    assert Scheme.parse("w8a8-static") == Scheme(TensorScheme("int", 8, "channel"), tensor)
    assert Scheme.parse("w8a8-static").static
    assert not Scheme.parse("w8a8").static
    assert Scheme.parse("w4a8") == Scheme(TensorScheme("int", 4, "group", 128), token)
    assert Scheme.parse("w4afp8-g64") == Scheme(TensorScheme("int", 4, "group", 64), TensorScheme("float", 8, "token"))
    assert Scheme.parse("fp8-static").activation == TensorScheme("float", 8, "tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w3a8", "int8 activations go with 8- or 4-bit weights"),
        ("w8afp8", "FP8 ones with 4-bit weights"),
        ("w4a8-asym", "no zero points: drop -asym"),
        ("w4a8-static", "stored activation scales .* come with w8a8 and fp8"),
        ("w4a16-static", "stored activation scales"),
        ("w4afp8-static", "stored activation scales"),
    ],
)
def test_mixed_schemes_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["w8a8-g128", "w8a8-asym"])
def test_int8_activations_need_int8_weights_scaled_by_row(text: str) -> None:
    with pytest.raises(InputError, match="one integer product is scaled once per row"):
        Scheme.parse(text)


def test_group_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 column, got 0"):
        Scheme.parse("w4a16-g0")
