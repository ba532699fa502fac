"""The small files of an output directory: config, index, tokenizer, manifest, card. All from what was decided."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import lowbit
from lowbit.artifact import MANIFEST, Work, disk_errors, file_hashes, write_json
from lowbit.calibration import Calibration
from lowbit.card import write_card
from lowbit.environment import peak_memory
from lowbit.model.checkpoint import INDEX, Checkpoint, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.model.stream import fingerprint
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme

_COPIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "*.jinja", "*.model", "LICENSE*",
)  # fmt: skip


def shard_name(index: int, blocks: int) -> str:
    """One shard a block, and one more for everything else."""
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def versions() -> dict[str, str]:
    return {"lowbit": lowbit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def document_of(
    output: Path, recipe: Recipe, layers: list[dict[str, Any]], seconds: float, stored_bits: int
) -> dict[str, Any]:
    """The `quantize` document; `stored_bits` a weight where no linear was quantized (a key-value cache alone)."""
    weights = sum(r["weights"] for r in layers)
    bits = sum(r["bits"] * r["weights"] for r in layers) / weights if weights else float(stored_bits)
    return {
        "output": str(output),
        "scheme": recipe.scheme,
        "method": recipe.method,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "bits_per_weight": bits,
        "layers": layers,
    }


def finish_directory(
    work: Work,
    checkpoint: Checkpoint,
    words: Mapping[str, Any],
    recipe: Recipe,
    calibration: Calibration | None,
    identity: Mapping[str, Any],
    document: dict[str, Any],
) -> None:
    """Write everything beside the shards, `words` into config.json; the manifest last, because it holds the others'
    hashes."""
    with disk_errors(work.path):
        config = {**checkpoint.config, **words}
        write_json(work.path / "config.json", config)
        write_json(work.path / INDEX, index_of(work.path))
        copy_small_files(checkpoint, work.path)
        manifest = {
            "lowbit_version": lowbit.__version__,
            "model": {"name": checkpoint.name, "digest": checkpoint.digest},
            "recipe": recipe.to_dict(),
            "calibration": None
            if calibration is None
            else {"source": calibration.source, "digest": calibration.digest, "tokens": calibration.tokens.numel()},
            "identity": identity,
            "summary": {k: v for k, v in document.items() if k not in ("layers", "output")},
            "layers": document["layers"],
            "fingerprint": fingerprint(open_checkpoint(work.path)),
            "files": file_hashes(work.path),
        }
        write_json(work.path / MANIFEST, manifest)
        write_card(work.path, manifest, document)


def named_twice(schemes: Mapping[str, Scheme], checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Linears under the files' names, which vLLM goes by, and under the model class's, which transformers goes by."""
    stored = {checkpoint.stored_module(name): scheme for name, scheme in schemes.items()}
    return stored | dict(schemes)


def copy_small_files(checkpoint: Checkpoint, target: Path) -> None:
    """Tokenizer, chat template, generation settings, licence: as the model has them (a GGUF file: its tokenizer)."""
    if checkpoint.gguf is not None:
        load_tokenizer(checkpoint).save_pretrained(target)
        return
    for pattern in (*_COPIED, *(("*.py",) if checkpoint.trust_remote_code else ())):
        for file in checkpoint.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def index_of(path: Path) -> dict[str, Any]:
    """The index of the shards in a directory, from their headers."""
    weight_map, total = {}, 0
    for shard in sorted(path.glob("model-*.safetensors")):
        with shard.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                weight_map[name] = shard.name
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
