"""Is the calibration text of the same kind as the text that the model is judged on? A cheap check, no model needed.

Jensen-Shannon divergence between the token frequencies of the two, in bits (0: equal, 1: no token in common), beside
what two random halves of the evaluation text differ by: texts of a few thousand tokens differ by chance already.
"""

from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

FAR = 2.5  # times the distance between halves of one text


def domain_distance(calibration: np.ndarray, evaluation: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """{distance, own, differs} for two arrays of token ids; `own` is the distance within the evaluation text."""
    size = min(len(calibration), len(evaluation) // 2)
    if size < 2:
        return {"distance": 0.0, "own": 0.0, "differs": False}
    rng = np.random.default_rng(seed)
    # blocks, not tokens: a topic fills a stretch of text
    first, second = _halves(evaluation, rng)
    distance = float(np.mean([divergence(_part(calibration, size, rng), half[:size]) for half in (first, second)]))
    own = divergence(first[:size], second[:size])
    return {"distance": distance, "own": own, "differs": distance > FAR * own and distance > 0.1}


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon divergence of two arrays of token ids, in bits."""
    most = int(max(a.max(), b.max())) + 1
    p, q = (np.bincount(x, minlength=most) for x in (a, b))
    return float(jensenshannon(p, q, base=2)) ** 2


def _halves(tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    blocks = np.array_split(tokens, min(64, max(2, len(tokens) // 64)))
    order = rng.permutation(len(blocks))
    middle = len(order) // 2
    return np.concatenate([blocks[i] for i in order[:middle]]), np.concatenate([blocks[i] for i in order[middle:]])


def _part(tokens: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` tokens in blocks from all over the text."""
    blocks = np.array_split(tokens, max(1, len(tokens) // 64))
    order = rng.permutation(len(blocks))
    return np.concatenate([blocks[i] for i in order])[:size]


def warning(found: dict[str, Any]) -> str | None:
    """What to tell the user, if the two texts are of different kinds."""
    if not found["differs"]:
        return None
    return (
        f"the calibration text is of another kind than the evaluation text: their tokens differ by "
        f"{found['distance']:.2f} bits, parts of the evaluation text among themselves by {found['own']:.2f}. "
        "Calibrate on text like the one the model will see."
    )
