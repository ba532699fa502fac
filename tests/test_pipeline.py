"""The loop over blocks, on a tiny random Llama: what comes out, what is refused, what a crash leaves behind."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import job, pipeline
from lowbit.algorithms import METHODS, Method
from lowbit.algorithms.rtn import RTNSettings, rtn
from lowbit.artifact import Work, file_hashes, read_manifest
from lowbit.environment import compute_dtype
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import read_schemes, unpack
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.stream import stream_logits
from lowbit.recipe import Recipe, read_recipe
from lowbit.scheme import Scheme

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run(tiny: Path, text_file: Path) -> Run:
    """run(OUT, ...): quantize the tiny model with a few short windows."""

    def run(output: Path, model: Path = tiny, **words: Any) -> dict[str, Any]:
        settings = {"scheme": "w4a16-g32", "calibration": str(text_file), "samples": 16, "seq_len": 32} | words
        return lowbit.quantize(model, output, **settings)

    return run


@pytest.fixture(scope="session")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory of an undisturbed run. Read only."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run(output)
    return output


def model_bytes(path: Path) -> dict[str, bytes]:
    """What 'byte-identical' is about: the weights, the config, the index, the tokenizer."""
    names = sorted(f.name for f in path.iterdir() if f.is_file() and f.name not in ("lowbit.json", "README.md"))
    return {name: (path / name).read_bytes() for name in names}


def in_child(work: Callable[[], Any], message: Path | None = None) -> int:
    """Run `work` in a forked process. Its exit status: 0, 2 for an InputError, -9 for a kill."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except InputError as error:
            status = 2
            if message:
                message.write_text(str(error))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- what comes out


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g64-asym", "w2a16-g32", "w8a16-channel", "w8a8", "fp8"])
def test_every_layer_is_at_least_as_good_as_rtn(run: Run, tmp_path: Path, scheme: str) -> None:
    document = run(tmp_path / "out", scheme=scheme, samples=32, seq_len=64)
    assert [r["name"].split(".")[-1] for r in document["layers"]] == LINEARS * 2
    for report in document["layers"]:
        assert 0 < report["loss"] <= report["loss_rtn"]
        assert report["fallback"] is None or "worse than plain rtn" in report["fallback"]


def test_document_and_manifest(finished: Path, run: Run, tmp_path: Path) -> None:
    document = run(tmp_path / "out")
    assert document.keys() >= {
        "output", "scheme", "method", "seconds", "peak_memory_bytes", "bits_per_weight", "layers"
    }  # fmt: skip
    assert document["bits_per_weight"] == pytest.approx(4 + 16 / 32)
    assert document["layers"][0].keys() >= {"name", "bits", "loss_rtn", "loss", "seconds", "fallback"}
    manifest = read_manifest(tmp_path / "out")
    assert [r["name"] for r in manifest["layers"]] == [r["name"] for r in document["layers"]]
    assert Recipe(**read_recipe(finished / "lowbit.json")).scheme == "w4a16-g32"


def test_the_manifests_hashes_are_of_the_files_that_are_there(finished: Path) -> None:
    assert read_manifest(finished)["files"] == file_hashes(finished)


def test_nothing_of_the_work_is_left(finished: Path) -> None:
    assert sorted(p.name for p in finished.parent.iterdir()) == ["out"]
    names = {p.name for p in finished.iterdir()}
    assert not [n for n in names if n.endswith((".tmp", ".safetensors.json")) or n == ".work"]
    assert names >= {"config.json", "lowbit.json", "README.md", "tokenizer.json", "model.safetensors.index.json"}


def test_what_is_not_quantized_is_bit_for_bit_the_original(tiny: Path, finished: Path) -> None:
    before, after = open_checkpoint(tiny), open_checkpoint(finished)
    kept = [n for n in before.tensors if not any(f".{linear}.weight" in n for linear in LINEARS)]
    assert "lm_head.weight" in kept
    assert len(kept) == 3 + 2 * 2
    for name in kept:
        assert torch.equal(before.get(name), after.get(name))


def test_the_reports_losses_and_bits_belong_to_the_files(tiny: Path, finished: Path) -> None:
    """The first layer's loss, computed again from OUT and from the embeddings of the calibration text."""
    before, after = open_checkpoint(tiny), open_checkpoint(finished)
    manifest = read_manifest(finished)
    names = [r["name"] for r in manifest["layers"]]
    schemes = read_schemes(after.config["quantization_config"], names)
    assert schemes == dict.fromkeys(names, Scheme.parse("w4a16-g32"))
    for report in manifest["layers"]:
        quantized = unpack(report["name"], after.get, schemes[report["name"]])
        original = before.get(f"{report['name']}.weight").float()
        relative = (quantized.dequantize() - original).norm() / original.norm()
        assert 0.01 < relative < 0.2  # 4 bits: about a tenth
        assert report["bits"] == pytest.approx(quantized.stored_bits / original.numel())


