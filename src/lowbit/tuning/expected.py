"""What a candidate's answer will cost in time, before it is made: the sum of its products' times on this machine.

A decoding step is the linears one after the other, and how long a product takes depends on its shape and scheme alone
(kernel_times.py), not on the method that chose the codes. What is left out (attention, norms, the head) is the same for
all candidates. A scheme that no kernel here reads is computed from 16-bit weights and gains nothing.
"""

from collections import Counter
from collections.abc import Sequence

from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import skeleton
from lowbit.model.walk import find_blocks, linears
from lowbit.runtime.native import why_not
from lowbit.scheme import Scheme
from lowbit.tuning.kernel_times import product_seconds
from lowbit.tuning.mixed import AUTO, Budget

PLAIN = "none"  # bfloat16, as the original is
_BITS = (2, 3, 4, 8)


def expected_seconds(checkpoint: Checkpoint, schemes: Sequence[str]) -> dict[str, float] | None:
    """{scheme: seconds in the blocks' linears for one token}, the original's as PLAIN; None where lowbit's kernels do
    not run this model, so that nothing is known."""
    net = skeleton(checkpoint)
    if why_not(net.config, {}) is not None:
        return None
    inside = find_blocks(net).name + "."
    shapes = Counter(tuple(m.weight.shape) for name, m in linears(net).items() if name.startswith(inside))

    def total(scheme: str) -> float:
        return sum(product_seconds((rows, columns), scheme) * n for (rows, columns), n in shapes.items())

    plain = total(PLAIN)
    found = {PLAIN: plain}
    for word in dict.fromkeys(schemes):
        scheme = Scheme.parse(_uniform(word))
        if word.startswith(AUTO) and Budget.parse(word).unit == "seconds":
            found[word] = Budget.parse(word).amount
        elif why_not(net.config, dict.fromkeys(["x"], scheme)) is not None:
            found[word] = plain
        else:
            found[word] = total(_uniform(word))
    return found


def _uniform(word: str) -> str:
    """A mixed budget's nearest uniform scheme: the fewest bits that the kernels read and that hold as many."""
    if not word.startswith(AUTO):
        return word
    budget = Budget.parse(word)
    return f"w{min((b for b in _BITS if b >= budget.amount), default=8)}a16-g64" if budget.unit == "bits" else "w4a16"
