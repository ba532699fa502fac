"""From config to modules: a skeleton without weights, filled one module at a time."""

import contextlib
import io
import re
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from lowbit.errors import InputError
from lowbit.formats import kv_cache
from lowbit.formats.compressed_tensors import unpack_input
from lowbit.formats.gguf_tokenizer import read_tokenizer
from lowbit.formats.kv_cache import KvCache
from lowbit.formats.readers import find_reader
from lowbit.model.checkpoint import FLOAT_TYPES, Checkpoint
from lowbit.model.linearize import linearize
from lowbit.model.names import stored_names, under_model_names
from lowbit.model.walk import Blocks, attentions
from lowbit.scheme import Scheme
from lowbit.tensor import InputGrid, QuantizedTensor

_MOST_BUFFER_BYTES = 2 * 2**30


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of checkpoint.config with every parameter on the meta device (no memory) and buffers computed, and
    every matrix product an nn.Linear (linearize.py). `open_source` gives the tensors under this model's names.

    A quantization_config is ignored: the skeleton is the full-precision architecture. Raises InputError if
    transformers does not know the architecture.
    """
    config_dict = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        with quiet_transformers():
            model = _build(checkpoint, config_dict)
            compute_buffers(model)
    except InputError:
        raise
    except Exception as error:  # whatever a strange config makes transformers raise, the config is at fault
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"{checkpoint.path / 'config.json'}: transformers cannot build a language model of model_type "
            f"{config_dict.get('model_type')!r} (architectures {config_dict.get('architectures')}): {reason}"
        ) from error
    model.eval()
    model.requires_grad_(False)
    linearize(model, *stored_names(model, checkpoint))
    check_names(model, under_model_names(model, checkpoint))
    return model


def _build(checkpoint: Checkpoint, words: dict[str, Any]) -> PreTrainedModel:
    """The class that `architectures` names if transformers has it, else the causal language model of the config."""
    names = words.get("architectures")
    own_code = words.get("auto_map")
    if own_code and not checkpoint.trust_remote_code and words.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.path}: this model brings its own code ({own_code}), and transformers has none for "
            f"model_type {words.get('model_type')!r}. If you trust it, let it run with --trust-remote-code."
        )
    if own_code and checkpoint.trust_remote_code:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype, trust_remote_code=True)
    config = AutoConfig.for_model(**words)
    if config.is_encoder_decoder:
        raise InputError(
            f"{checkpoint.path}: an encoder-decoder model (model_type {words.get('model_type')!r}). lowbit quantizes "
            "models with one stack of blocks: decoders and encoders."
        )
    text = config.get_text_config()
    for key in ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        if (getattr(text, key, None) or 0) > 10 * len(checkpoint.tensors):  # stacked experts are few tensors
            raise InputError(
                f"{checkpoint.path}: config.json has {key} = {getattr(text, key)}, but the files hold only "
                f"{len(checkpoint.tensors)} tensors. The config and the weights belong to different models."
            )
    name = names[0] if isinstance(names, list) and names else None
    own: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    with torch.device("meta"):
        if getattr(own, "config_class", None) is type(config):
            return own._from_config(config, dtype=checkpoint.dtype)
        return AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)


def compute_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no file holds (rotary frequencies) their values, by transformers' own initialization."""
    buffers = dict(model.named_non_persistent_buffers())
    size = sum(b.nbytes for b in buffers.values())
    if size > _MOST_BUFFER_BYTES:
        raise InputError(f"the config asks for buffers of {size / 1e9:.0f} GB, which is more than any model needs.")
    owners = {name.rpartition(".")[0] for name in buffers}
    for owner in owners:
        module = model.get_submodule(owner)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        model._init_weights(module)


