"""llama.cpp as an engine: its server for speed, and for accuracy its library through llama-cpp-python if that is there.

llama-server says what it expects after one prompt, a request for every token of a text. The library gives the logits
of all of them from one pass.
"""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.runtime.served import ServedEngine


class LlamaCppEngine(ServedEngine):
    """llama-server over a GGUF file."""

    _loaded: Any = None

    def _library(self, length: int) -> Any:
        """The file in llama-cpp-python, for texts of `length` tokens: it makes room for all of their logits at once."""
        import llama_cpp

        if self._loaded is None or len(self._loaded.scores) < length:
            self._loaded = llama_cpp.Llama(
                str(self.checkpoint.path), n_ctx=length, logits_all=True, verbose=False,
                n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
            )  # fmt: skip
        return self._loaded

    def logits(self, tokens: Tensor) -> Tensor:
        if importlib.util.find_spec("llama_cpp") is None:
            return super().logits(tokens)
        library = self._library(tokens.shape[1])
        rows = []
        for window in tokens.tolist():
            library.reset()
            library.eval(window)
            rows.append(torch.from_numpy(np.array(library.scores[: len(window)], dtype=np.float32)))
        return torch.stack(rows)