def test_the_fingerprint_is_what_the_files_compute(finished: Path) -> None:
    fingerprint = read_manifest(finished)["fingerprint"]
    logits = stream_logits(open_checkpoint(finished), torch.tensor([fingerprint["prompt"]]))[0, -1]
    assert logits.topk(len(fingerprint["tokens"])).indices.tolist() == fingerprint["tokens"]


def test_two_runs_are_byte_identical_and_the_seed_matters(run: Run, finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    run(tmp_path / "other", seed=1)
    assert model_bytes(tmp_path / "again") == model_bytes(finished)
    assert model_bytes(tmp_path / "other") != model_bytes(finished)


def test_overrides_and_ignores_reach_the_files(run: Run, tmp_path: Path) -> None:
    document = run(tmp_path / "out", override=(("layers.0.*", "w8a16-channel"),), ignore=("o_proj",))
    bits = {r["name"]: r["bits"] for r in document["layers"]}
    assert len(bits) == 12
    assert bits["model.layers.0.mlp.up_proj"] == pytest.approx(8 + 16 / 64)
    assert bits["model.layers.1.mlp.up_proj"] == pytest.approx(4.5)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "model.layers.0.self_attn.o_proj.weight" in checkpoint.tensors
    assert "model.layers.0.self_attn.o_proj" in checkpoint.config["quantization_config"]["ignore"]


def test_rtn_needs_no_text(run: Run, tiny: Path, tmp_path: Path) -> None:
    document = run(tmp_path / "out", method="rtn", calibration=None)
    assert {r["loss"] for r in document["layers"]} == {None}
    checkpoint = open_checkpoint(tmp_path / "out")
    name, scheme = "model.layers.1.mlp.up_proj", Scheme.parse("w4a16-g32")
    assert scheme.weight is not None
    weight = open_checkpoint(tiny).get(f"{name}.weight")
    expected = rtn(weight, scheme.weight, torch.bfloat16, scale_search=True)
    assert torch.equal(unpack(name, checkpoint.get, scheme).dequantize(), expected.dequantize())


def test_exactly_representable_weights_come_back(run: Run, tiny_float32: Path, tmp_path: Path) -> None:
    """Quantize, write the values as an ordinary float32 model, quantize that: every weight returns exactly."""
    run(tmp_path / "first", tiny_float32, method="rtn", calibration=None)
    first = open_checkpoint(tmp_path / "first")
    scheme = Scheme.parse("w4a16-g32")
    shutil.copytree(tiny_float32, tmp_path / "model")
    tensors = load_file(tiny_float32 / "model.safetensors")
    for report in read_manifest(tmp_path / "first")["layers"]:
        tensors[f"{report['name']}.weight"] = unpack(report["name"], first.get, scheme).dequantize()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    document = run(tmp_path / "second", tmp_path / "model")
    second = open_checkpoint(tmp_path / "second")
    for report in document["layers"]:
        value = unpack(report["name"], second.get, scheme).dequantize()
        largest = tensors[f"{report['name']}.weight"].abs().max()
        assert float((value - tensors[f"{report['name']}.weight"]).abs().max()) <= 1e-6 * largest


def test_at_most_one_block_holds_weights_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets: list[Any] = []
    original_skeleton, original_release = pipeline.skeleton, job.release
    held: list[int] = []

    def skeleton(checkpoint: Any) -> Any:
        nets.append(original_skeleton(checkpoint))
        return nets[-1]

    def release(block: Any) -> None:
        held.append(sum(any(not p.is_meta for p in b.parameters()) for b in nets[0].model.layers))
        original_release(block)

    monkeypatch.setattr(pipeline, "skeleton", skeleton)
    monkeypatch.setattr(job, "release", release)
    run(tmp_path / "out")
    assert set(held) == {1}  # after entering, and after each block
    assert all(p.is_meta for p in nets[0].model.layers.parameters())


# --- falling back, always on the record


def bad_method(rounding: Any) -> Method:
    return Method(rounding, RTNSettings, needs_calibration=True)


def test_a_method_that_is_worse_than_rtn_is_not_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(weight: Any, _h: Any, scheme: Any, _s: Any, dtype: Any) -> Any:
        return rtn(weight + 0.1, scheme, dtype), {}

    monkeypatch.setitem(METHODS, "gptq", bad_method(coarse))
    document = run(tmp_path / "out")
    for report in document["layers"]:
        assert report["fallback"] == "worse than plain rtn on held-out windows: plain rtn"
        assert report["loss"] == report["loss_rtn"]
    scheme = Scheme.parse("w4a16-g32")
    checkpoint, name = open_checkpoint(tmp_path / "out"), "model.layers.0.self_attn.q_proj"
    assert scheme.weight is not None
    plain = rtn(open_checkpoint(document_model(tmp_path)).get(f"{name}.weight"), scheme.weight, torch.bfloat16)
    assert torch.equal(unpack(name, checkpoint.get, scheme).dequantize(), plain.dequantize())


def document_model(tmp_path: Path) -> str:
    return str(read_manifest(tmp_path / "out")["model"]["name"])


def test_statistics_that_do_not_allow_the_method(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise ValueError("the Hessian is hopeless")

    monkeypatch.setitem(METHODS, "gptq", bad_method(refuses))
    assert {r["fallback"] for r in run(tmp_path / "out")["layers"]} == {"the Hessian is hopeless: rtn"}


# --- refused before anything is written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scheme": "w4a16-g48"}, r"w4a16-g48 does not fit model\.layers\.0\.self_attn\.q_proj \(64 x 64\)"),
        ({"scheme": "w4a16"}, r"group size 128 does not divide the layer's 64 inputs: use .*\(32, 64\).*--ignore"),
        ({"scheme": "fp8-block"}, "group size 128 does not divide the layer's 64 outputs"),
        ({"scheme": "w5a5"}, "unknown scheme 'w5a5'"),
        ({"method": "gtpq"}, "unknown method 'gtpq'. Did you mean gptq"),
        ({"set": (("damp", "1"),)}, "method 'gptq' has no setting 'damp'"),
        ({"ignore": ("mpl.*",)}, r"pattern 'mpl\.\*' matches no linear layer. There are .*up_proj"),
        ({"override": (("lm_head", "w8a8"),)}, "override 'lm_head': outside the blocks, weights alone"),
        ({"ignore": ("*",)}, "nothing is left to quantize"),
        ({"calibration": None}, "method 'gptq' needs text to calibrate on"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"seq_len": 257}, "--seq-len 257 is longer than the model's context of 256 tokens"),
        ({"samples": 10**6, "seq_len": 250, "calibration": "LONG.jsonl"}, r"LONG\.jsonl: no such file"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(run: Run, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **words)
    assert not list(tmp_path.iterdir())


def damage_nan(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path / "model.safetensors")


def damage_vocabulary(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, r"tensor 'model\.layers\.1\.mlp\.down_proj\.weight' has 1 NaN"),
        (damage_vocabulary, "they belong to different models"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda path: (path / "config.json").unlink(), r"no config\.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "empty"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_models_that_are_refused(run: Run, broken: Path, damage: Any, message: str) -> None:
    damage(broken)
    with pytest.raises(InputError, match=message):
        run(broken.parent / "out", broken)
    assert {p.name for p in broken.parent.iterdir()} <= {"broken"}


def test_a_quantized_model_is_not_quantized_again(run: Run, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)"):
        run(tmp_path / "out", finished)


def test_an_existing_output_is_not_lost(run: Run, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"exists and is not empty.*--force"):
            run(output, resume=resume)
    assert (output / "mine.txt").read_text() == "precious"
    run(output, force=True)
    assert model_bytes(output) == model_bytes(finished)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resuming_what_is_finished_does_nothing_and_says_the_same(run: Run, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    document = run(tmp_path / "out", resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert document["layers"] == read_manifest(finished)["layers"]
    assert document["output"] == str(tmp_path / "out")
    with pytest.raises(InputError, match="out: belongs to another job"):
        run(tmp_path / "out", resume=True, seed=1)


def test_an_empty_output_directory_is_used(run: Run, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path / "out")
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


def test_a_file_in_the_outputs_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_disk_that_is_too_small_is_seen_beforehand(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=rf"result takes .*, so \d+ bytes more are needed in {tmp_path}, and 100000"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_activations(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result would fit; it does not beside the file that holds the activations when memory is short."""
    words = {"samples": 200, "seq_len": 200, "calibration": str(DEMO / "calibration.txt")}
    result = run(tmp_path / "dry", dry_run=True, **words)["predicted"]["output_bytes"]
    usage = shutil.disk_usage(tmp_path)._replace(free=int(result * 1.1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(pipeline, "choose_frugal", lambda *_: True)
    spilled = 200 * 200 * 64 * compute_dtype().itemsize / 1e6
    with pytest.raises(InputError, match=rf"and {spilled:.1f} MB of activations on the way, so \d+ bytes more"):
        run(tmp_path / "out", **words)
    assert not list(tmp_path.iterdir())


def test_a_model_that_overflows_on_the_text(run: Run, broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 1e25
    tensors["model.layers.0.mlp.gate_proj.weight"][:] = 1e25
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError, match=r"down_proj: \d+ of \d+ calibration activations are not finite"):
        run(broken.parent / "out", broken)


# --- interrupted


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, at: int, after: bool = False) -> None:
    """Ctrl-C before or after the at-th call of a method of Work."""
    original, count = getattr(Work, method), [0]

    def interrupted(self: Work, *args: Any) -> None:
        count[0] += 1
        if count[0] == at + 1 and not after:
            raise KeyboardInterrupt
        original(self, *args)
        if count[0] == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, method, interrupted)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_at_any_shard_and_resumed(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, "write_shard", at, after)
        with pytest.raises(KeyboardInterrupt):
            run(output)
    assert not output.exists()
    with pytest.raises(InputError, match=r"an earlier run was interrupted\. Finish it with --resume"):
        run(output)
    document = run(output, resume=True)
    assert model_bytes(output) == model_bytes(finished)
    assert [r["name"] for r in document["layers"]] == [r["name"] for r in read_manifest(finished)["layers"]]
    assert read_manifest(output)["fingerprint"] == read_manifest(finished)["fingerprint"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resumed_blocks_are_not_computed_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "write_report", 0, after=True)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    shards = []
    original = Work.write_shard
    monkeypatch.setattr(Work, "write_shard", lambda self, name, *a: (shards.append(name), original(self, name, *a))[1])
    run(tmp_path / "out", resume=True)
    assert shards == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


def test_resume_with_activations_rounded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches that pass a finished block again must be rounded there as they were the first time."""
    run(tmp_path / "whole", scheme="w8a8")
    with monkeypatch.context() as patch:
        interrupt(patch, "write_report", 0, after=True)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", scheme="w8a8")
    run(tmp_path / "out", scheme="w8a8", resume=True)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("scheme", "method", "settings"),
    [
        ("e8p2", "quip", {"follow_original": "true"}),
        ("any4-g32", "gptq", {"follow_original": "true"}),
        ("w3a16-g32", "signround", {"iterations": "5"}),
        ("w3a16-g32", "awq+signround", {"iterations": "5", "scope": "model"}),
    ],
)
def test_resume_beside_the_original(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, method: str, settings: dict[str, str]
) -> None:
    """The original's batches must pass a finished block again too, with the original's weights."""
    words: dict[str, Any] = {"scheme": scheme, "method": method, "set": tuple(settings.items())}
    run(tmp_path / "whole", **words)
    with monkeypatch.context() as patch:
        interrupt(patch, "write_report", 0, after=True)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", **words)
    run(tmp_path / "out", resume=True, **words)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scheme": "w3a16-g32"}, 'scheme: was "w4a16-g32", is "w3a16-g32"'),
        ({"method": "rtn"}, 'method: was "gptq", is "rtn"'),
        ({"set": (("sweeps", "1"),)}, r'set: was \{\}, is \{"sweeps": "1"\}'),
        ({"seed": 5}, "calibration: was .*; seed: was 0, is 5"),
        ({"calibration": "OTHER"}, "calibration: was"),
        ({"model": "OTHER"}, "model: was"),
    ],
)
def test_resume_of_another_job_names_what_differs(
    run: Run, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], what: str
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "write_report", 0, after=True)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    before = model_bytes(tmp_path / "out.partial")
    if "model" in change:
        tensors = load_file(broken / "model.safetensors")
        save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}, broken / "model.safetensors")
        change = {"model": broken}
    if "calibration" in change:
        (tmp_path / "other.txt").write_text("other words, many times. " * 100)
        change = {"calibration": str(tmp_path / "other.txt")}
    with pytest.raises(InputError, match=rf"belongs to another job, so it cannot be resumed \(.*{what}"):
        run(tmp_path / "out", resume=True, **change)
    assert model_bytes(tmp_path / "out.partial") == before


def test_a_moved_calibration_file_is_the_same_job(
    run: Run, finished: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "write_shard", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    shutil.copyfile(text_file, tmp_path / "moved.txt")
    run(tmp_path / "out", resume=True, calibration=str(tmp_path / "moved.txt"))
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


def test_force_starts_an_interrupted_run_over(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "write_report", 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", scheme="w8a8")
    run(tmp_path / "out", force=True)
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


def die_at(event: int) -> list[int]:
    """From now on, be killed just before the event-th change that this process makes in the file system."""
    count = [0]

    def counted(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    os.fsync, shutil.rmtree = counted(os.fsync), counted(shutil.rmtree)
    for name in ("replace", "rename", "unlink", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    return count


def count_events(run: Run, output: Path, **words: Any) -> int:
    def work() -> None:
        count = die_at(-1)
        run(output, **words)
        (output.parent / "count").write_text(str(count[0]))

    assert in_child(work) == 0
    return int((output.parent / "count").read_text())


def killed_at(run: Run, output: Path, event: int, **words: Any) -> int:
    def work() -> None:
        die_at(event)
        run(output, **words)

    return in_child(work)


def test_killed_at_file_system_events_and_resumed(run: Run, finished: Path, tmp_path: Path) -> None:
    """kill -9 at seeded random changes on disk and at every one of the last: no half-made OUT, identical bytes."""
    total = count_events(run, tmp_path / "counted")
    first = random.Random(0).sample(range(1, total - 5), 5)
    for event in (*first, *range(total - 5, total + 1)):
        place = tmp_path / f"at-{event}"
        place.mkdir()
        assert killed_at(run, place / "out", event) == -signal.SIGKILL
        if (place / "out").exists():
            assert model_bytes(place / "out") == model_bytes(finished)
        run(place / "out", resume=True)
        assert model_bytes(place / "out") == model_bytes(finished)
        assert read_manifest(place / "out")["files"] == read_manifest(finished)["files"]
        assert [p.name for p in place.iterdir()] == ["out"]
        assert not (place / "out" / ".work").exists()


def test_killed_at_random_times_and_resumed(run: Run, finished: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    assert in_child(lambda: run(tmp_path / "timed")) == 0
    seconds = time.perf_counter() - start
    output, killed = tmp_path / "out", 0
    for fraction in (0.5, 0.75, 0.9):
        child = os.fork()
        if child == 0:
            run(output, resume=True)
            os._exit(0)
        try:
            time.sleep(seconds * fraction)
        finally:
            os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if output.exists():
            break
    assert killed
    if not output.exists():
        run(output, resume=True)
    assert model_bytes(output) == model_bytes(finished)


def test_killed_while_replacing_an_output(run: Run, finished: Path, tmp_path: Path) -> None:
    """Killed near the end of a --force run: the old OUT is whole or gone, and --resume puts the new one there."""
    shutil.copytree(finished, tmp_path / "counted")
    total = count_events(run, tmp_path / "counted", scheme="w8a8", force=True)
    for event in range(total - 6, total + 1):
        place = tmp_path / f"at-{event}"
        output = place / "out"
        shutil.copytree(finished, output)
        assert killed_at(run, output, event, scheme="w8a8", force=True) == -signal.SIGKILL
        if output.exists():
            assert model_bytes(output) in (model_bytes(finished), model_bytes(tmp_path / "counted"))
        run(output, scheme="w8a8", resume=True)
        assert model_bytes(output) == model_bytes(tmp_path / "counted")
        assert [p.name for p in place.iterdir()] == ["out"]


# --- the disk fills up


@pytest.mark.parametrize("nth", [1, 2, 4, 6, 9])
def test_disk_full_keeps_what_is_finished(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    original, count = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        count[0] += 1
        if count[0] == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match=r"out\.partial: the disk is full .*--resume"):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", resume=True)
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


def test_a_real_limit_on_file_size(run: Run, finished: Path, tmp_path: Path) -> None:
    """The blocks' shards fit under the limit, the shard with the embeddings does not."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        run(tmp_path / "out")

    assert in_child(work, tmp_path / "message") == 2
    assert "the disk is full" in (tmp_path / "message").read_text()
    assert (tmp_path / "out.partial" / "model-00002-of-00003.safetensors").exists()
    run(tmp_path / "out", resume=True)
    assert model_bytes(tmp_path / "out") == model_bytes(finished)
