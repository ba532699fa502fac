"""From measured speed to money: cost per million tokens, per month, and where owning breaks even with renting tokens.

    requests a second of one machine  = batch / (TTFT + TPOT (output - 1)) x utilization
    machines                          = ceil(requests needed / that)
    per month                         = machines x price per hour x 730
    per million generated tokens      = price per hour / (3600 x generated tokens a second x utilization) x 10^6

Utilization is the share of the time that a machine really computes; traffic has nights. whatif.js computes the same
in the page, and a test holds the two against each other.
"""

import math
from dataclasses import dataclass

HOURS_PER_MONTH = 730.0
DAYS_PER_MONTH = HOURS_PER_MONTH / 24


@dataclass(frozen=True)
class Traffic:
    """What is asked of the service, in tokens, sequences and requests a day."""

    prompt: int
    output: int
    batch: int
    requests_per_day: float
    utilization: float = 0.5


def seconds_per_request(ttft: float, tpot: float, traffic: Traffic) -> float:
    return ttft + tpot * (traffic.output - 1)


def per_million_tokens(usd_per_hour: float, tokens_per_s: float, utilization: float = Traffic.utilization) -> float:
    """US dollars for a million generated tokens on hardware of one's own."""
    return usd_per_hour / (3600 * tokens_per_s * utilization) * 1e6


def own_cost(ttft: float, tpot: float, usd_per_hour: float, traffic: Traffic) -> dict[str, float]:
    """{machines, per_month, per_million_output_tokens} on hardware of one's own; at least one machine."""
    rate = traffic.batch / seconds_per_request(ttft, tpot, traffic) * traffic.utilization  # requests a second
    machines = max(1, math.ceil(traffic.requests_per_day / 86400 / rate - 1e-9))
    return {
        "machines": machines,
        "per_month": machines * usd_per_hour * HOURS_PER_MONTH,
        "per_million_output_tokens": per_million_tokens(usd_per_hour, rate * traffic.output, utilization=1.0),
    }


def hosted_cost(input_per_million: float, output_per_million: float, traffic: Traffic) -> dict[str, float]:
    """{per_month, per_request} of a model that is paid by the token."""
    each = (traffic.prompt * input_per_million + traffic.output * output_per_million) / 1e6
    return {"per_month": each * traffic.requests_per_day * DAYS_PER_MONTH, "per_request": each}


def break_even_requests_per_day(
    ttft: float, tpot: float, usd_per_hour: float, per_request: float, traffic: Traffic
) -> float | None:
    """Requests a day that pay for one machine, or None if it cannot serve that many: then tokens are cheaper always."""
    if per_request <= 0:
        return None
    a_day = traffic.batch / seconds_per_request(ttft, tpot, traffic) * traffic.utilization * 86400  # one machine's
    needed = usd_per_hour * 24 / per_request  # what one machine must serve to pay for itself
    return needed if needed <= a_day else None
