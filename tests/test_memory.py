"""Streaming: a model larger than the process may hold is quantized, to the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit import parking, pipeline
from lowbit.errors import InputError
from lowbit.memory import Memory, choose_frugal
from lowbit.model import recompute
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.lockstep import Walk
from lowbit.model.walk import capture_entries, find_blocks, input_groups, linears
from lowbit.parking import parking_in

WORDS = {"scheme": "w4a16-g32", "samples": 24, "seq_len": 64}

# RLIMIT_DATA counts what the process allocates, and not the files it maps: they are the system's to drop.
LIMITED = """
import json, resource, sys
import torch, psutil
import lowbit.pipeline, transformers.models.llama.modeling_llama
from lowbit.console import set_verbosity
torch.set_num_threads(1)
set_verbosity(0)
model, out, headroom, words, small = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
lowbit.quantize(small, out + "-small", **words)  # what the program and its libraries need for any model
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
if headroom:
    resource.setrlimit(resource.RLIMIT_DATA, (used + headroom, used + headroom))
lowbit.quantize(model, out, **words)
"""


def quantize_limited(
    model: Path, out: Path, headroom: int, small: Path, **words: Any
) -> subprocess.CompletedProcess[str]:
    """In a process of its own that may allocate `headroom` bytes above what quantizing `small` took (0: any number)."""
    command = [sys.executable, "-c", LIMITED, str(model), str(out), str(headroom), json.dumps(words), str(small)]
    # the C library would otherwise keep what finished threads allocated, for the next one: not memory in use
    exact = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | exact)


def shards(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.glob("*.safetensors"))}


@pytest.mark.model
def test_a_model_larger_than_the_process_may_hold(
    make_llama: Callable[..., Path], tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 40, "initializer_range": 0.02}
    model = make_llama(tmp_path / "model", **sizes)
    headroom = 80_000_000
    assert open_checkpoint(model).nbytes > 1.5 * headroom
    words = WORDS | {"calibration": str(text_file), "method": "rtn", "set": [["scale_search", "false"]], "samples": 8}
    limited = quantize_limited(model, tmp_path / "limited", headroom, tiny, **words)
    assert limited.returncode == 0, limited.stderr[-2000:]
    free = quantize_limited(model, tmp_path / "free", 0, tiny, **words)
    assert free.returncode == 0, free.stderr[-2000:]
    assert shards(tmp_path / "limited") == shards(tmp_path / "free")


def test_activations_on_disk_change_no_byte(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("w4a16-g32", "w8a8"):
        words = WORDS | {"scheme": scheme, "calibration": str(text_file)}
        lowbit.quantize(tiny, tmp_path / f"{scheme}-free", **words)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "choose_frugal", lambda *_: True)
            lowbit.quantize(tiny, tmp_path / f"{scheme}-least", **words)
        assert shards(tmp_path / f"{scheme}-least") == shards(tmp_path / f"{scheme}-free")
    assert not list(tmp_path.glob("**/activations"))


def test_a_limit_decides(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    memory = Memory(base=100, outside=50, block=70, proof=40, activations=200)
    assert (memory.peak, memory.least) == (370, 170)
    assert not choose_frugal(memory, 370)
    assert choose_frugal(memory, 369)
    assert choose_frugal(memory, 170)
    with pytest.raises(InputError, match="--max-memory 0 MB: the largest piece of this model needs about"):
        choose_frugal(memory, 169)
    words = WORDS | {"calibration": str(text_file)}
    with pytest.raises(InputError, match=r"--max-memory 1 MB: .*needs about \d+ MB"):
        lowbit.quantize(tiny, tmp_path / "refused", max_memory=10**6, **words)
    assert not list(tmp_path.iterdir())


def counting(counts: list[int]) -> Any:
    """A hook that notes how many windows a linear computes at each call."""
    return lambda _module, args, _output: counts.append(len(args[0]))


@torch.no_grad()
def test_recomputing_gives_what_lockstep_gives(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of every group and outputs, with weights replaced on the way, bit for bit, on two threads; and with a disk
    no linear computes a batch twice, and attention, whose last linear is rounded second, is computed until then."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(recompute, "WORTH_KEEPING", 1)
    results, computed, attended = [], [], []
    for again, folder in ((False, None), (True, None), (True, tmp_path / "parked")):
        model = AutoModelForCausalLM.from_pretrained(tiny).eval()
        blocks = find_blocks(model)
        batches = list(torch.randint(0, 4096, (5, 2, 12), generator=torch.Generator().manual_seed(1)))
        entries = capture_entries(model, blocks, batches, tmp_path / "activations" if again else None)
        block = model.get_submodule(blocks.names[0])
        groups = input_groups(block, entries[0], 0)
        with parking_in(folder):
            walk = Walk(block, 0, entries, groups, {}, threads=2, recompute=again)
            tokens: list[int] = []
            counts = [m.register_forward_hook(counting(tokens)) for m in linears(block).values()]
            calls = list[int]()
            after = block.self_attn.o_proj.register_forward_pre_hook(lambda *_, n=calls: n.append(1), prepend=True)
            counts.append(after)
            seen = []
            for k, group in enumerate(groups):
                seen += [x.clone() for share in walk.collect(k, lambda i: [x for _, x in i]) for x in share]
                for name in group.names:
                    block.get_submodule(name).weight.data *= 0.5
            seen += walk.finish()
        for count in counts:
            count.remove()
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in block.modules())
        results.append(seen)
        computed.append(sum(tokens))
        attended.append(len(calls))
    assert len(results[0]) == 5 * 5
    for others in results[1:]:
        assert len(others) == len(results[0])
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    assert computed == [7 * 5 * 2, (3 + 4 + 6 + 7) * 5 * 2, 7 * 5 * 2]  # linears, batches, windows a batch
    assert attended == [5, 4 * 5, 2 * 5]
    assert not list((tmp_path / "parked").iterdir())


@torch.no_grad()
def test_a_full_disk_only_means_computing_again(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WORDS | {"calibration": str(text_file)}
    lowbit.quantize(tiny, tmp_path / "free", **words)
    monkeypatch.setattr(pipeline, "choose_frugal", lambda *_: True)
    monkeypatch.setattr(recompute, "WORTH_KEEPING", 1)
    refused = []

    def full(_file: Any, values: torch.Tensor) -> None:
        refused.append(values.shape)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parking, "_write", full)
    lowbit.quantize(tiny, tmp_path / "full", **words)
    assert refused
    assert shards(tmp_path / "full") == shards(tmp_path / "free")


@pytest.mark.parametrize(("hidden", "method"), [(128, "rtn"), (256, "gptq"), (512, "gptq")])
def test_the_predicted_peak_is_the_measured_one(
    make_llama: Callable[..., Path], text_file: Path, tmp_path: Path, hidden: int, method: str
) -> None:
    """Within 30 % of the resident set's peak in a process of its own."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "initializer_range": 0.02}
    model = make_llama(tmp_path / "model", **sizes)
    words = ["--scheme", "w4a16-g32", "--method", method, "--calibration", str(text_file), "--samples", "24"]
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), "-o", str(tmp_path / "out"), *words]
    command += ["--seq-len", "128", "--quiet", "--json"]
    subprocess.run([*command, str(tmp_path / "dry.json"), "--dry-run"], check=True)
    assert not (tmp_path / "out.partial").exists()
    predicted = json.loads((tmp_path / "dry.json").read_text())["predicted"]
    assert predicted["seconds"] > 0
    subprocess.run([*command, str(tmp_path / "run.json")], check=True)
    measured = json.loads((tmp_path / "run.json").read_text())["peak_memory_bytes"]
    assert 0.7 < predicted["peak_memory_bytes"] / measured < 1.3
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 < predicted["output_bytes"] / written < 1.1
