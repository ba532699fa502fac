"""lowbit: fewer bits, faster answers, and a measured account of what that cost.

The public functions mirror the command line and are imported when first used, so that `import lowbit` stays light
(no torch).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "quantize": "lowbit.tuning.mixed",
    "Recipe": "lowbit.recipe",
    "evaluate": "lowbit.accuracy",
    "bench": "lowbit.speed",
    "tune": "lowbit.tuning",
    "export": "lowbit.exporting",
    "load": "lowbit.runtime.engine",
    "SamplingParams": "lowbit.runtime.sampling",
    "Scheduler": "lowbit.runtime.scheduler",
    "generate_batch": "lowbit.runtime.batch",
    "verify": "lowbit.inspect",
    "Scheme": "lowbit.scheme",
    "QuantizedTensor": "lowbit.tensor",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
