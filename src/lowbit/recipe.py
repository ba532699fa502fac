"""Recipe: everything that decides what a quantized model will be, as one frozen value and as a YAML file.

    scheme: w4a16-g128
    method: gptq
    calibration: my_prompts.jsonl
    samples: 128
    seq_len: 512
    seed: 0
    kv: int8
    ignore: [lm_head]
    override: {"layers.0.*": w8a16}
    set: {dampening_frac: 0.05}

The manifest of any output directory holds the same words, so it can be given back as a recipe.
"""

import fnmatch
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lowbit.errors import InputError, nearest
from lowbit.kv_scheme import KvScheme
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Recipe:
    scheme: str = "w4a16"
    method: str = "gptq"
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    kv: str | None = None  # how keys and values are cached; None: in 16 bits
    ignore: tuple[str, ...] = ()
    override: tuple[tuple[str, str], ...] = ()
    set: tuple[tuple[str, str], ...] = ()
    repair: float = 0.0  # the relative output error from which a linear is tried again in other ways; 0: never

    def __post_init__(self) -> None:
        Scheme.parse(self.scheme)
        for _, scheme in self.override:
            if Scheme.parse(scheme).products:
                raise InputError(
                    f"override {scheme!r}: -bmm is about a whole model's attention: give it with --scheme."
                )
        if self.kv is not None:
            KvScheme.parse(self.kv)
        if not 0 <= self.repair < 1:
            raise InputError(f"repair is a relative error from 0 (off) to 1, got {self.repair}.")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}.")
        for name in ("samples", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def scheme_of(self, linear: str) -> Scheme:
        """The scheme of a linear by its full name: ignore first, then the last override that matches.

        Globs match the whole name or any tail of it after a dot: 'layers.0.*' matches model.layers.0.mlp.up_proj.
        """
        if any(matches(pattern, linear) for pattern in self.ignore):
            return Scheme(None)
        for pattern, scheme in reversed(self.override):
            if matches(pattern, linear):
                return Scheme.parse(scheme)
        return replace(Scheme.parse(self.scheme), products=False)

    @property
    def kv_scheme(self) -> KvScheme | None:
        return None if self.kv is None else KvScheme.parse(self.kv)

    @property
    def stores_kv_scales(self) -> bool:
        """Whether calibration has to find scales of keys and values."""
        return self.kv_scheme is not None and self.kv_scheme.static

    @property
    def products(self) -> bool:
        """Whether attention's two batched products are to be computed in int8."""
        return Scheme.parse(self.scheme).products

    def to_dict(self) -> dict[str, Any]:
        """The words of the YAML form."""
        return asdict(self) | {"ignore": list(self.ignore), "override": dict(self.override), "set": dict(self.set)}


def matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The words of a recipe file (YAML, or a lowbit.json manifest) as keyword arguments of Recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        words = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not a readable recipe: {' '.join(str(error).split())[:300]}.") from error
    if isinstance(words, dict) and isinstance(words.get("recipe"), dict):
        words = words["recipe"]
    if not isinstance(words, dict):
        raise InputError(f"{path}: a recipe is a mapping such as 'scheme: w4a16', got {type(words).__name__}.")
    known = {f.name for f in fields(Recipe)}
    for key in words:
        if key not in known:
            raise InputError(f"{path}: unknown word {key!r}. {nearest(str(key), sorted(known))}")
    return {key: _checked(path, key, value) for key, value in words.items()}


def _checked(path: Path, key: str, value: Any) -> Any:
    expected: dict[str, Any] = {
        "scheme": str, "method": str, "calibration": (str, type(None)), "samples": int, "seq_len": int, "seed": int,
        "kv": (str, type(None)),
        "ignore": list, "override": dict, "set": dict,
        "repair": (float, int),
    }  # fmt: skip
    if not isinstance(value, expected[key]) or isinstance(value, bool):
        raise InputError(f"{path}: {key} has the wrong type ({type(value).__name__}: {value!r}).")
    if isinstance(value, dict):
        return tuple((str(k), str(v).lower() if isinstance(v, bool) else str(v)) for k, v in value.items())
    return tuple(map(str, value)) if isinstance(value, list) else value