def check_names(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise InputError if the files and the architecture disagree about a parameter's name or shape."""
    suffix = r"\.(weight_packed|qweight)$" if checkpoint.quantization else r"$^"
    stored = {re.sub(suffix, ".weight", name) for name in checkpoint.tensors}
    tied = set(model.all_tied_weights_keys)
    missing = [n for n, _ in model.named_parameters() if n not in stored and n not in tied]
    if missing:
        raise InputError(
            f"{checkpoint.path}: {len(missing)} of the model's parameters are in no shard, the first is "
            f"{missing[0]!r}. The weights belong to another architecture or an older layout than config.json says."
        )
    surplus = _beyond_the_blocks(model, checkpoint)
    if surplus is not None:
        raise InputError(
            f"{checkpoint.path}: {surplus!r} is stored, but by config.json there is no such block. The config and the "
            "weights belong to different models."
        )
    for name, parameter in model.named_parameters():
        info = checkpoint.tensors.get(name)
        if info is not None and not checkpoint.quantization and info.dtype not in FLOAT_TYPES:
            raise InputError(
                f"{checkpoint.path}: {name!r} is stored as {info.dtype} in {info.shard}, and config.json has no "
                "quantization_config that says what its values mean."
            )
        if info is not None and info.shape != tuple(parameter.shape):
            raise InputError(
                f"{checkpoint.path}: {name!r} is {list(info.shape)} in {info.shard} but config.json makes it "
                f"{list(parameter.shape)}. The config and the weights belong to different models."
            )


def _beyond_the_blocks(model: PreTrainedModel, checkpoint: Checkpoint) -> str | None:
    """The first stored tensor of a numbered module that the model lacks, such as model.layers.40.mlp, unless the
    model class says that it does without."""
    known = {n for n, _ in model.named_modules()}
    spared = model._keys_to_ignore_on_load_unexpected or ()
    for name in checkpoint.tensors:
        parts = name.split(".")
        numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        absent = any(m not in known and m.rpartition(".")[0] in known for m in numbered)  # its list is there
        if absent and not any(re.search(pattern, name) for pattern in spared):
            return name
    return None


@dataclass(frozen=True)
class Source:
    """A checkpoint and the schemes of the linears that it stores quantized (none for an ordinary model)."""

    checkpoint: Checkpoint
    schemes: Mapping[str, Scheme]

    @property
    def rotated(self) -> bool:
        """Whether any linear is stored in a rotated basis."""
        return any(name.endswith(".weight_in_signs") for name in self.checkpoint.tensors)

    def linear(self, name: str) -> QuantizedTensor | None:
        """The quantized weight of linear `name`, or None if it is stored as it was."""
        config = self.checkpoint.quantization
        if name not in self.schemes or config is None:
            return None
        return find_reader(config).unpack(name, self.checkpoint.get, self.schemes[name], config)

    def input_grid(self, name: str) -> InputGrid | None:
        """How the input of linear `name` is rounded, or None if it is not."""
        return unpack_input(name, self.checkpoint.get, self.schemes[name]) if name in self.schemes else None


def stored_kv_cache(model: PreTrainedModel, source: Source) -> KvCache | None:
    """How the directory wants keys and values cached, with its scales; None: in 16 bits. Raises InputError."""
    scheme = kv_cache.scheme_of(source.checkpoint.config)
    if scheme is None:
        return None
    config, checkpoint = model.config.get_text_config(), source.checkpoint
    names, heads = attentions(model), int(config.num_attention_heads)
    return kv_cache.unpack(scheme, names, heads, checkpoint.get, str(checkpoint.path))


def open_source(model: PreTrainedModel, checkpoint: Checkpoint) -> Source:
    """The checkpoint under the names of `model`, a skeleton made from it."""
    checkpoint = under_model_names(model, checkpoint)
    config = checkpoint.quantization
    if not config:
        return Source(checkpoint, {})
    linears = {checkpoint.stored_module(n): n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    embeddings = {checkpoint.stored_module(n): n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tensors = {checkpoint.stored_tensor(t): t for t in checkpoint.tensors}
    schemes = find_reader(config).schemes(
        config, list(linears), list(embeddings), tensors, lambda t: checkpoint.get(tensors[t])
    )
    return Source(checkpoint, {(linears | embeddings)[n]: scheme for n, scheme in schemes.items()})


def materialize(
    model: nn.Module, name: str, source: Source, dtype: torch.dtype, skip: Container[str] = ()
) -> nn.Module:
    """Load the weights of submodule `name` (all below it, but those in `skip`) as `dtype`, quantized ones dequantized;
    return it."""
    module = model.get_submodule(name)
    for key in module.state_dict():
        full = f"{name}.{key}" if name else key
        owner, _, attribute = key.rpartition(".")
        if full in skip:
            continue
        linear = source.linear(full.removesuffix(".weight")) if attribute == "weight" else None
        if linear is not None:
            value = linear.dequantize(dtype)
        elif full in source.checkpoint.tensors:
            value = source.checkpoint.get(full).to(dtype)
        else:
            continue
        target = module.get_submodule(owner)
        is_parameter = attribute in target._parameters
        setattr(target, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return module


def materialize_outside(
    model: PreTrainedModel, blocks: Blocks, source: Source, dtype: torch.dtype, skip: Container[str] = ()
) -> None:
    """Load everything that is not in the blocks: embeddings, final norm, head; ties are tied again."""
    parents = {blocks.name.rpartition(".")[0]}
    for parent in list(parents):
        while parent:
            parent = parent.rpartition(".")[0]
            parents.add(parent)
    for parent in parents:
        for child, _ in model.get_submodule(parent).named_children():
            name = f"{parent}.{child}" if parent else child
            if name not in parents and name != blocks.name:
                materialize(model, name, source, dtype, skip)
    model.tie_weights()


def release(module: nn.Module) -> None:
    """Drop the memory of a module's parameters."""
    module.to("meta")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings, notices or progress bars of transformers within."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's tokenizer. Raises InputError if there is none that can be read."""
    tokenizer = _stored_tokenizer(checkpoint)
    rows = checkpoint.text_config.get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise InputError(
            f"{checkpoint.path}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows: they "
            "belong to different models."
        )
    return tokenizer


def _stored_tokenizer(checkpoint: Checkpoint) -> Any:
    if checkpoint.gguf is not None:
        return read_tokenizer(checkpoint.gguf.file.metadata, checkpoint.name)
    if not any(
        (checkpoint.path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(
            f"{checkpoint.path}: no tokenizer (tokenizer.json, tokenizer.model, vocab.json). Text cannot be turned "
            "into tokens without it; copy it from the model's origin."
        )
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(checkpoint.path)
    except Exception as error:  # the tokenizer's loaders raise many unrelated types; the files are at fault
        raise InputError(
            f"{checkpoint.path}: the tokenizer cannot be loaded: {str(error).splitlines()[0][:300]}"
        ) from error
