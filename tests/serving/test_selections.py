"""What was chosen is on the disk, whatever happened to the process in between; nothing else gets there."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import InputError
from lowbit.serving import selections
from lowbit.serving.selections import Full, Selections

CHOSEN: dict[str, Any] = {
    "user_selections": {"model": "w4a16-gptq", "batch": 8},
    "calculated_monthly_cost": {"choice": 730.0, "compared_with": 1460.0},
    "comparison_delta": {"per_month": -730.0},
}


def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "selections.jsonl"
    assert Selections(path).all() == []
    for batch in range(3):
        chosen = CHOSEN | {"user_selections": {"batch": batch}}
        assert Selections(path).add(json.dumps(chosen).encode())["user_selections"] == {"batch": batch}
    kept = Selections(path).all()
    assert [k["user_selections"]["batch"] for k in kept] == [0, 1, 2]
    assert kept[0]["calculated_monthly_cost"] == CHOSEN["calculated_monthly_cost"]
    assert kept[0]["comparison_delta"] == CHOSEN["comparison_delta"]
    assert kept[0]["at"] <= kept[2]["at"]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_that_was_cut_short_costs_that_line_alone(tmp_path: Path, cut: int) -> None:
    kept = Selections(tmp_path / "selections.jsonl")
    for _ in range(2):
        kept.add(json.dumps(CHOSEN).encode())
    data = kept.path.read_bytes()
    kept.path.write_bytes(data[:-cut])
    kept.add(json.dumps(CHOSEN).encode())
    assert len(kept.all()) == (3 if cut == 1 else 2)  # without its last byte, a line is whole all the same


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "JSON"),
        ("{}", "required"),
        (json.dumps(CHOSEN | {"calculated_monthly_cost": {"choice": "much"}}), "number"),
        (json.dumps(CHOSEN | {"comparison_delta": {"x": 1e999}}), "not finite"),
        (json.dumps(CHOSEN | {"user_selections": {"model": "x" * 201}}), "200 characters"),
        (json.dumps(CHOSEN | {"user_selections": {str(i): i for i in range(33)}}), "32"),
        (json.dumps(CHOSEN | {"user_selections": {"a": {"b": 1}}}), "valid"),
    ],
)
def test_what_is_no_selection_is_refused(tmp_path: Path, body: str, says: str) -> None:
    kept = Selections(tmp_path / "selections.jsonl")
    with pytest.raises(InputError, match=says):
        kept.add(body.encode())
    assert not kept.path.exists()


def test_the_file_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Selections(tmp_path / "selections.jsonl")
    kept.add(json.dumps(CHOSEN).encode())
    monkeypatch.setattr(selections, "MOST_BYTES", kept.path.stat().st_size + 10)
    with pytest.raises(Full):
        kept.add(json.dumps(CHOSEN).encode())
    assert len(kept.all()) == 1


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_it(body: bytes) -> None:
    with pytest.raises(InputError):
        Selections(Path("/nonexistent/selections.jsonl")).add(body)
