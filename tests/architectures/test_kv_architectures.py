"""A calibrated key-value cache on architectures that keep, name and share their keys differently."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zoo import VOCABULARY

import lowbit
from lowbit.errors import InputError
from lowbit.runtime.engine import load

PROMPT = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "falcon", "phi3", "gemma3", "mistral", "mixtral"])
def test_int8_keys_and_values_change_little(
    name: str, architecture: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    words = {"scheme": "none", "method": "rtn", "kv": "int8", "samples": 4, "seq_len": 64}
    document = lowbit.quantize(architecture(name), tmp_path / "q", calibration=str(text_file), **words)
    assert document["kv_cache"]["alarms"] == []
    assert len(document["kv_cache"]["layers"]) == 2
    exact = load(architecture(name), "float32").logits(PROMPT).log_softmax(-1)
    for runtime in ("float32", "auto"):
        own = load(tmp_path / "q", runtime).logits(PROMPT).log_softmax(-1)  # type: ignore[arg-type]
        assert 0 < float((exact.exp() * (exact - own)).sum(-1).mean()) < 2e-3


def test_an_encoder_keeps_no_keys(architecture: Callable[[str], Path], tmp_path: Path, text_file: Path) -> None:
    words = {"scheme": "none", "method": "rtn", "kv": "int8", "samples": 4, "seq_len": 64}
    with pytest.raises(InputError, match="leave --kv out"):
        lowbit.quantize(architecture("bert"), tmp_path / "q", calibration=str(text_file), **words)
