"""Which stored tensor is which parameter.

Files keep the names of the release they were written by; the model class has those of today (`block_sparse_moe` is
`mlp`, `language_model.model` is `model.language_model`, a base model's tensors lack its prefix). transformers knows
the renamings; here they are applied to the names alone, so that everything after this sees the model's names, and
what is written gets the files' names back.
"""

import re
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.linearize import TransposedLinear

_TAIL = re.compile(r"\.weight_(packed|scale|shape|zero_point)$")


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], list[WeightConverter]]:
    """({the model's name: the stored name}, the conversions that change more than names).

    Raises InputError if two stored tensors would be the same parameter.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    for stored in sorted(checkpoint.tensors):
        # a packed linear's tensors move as its weight would
        tail = _TAIL.search(stored)
        plain = _TAIL.sub(".weight", stored)
        name, _ = rename_source_key(plain, renamings, [], model.base_model_prefix, known)
        if tail:
            name = name.removesuffix(".weight") + tail[0]
        if name in names:
            raise InputError(f"{checkpoint.path}: {names[name]!r} and {stored!r} are both the parameter {name!r}.")
        names[name] = stored
    return names, converters


def under_model_names(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tensors under the model's names, and products as (out, in); once is enough."""
    if checkpoint.stored:
        return checkpoint
    names, _ = stored_names(model, checkpoint)
    transposed = frozenset(
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, TransposedLinear) and f"{n}.weight_scale" not in names  # quantized ones are (out, in)
    )
    tensors = {}
    for name, stored in names.items():
        info = checkpoint.tensors[stored]
        tensors[name] = replace(info, shape=info.shape[::-1]) if name in transposed else info
    modules = {n.rpartition(".")[0]: s.rpartition(".")[0] for n, s in names.items()}
    return replace(checkpoint, tensors=tensors, stored=names, stored_modules=modules, transposed=transposed)
