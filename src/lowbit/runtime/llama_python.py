"""llama.cpp as an engine: its server for speed, and for accuracy its library through llama-cpp-python if that is there.

llama-server says what it expects after one prompt, a request for every token of a text. The library gives the logits
of all of them from one pass.
"""

import importlib.util
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.runtime.served import ServedEngine


class LlamaCppEngine(ServedEngine):
    """llama-server over a GGUF file."""

    @cached_property
    def _library(self) -> Any | None:
        """The file in llama-cpp-python, or None where it is not installed."""
        if importlib.util.find_spec("llama_cpp") is None:
            return None
        import llama_cpp

        return llama_cpp.Llama(
            str(self.checkpoint.path), n_ctx=self.context_length, logits_all=True, verbose=False,
            n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
        )  # fmt: skip

    def logits(self, tokens: Tensor) -> Tensor:
        library = self._library
        if library is None:
            return super().logits(tokens)
        rows = []
        for window in tokens.tolist():
            library.reset()
            library.eval(window)
            rows.append(torch.from_numpy(np.array(library.scores[: len(window)], dtype=np.float32)))
        return torch.stack(rows)
