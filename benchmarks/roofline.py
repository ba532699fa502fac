"""docs/roofline.svg from results/kernels.json: how near the products come to what memory and arithmetic allow.

One point a case and number of rows: operations per byte of weights across, operations a second up, both logarithmic.
The slanted line is the measured read bandwidth, the flat one the measured rate of int8 dot products.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 440, 70, 30, 560, 380
X_RANGE, Y_RANGE = (1.0, 1000.0), (1e10, 2e12)
CASES = {"int4 g128": "#2563eb", "int8 per token": "#dc2626", "bf16": "#6b7280", "int2 g128": "#059669"}


def place(intensity: float, rate: float) -> tuple[float, float]:
    """Where a point lies, in pixels."""
    x = math.log(intensity / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])
    y = math.log(rate / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0])
    return LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP)


def line(points: list[tuple[float, float]], style: str) -> str:
    return f'<polyline fill="none" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def draw(document: dict) -> str:
    read, peak = document["read_bytes_per_s"], document["int8_ops_per_s"]
    ridge = peak / read
    parts = [line([place(X_RANGE[0], max(read, Y_RANGE[0])), place(ridge, peak), place(X_RANGE[1], peak)],
                  'stroke="#111" stroke-width="2"')]  # fmt: skip
    parts.append(text(*place(ridge * 3, peak * 1.15), f"int8 {peak / 1e12:.2f} TOP/s"))
    x, y = place(2.2, read * 2.2 * 1.5)
    parts.append(
        f'<text x="{x:.1f}" y="{y:.1f}" transform="rotate(-42 {x:.1f} {y:.1f})">read {read / 1e9:.0f} GB/s</text>'
    )
    for power in range(4):
        x, y = place(10**power, Y_RANGE[0])
        parts += [line([(x, y), (x, TOP)], 'stroke="#e5e7eb"'), text(x, y + 18, str(10**power))]
    for rate in (1e10, 1e11, 1e12):
        x, y = place(X_RANGE[0], rate)
        parts += [line([(x, y), (RIGHT, y)], 'stroke="#e5e7eb"'), text(x - 8, y + 4, f"{rate / 1e9:.0f}", "end")]
    for i, (case, colour) in enumerate(CASES.items()):
        rows = [r for r in document["rates"] if r["case"] == case]
        points = [place(r["ops"] / r["bytes"], r["ops"] / r["seconds"]) for r in rows]
        parts.append(line(points, f'stroke="{colour}" stroke-dasharray="3 3"'))
        for (x, y), r in zip(points, rows, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
                f"<title>{case}, {r['rows']} rows</title></circle>"
            )
        parts += [f'<circle cx="{RIGHT + 20}" cy="{TOP + 20 * i}" r="4" fill="{colour}"/>',
                  text(RIGHT + 30, TOP + 4 + 20 * i, case, "start")]  # fmt: skip
    parts += [text((LEFT + RIGHT) / 2, HEIGHT - 18, "operations per byte of weights (1, 2, 4, 8, 128 rows)"),
              text(LEFT, TOP - 12, "GOP/s", "end")]  # fmt: skip
    font = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    data = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    (ROOT / "docs" / "roofline.svg").write_text(draw(data))
