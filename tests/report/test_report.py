"""The report page: what it says, what it must not run or load, and what a browser makes of it."""

import copy
import html
import itertools
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowbit.report import write_report
from lowbit.report.view import _difference as difference
from lowbit.report.view import view
from lowbit.report.words import between, digits, duration, milliseconds, percent, size, times

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = '</script><img src=x onerror="window.hit=1">\'"&<!--<script>window.hit=1</script>—日本語\u2028{{ 7*7 }}'


def _bench(model: str, tpot: float, ttft: float, weights: int, memory: int) -> dict[str, Any]:
    return {
        "model": model,
        "runtime": "lowbit bfloat16",
        "scenario": {"prompt_length": 128, "output_length": 64, "batch_size": 1},
        "ttft_s": {"median": ttft, "p90": ttft * 1.04, "p99": None},
        "tpot_s": {"median": tpot, "p90": tpot * 1.05, "p99": None},
        "e2e_s": {"median": ttft + 63 * tpot, "p90": ttft + 66 * tpot, "p99": None},
        "throughput_tokens_per_s": 64 / (ttft + 63 * tpot),
        "mbu": weights / tpot / 84e9,
        "weight_bytes": weights,
        "peak_memory_bytes": memory,
    }


def _layers(bits: float, kept: float) -> list[dict[str, Any]]:
    """Eight blocks of seven linears; `kept` is the share of RTN's loss that is left in the first, falling slowly."""
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = []
    for block in range(8):
        for i, kind in enumerate(kinds):
            parent = "mlp" if i > 3 else "self_attn"
            share = min(1.0, kept * (1 - 0.04 * block) + 0.06 * ((i * 5 + block * 3) % 7) / 7) if kept < 1 else 1.0
            fallback = "gptq was worse on held-out rows" if kept < 1 and (block, i) == (3, 3) else None
            share = 1.0 if fallback else share
            layers.append(
                {
                    "name": f"model.layers.{block}.{parent}.{kind}",
                    "bits": bits,
                    "loss_rtn": 0.01 * (block + 1),
                    "loss": 0.01 * (block + 1) * share,
                    "seconds": 0.1,
                    "fallback": fallback,
                }
            )
    return layers


def _candidate(
    method: str, scheme: str, increase: float, kl: float, tpot: float, weights: int, verdict: str, kept: float = 1.0
) -> dict[str, Any]:
    name = f"{scheme}-{method}"
    bits = 4.125 if "w4" in scheme else 3.125 if "w3" in scheme else 8.02
    return {
        "name": name,
        "scheme": scheme,
        "method": method,
        "path": f"out/candidates/{name}",
        "error": None,
        "quantize": {
            "seconds": 8.4 if method == "gptq" else 1.2,
            "peak_memory_bytes": 420_000_000,
            "bits_per_weight": bits,
            "layers": _layers(bits, kept),
        },
        "evaluate": {
            "perplexity": 8.412 * (1 + increase),
            "perplexity_increase": increase,
            "perplexity_increase_stderr": max(abs(increase) * 0.12, 0.0002),
            "kl": {"mean": kl, "stderr": kl * 0.04},
            "top1_agreement": 1 - kl**0.5 / 1.5,
            "runtime": "lowbit bfloat16",
        },
        "bench": _bench(
            f"out/candidates/{name}", tpot, 0.021 * (tpot / 0.0041) ** 0.3, weights, 61_000_000 + 2 * weights
        ),
        "ratio": {
            "ttft": (0.0041 / tpot) ** 0.3,
            "tpot": 0.0041 / tpot,
            "throughput": 0.0041 / tpot * 0.96,
            "memory": 1.2,
            "intervals": {"tpot": {"low": 0.0041 / tpot * 0.95, "high": 0.0041 / tpot * 1.04, "confidence": 0.95}},
        },
        "verdict": verdict,
    }


@pytest.fixture
def document() -> dict[str, Any]:
    """A small tune document, made by hand: six measured candidates, one that crashed."""
    prompt = 'def read_all(path, encoding=\'utf-8\'):\n    """Return the text of a file."""\n'
    same = "    with open(path, encoding=encoding) as stream:\n        return stream.read"
    return {
        "lowbit_version": "0.1.0",
        "command": "tune",
        "environment": {
            "cpu": "AMD EPYC 9V74 80-Core Processor",
            "cores": 2,
            "threads": 2,
            "instruction_set": "AVX512",
            "gpu": None,
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "transformers": "5.3.0",
            "platform": "Linux-6.1-x86_64",
        },
        "seed": 0,
        "model": "demo",
        "output": "out",
        "text": "my prompts.jsonl",
        "limits": {"max_ppl_increase": 0.01, "max_memory": None, "optimize": "tpot"},
        "split": {"calibration_tokens": 71234, "selection_tokens": 23456, "confirmation_tokens": 23711},
        "peak_bandwidth_bytes_per_s": 84.2e9,
        "original": {
            "name": "demo",
            "evaluate": {"perplexity": 8.412, "runtime": "transformers float32"},
            "noise_floor": {"kl": 2.1e-5, "top1_agreement": 0.9981, "perplexity": 8.4127, "runtime": "lowbit bfloat16"},
            "bench": _bench("demo", 0.0041, 0.021, 33_600_000, 152_000_000),
        },
        "candidates": [
            _candidate("rtn", "w8a8", 0.0011, 3.1e-4, 0.0026, 18_200_000, "ok"),
            _candidate("gptq", "w8a8", 0.0007, 1.9e-4, 0.00262, 18_200_000, "ok", 0.86),
            _candidate("rtn", "w4a16", 0.0242, 1.9e-2, 0.00143, 10_900_000,
                       "too inaccurate: perplexity +2.42%, limit +1.00%"),
            _candidate("gptq", "w4a16", 0.0062, 6.1e-3, 0.00141, 10_900_000, "ok", 0.41),
            _candidate("rtn", "w3a16", 0.143, 1.1e-1, 0.00128, 9_400_000,
                       "too inaccurate: perplexity +14.30%, limit +1.00%"),
            _candidate("gptq", "w4a16-g32", 0.0051, 5.2e-3, 0.0046, 12_100_000, "no gain: 0.89x faster per token"),
            {"name": "w4a8-gptq", "scheme": "w4a8", "method": "gptq", "error": "the process was killed",
             "verdict": "failed: the process was killed"},
        ],
        "pareto": ["w8a8-gptq", "w8a8-rtn", "w4a16-gptq", "w3a16-rtn"],
        "recommendation": {
            "name": "w4a16-gptq",
            "reasons": [
                "2.91x the original's time per token, best within the limits",
                "perplexity +0.62% ± 0.07% on text that chose nothing (limit +1.00%), KL 0.00610",
                "weights 10.9 MB, 4.12 bits per quantized weight",
            ],
        },
        "samples": [
            {
                "prompt": prompt,
                "outputs": {
                    "original": same + "()\n\n\ndef write_all(path, text):\n    with open(path, 'w') as stream:\n",
                    "w8a8-rtn": same + "()\n\n\ndef write_all(path, text):\n    with open(path, 'w') as stream:\n",
                    "w8a8-gptq": same + "()\n\n\ndef write_all(path, text):\n    with open(path, 'w') as stream:\n",
                    "w4a16-gptq": same + "()\n\n\ndef write_text(path, text):\n    open(path, 'w').write(text)\n",
                    "w4a16-rtn": same + "lines()\n\n\nclass Reader:\n    def __init__(self, path):\n",
                    "w3a16-rtn": "    return path\n\n\ndef read_all(path, path):\n    return path\n",
                },
            }
        ],
    }  # fmt: skip


@pytest.fixture
def bare() -> dict[str, Any]:
    """A document in which everything that may be missing is."""
    return {
        "model": "demo",
        "candidates": [
            {"name": "w4a16-rtn", "scheme": "w4a16", "method": "rtn", "error": "killed", "verdict": "failed: killed"},
            {"name": "w8a8-rtn", "scheme": "w8a8", "method": "rtn", "quantize": None, "evaluate": None, "bench": None,
             "ratio": None, "error": None, "verdict": None},
        ],
        "recommendation": {"name": "original", "reasons": []},
    }  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, the visible text, the headings, and the text of each script."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


def _page(document: dict[str, Any], folder: Path) -> Page:
    write_report(document, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- what the page says ----


def test_one_sentence_says_what_to_do_with_its_numbers(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    assert "Use w4a16-gptq: 2.91× faster per token, +0.62 % perplexity." in page.text
    for reason in document["recommendation"]["reasons"]:
        assert reason in page.text
    assert "4.10 ms → 1.41 ms" in page.text
    assert "95 %: +0.47 % to +0.77 %" in page.text  # 0.0062 ± 1.96 x 0.12 x 0.0062


def test_do_not_quantize_is_an_answer(document: dict[str, Any], tmp_path: Path) -> None:
    document["recommendation"] = {"name": "original", "reasons": ["no candidate is an answer"]}
    page = _page(document, tmp_path)
    assert (
        "Do not quantize: nothing measured here is faster per token within a perplexity increase of 1 %." in page.text
    )
    assert "vllm serve" not in page.text


def test_every_candidate_has_a_row_and_the_crashed_one_its_reason(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    rows = view(document)["rows"]
    assert [r["name"] for r in rows] == ["original", *(c["name"] for c in document["candidates"])]
    assert rows[-1]["note"] == "failed: the process was killed"
    assert {word for cell in rows[-1]["cells"] for word in cell if word} == {"–"}
    assert page.text.count("failed: the process was killed") == 1


def test_picture_has_a_point_for_the_original_and_each_measured_candidate(
    document: dict[str, Any], tmp_path: Path
) -> None:
    page = _page(document, tmp_path)
    data = json.loads(next(s for s in page.scripts if s.lstrip().startswith("{")))
    assert data["limit"] == 1.0
    assert {p["name"]: p["kind"] for p in data["points"]} == {
        "original": "original", "w8a8-rtn": "ok", "w8a8-gptq": "ok", "w4a16-rtn": "out", "w4a16-gptq": "chosen",
        "w3a16-rtn": "out", "w4a16-g32-gptq": "out",
    }  # fmt: skip
    gptq = next(p for p in data["points"] if p["name"] == "w4a16-gptq")
    assert (gptq["x"], gptq["ppl"], gptq["kl"], gptq["bytes"]) == pytest.approx((1.41, 0.62, 0.0061, 10.9e6))
    assert gptq["pareto"]
    assert not next(p for p in data["points"] if p["name"] == "w4a16-rtn")["pareto"]
    # and the same in words, and as a table
    said = next(a["aria-label"] or "" for _, a in page.tags if a.get("id") == "chart")
    assert "w4a16-gptq: time per token 1.41 ms" in " ".join(said.split())
    assert "The picture as a table" in page.text


def test_every_point_that_is_ruled_out_says_why(document: dict[str, Any], tmp_path: Path) -> None:
    """Above the limit the picture says it; a point within it and yet no answer is a square with its reason."""
    page = _page(document, tmp_path)
    points = {p["name"]: p for p in view(document)["chart"]["points"]}
    assert points["w4a16-g32-gptq"]["ppl"] < view(document)["chart"]["limit"]
    assert {n for n, p in points.items() if p["elsewhere"]} == {"w4a16-g32-gptq"}
    for c in document["candidates"][:-1]:
        said = {"ok": "within the limits"}.get(c["verdict"], c["verdict"])
        said = "recommended" if c["name"] == "w4a16-gptq" else said
        assert ["verdict", said] in points[c["name"]]["words"]
    assert "ruled out: too inaccurate ruled out: no gain" in page.text  # the legend
    assert page.text.count("no gain: 0.89x faster per token") == 2  # the picture as a table; before and after


@pytest.mark.parametrize(
    ("verdict", "short"),
    [
        ("too large: peak memory 100 MB, limit 10 MB", "too large: peak memory"),
        ("no gain: 0.89x faster per token", "no gain"),
        ("not outside the noise: 1.20x faster per token, 95% interval", "not outside the noise"),
        ("too inaccurate: right answers lost: 4.00 points, limit 1.00 points (quiz ...)",
         "too inaccurate: right answers lost"),
        ("failed: running failed", "failed: running failed"),
        ("not judged", "not judged"),
    ],
)  # fmt: skip
def test_the_legend_names_reasons_without_their_figures(verdict: str, short: str, document: dict[str, Any]) -> None:
    document["candidates"][0]["verdict"] = verdict
    assert short in view(document)["ruled_out"]["square"]


def test_answers_throughput_and_cost_are_shown_where_they_were_asked_for(
    document: dict[str, Any], tmp_path: Path
) -> None:
    plain = view(document)
    assert "Right answers" not in plain["columns"]
    assert "US$ per million" not in plain["columns"]
    document["limits"] |= {"optimize": "cost", "tasks": ["quiz.yaml"], "concurrency": 8, "max_task_drop": 0.02}
    asked = {"quiz": {"metrics": {"acc": {"value": 0.75}}}}
    chosen = document["candidates"][3]
    chosen["evaluate"]["tasks"] = asked
    chosen["task_drops"] = [{"task": "quiz", "metric": "acc", "mcnemar": {"p_value": 0.031}}]
    chosen |= {"concurrent": {"throughput_tokens_per_s": 4321.0}, "cost_per_million_tokens": 0.0129}
    chosen["ratio"]["cost"] = 2.5
    page = _page(document, tmp_path).text
    for part in ("75 %quiz, acc, p = 0.031", "4321 with 8 at once", "0.0129", "2.50× cheaper per token"):
        assert part in page
    assert "--tasks quiz.yaml --max-task-drop 0.02 --concurrency 8 --optimize cost" in view(document)["reproduce"]
    document["limits"]["optimize"] = "kl"
    assert "Use w4a16-gptq: the closest to the original within the limits, 2.91× faster" in view(document)["sentence"]


def test_layers_show_the_share_of_rtns_loss(document: dict[str, Any]) -> None:
    maps = {m["name"]: m for m in view(document)["heatmaps"]}
    assert list(maps) == ["w4a16-gptq", "w8a8-gptq"]  # the recommended first; rtn is the 100 % itself
    heat = maps["w4a16-gptq"]
    assert heat["blocks"] == [str(b) for b in range(8)]
    assert [r["label"] for r in heat["rows"]][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    layer = document["candidates"][3]["quantize"]["layers"][0]
    assert heat["rows"][0]["cells"][0]["text"] == f"{100 * layer['loss'] / layer['loss_rtn']:.0f}"
    kept = heat["rows"][3]["cells"][3]
    assert (kept["text"], kept["fallback"]) == ("100", "gptq was worse on held-out rows")


def test_experts_of_a_block_add_up_to_one_field(document: dict[str, Any]) -> None:
    document["candidates"][3]["quantize"]["layers"] = [
        {"name": f"model.layers.0.mlp.experts.{e}.up_proj", "loss_rtn": 1.0, "loss": loss}
        for e, loss in enumerate((0.2, 0.6))
    ] + [{"name": "lm_head", "loss_rtn": 1.0, "loss": 0.5}, {"name": "model.norm", "loss_rtn": None, "loss": None}]
    heat = view(document)["heatmaps"][0]
    assert heat["blocks"] == ["0", "–"]
    assert [(r["label"], [c["text"] for c in r["cells"]]) for r in heat["rows"]] == [
        ("up_proj", ["40", ""]),
        ("lm_head", ["", "50"]),
    ]


@pytest.mark.parametrize(
    ("reference", "own", "parts"),
    [
        ("a b c", "a b c", ("a b c", "", "")),
        ("write_all(x)", "write_text(x)", ("write_", "text", "(x)")),
        ("the cat sat", "the cow ran", ("the ", "cow", " ran")),
        ("one two", "one", ("one", "∎", "")),
        ("one", "one two", ("one", " ", "two")),
        ("x = 1", "x = (1)", ("x = ", "(", "1)")),
        ("", "new", ("", "new", "")),
    ],
)
def test_first_difference_is_marked(reference: str, own: str, parts: tuple[str, str, str]) -> None:
    found = difference(reference, own)
    assert (found["same"], found["mark"], found["rest"]) == parts


def test_samples_stand_side_by_side_with_one_mark_each(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    names = [o["name"] for o in view(document)["samples"][0]["outputs"]]
    assert names[:2] == ["original", "w4a16-gptq"]
    assert len(names) == 6
    assert page.count("mark") == 1 + 3  # the word in the explanation; three outputs that differ
    assert page.text.count("identical to the original") == 2


def test_commands_can_be_pasted(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    assert (
        "lowbit tune demo --text 'my prompts.jsonl' --max-ppl-increase 1% --optimize tpot --seed 0 -o out" in page.text
    )
    assert "vllm serve out/candidates/w4a16-gptq" in page.text
    document |= {"own_candidates": True, "exhaustive": True, "calibration": "other.txt"}
    document["limits"] |= {"max_kl": 0.01, "max_tpot": 0.02}
    again = view(document)["reproduce"]
    assert "--max-kl 0.01 --max-tpot 0.02" in again
    assert "--methods rtn,gptq --schemes w8a8,w4a16,w3a16,w4a16-g32,w4a8 --exhaustive" in again
    assert "--calibration other.txt" in again
    assert "lowbit bench out/candidates/w4a16-gptq --against demo" in page.text


def test_how_it_was_measured_names_machine_text_and_noise_floor(document: dict[str, Any], tmp_path: Path) -> None:
    words = _page(document, tmp_path).text
    for part in ("AMD EPYC 9V74", "2 threads", "torch 2.13.0+cpu", "84.2 GB/s", "23711 tokens for the figures",
                 "prompt tokens 128", "KL 0.0000210", "99.8 %"):  # fmt: skip
        assert part in words


def test_headings_and_tables_are_in_order(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.count("table") == page.count("caption") > 0
    assert ("html", {"lang": "en"}) in page.tags


# ---- what may be missing, and what may be hostile ----


def test_everything_optional_may_be_missing(bare: dict[str, Any], tmp_path: Path) -> None:
    page = _page(bare, tmp_path)
    assert "Do not quantize" in page.text
    assert "failed: killed" in page.text
    assert "None" not in page.text


@pytest.mark.parametrize(
    "document_", [{}, {"candidates": [{}]}, {"candidates": None, "original": None, "samples": [{}]}]
)
def test_an_empty_document_is_a_page(document_: dict[str, Any], tmp_path: Path) -> None:
    assert "No recommendation was made." in _page(document_, tmp_path).text


def _without(value: Any, path: tuple[Any, ...]) -> Any:
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = None
    return value


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else []:
        yield (*at, key)
        yield from _paths(inner, (*at, key))


def test_any_single_null_still_renders(document: dict[str, Any]) -> None:
    """Every key of the document and of one candidate, set to null one at a time."""
    document["candidates"] = document["candidates"][3:4]
    del document["candidates"][0]["quantize"]["layers"][2:]
    paths = [*_paths(document), *_paths(document["candidates"][0], ("candidates", 0))]
    paths += [("candidates", 0, "quantize", "layers", 0, k) for k in document["candidates"][0]["quantize"]["layers"][0]]
    paths += [("samples", 0, "outputs"), ("samples", 0, "prompt"), ("samples", 0, "outputs", "original")]
    for path in paths:
        json.dumps(view(_without(document, path)), allow_nan=False)


def test_figures_that_are_not_finite_are_dashes(document: dict[str, Any], tmp_path: Path) -> None:
    document["candidates"][3]["evaluate"] |= {"perplexity": float("inf"), "perplexity_increase": float("nan")}
    words = _page(document, tmp_path).text
    assert "inf" not in re.findall(r"\b(?:inf|nan)\b", words)


def test_hostile_strings_are_inert(document: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(document).replace('"demo"', json.dumps(HOSTILE)).replace("w4a16-gptq", json.dumps(HOSTILE)[1:-1])
    hostile = json.loads(text)
    hostile["samples"][0] = {"prompt": HOSTILE, "outputs": {"original": "x", HOSTILE: "x" + HOSTILE}}
    hostile["candidates"][0] |= {"verdict": HOSTILE, "error": HOSTILE}
    hostile["candidates"][1]["quantize"]["layers"][0]["name"] = HOSTILE
    hostile["candidates"][1]["quantize"]["layers"][1]["fallback"] = HOSTILE
    hostile["environment"] = dict.fromkeys(hostile["environment"], HOSTILE)
    hostile["recommendation"]["reasons"] = [HOSTILE]
    page, plain = _page(hostile, tmp_path), _page(document, tmp_path)
    assert page.count("img") == 0
    assert page.count("script") == plain.count("script") == 3
    assert not [a for _, a in page.tags if any(k.startswith("on") for k in a)]
    assert "{{ 7*7 }}" in page.text
    data = json.loads(next(s for s in page.scripts if s.lstrip().startswith("{")))
    assert any(p["name"] == HOSTILE for p in data["points"])  # the very string, as data


def test_text_that_is_not_unicode_is_written(document: dict[str, Any], tmp_path: Path) -> None:
    document["samples"][0]["outputs"]["original"] = "half a pair: \ud83d"
    assert "half a pair: ?" in _page(document, tmp_path).text


def test_nothing_is_loaded_from_anywhere(document: dict[str, Any], tmp_path: Path) -> None:
    page = _page(document, tmp_path)
    assert not [(t, a) for t, a in page.tags if {"src", "href", "srcset", "action", "data"} & a.keys()]
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|</", style[1])
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


# ---- printing numbers ----


def _spaces(words: tuple[str, ...]) -> list[str]:
    """Units stand behind a space that does not break."""
    return [w.replace("\u00a0", " ") for w in words]


def test_numbers_as_people_write_them() -> None:
    values = (0.012345, 1.2345, 12.345, 123.45, 12345.6, 0, 2.1e-9, -1.5, None, float("inf"))
    assert [digits(x) for x in values] == [
        "0.0123", "1.23", "12.3", "123", "12346", "0", "2.10e−9", "−1.50", "–", "–",
    ]  # fmt: skip
    assert _spaces(tuple(percent(x, "+") for x in (0.0062, -0.001, 0.01, 0.1432, 1.0, 1e-9, None))) == [
        "+0.62 %", "−0.1 %", "+1 %", "+14.3 %", "+100 %", "0 %", "–",
    ]  # fmt: skip
    assert _spaces((milliseconds(0.00141), size(10_900_000), size(4.2e9), duration(8.4), duration(200))) == [
        "1.41 ms", "10.9 MB", "4.20 GB", "8.4 s", "3 min",
    ]  # fmt: skip
    assert times(2.9, "faster", "slower") == "2.90× faster"
    assert times(0.8, "faster", "slower") == "1.25× slower"
    assert between(1, None, str) is None


# ---- in a real browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium: apt-get install chromium")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield chromium
        chromium.close()


class Visit:
    """A page opened in a browser, with what it complained about and what it asked the network for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


# where ECharts drew each point: name -> pixel in the window, found by asking the chart itself
_PIXELS = """() => {
  const box = document.getElementById('chart'), frame = box.getBoundingClientRect();
  const chart = echarts.getInstanceByDom(box);
  const models = chart.getOption().series.findIndex(s => s.name === 'models');
  return chart.getOption().series[models].data.map(d => {
    const [x, y] = chart.convertToPixel({seriesIndex: models}, d.value);
    return {name: d.name, x: x + frame.left, y: y + frame.top, size: d.symbolSize};
  });
}"""
# symbols are unit shapes (circle, diamond, triangle) placed by a matrix, the only such paths in the picture
_SYMBOLS = """() => [...document.querySelectorAll('#chart svg path')].filter(p =>
  (p.getAttribute('transform') || '').startsWith('matrix')).map(p => p.getBoundingClientRect().width)"""


def _uncovered(point: dict[str, Any], others: list[dict[str, Any]]) -> tuple[float, float]:
    """The point's middle, or the place on its rim that is farthest from what may lie on top of it."""

    def room(at: tuple[float, float]) -> float:
        return min(math.dist(at, (p["x"], p["y"])) - p["size"] / 2 for p in others)

    middle, reach = (point["x"], point["y"]), 0.46 * point["size"]
    rim = [(middle[0] + reach * math.cos(a / 3), middle[1] + reach * math.sin(a / 3)) for a in range(19)]
    return middle if room(middle) > 0 else max(rim, key=room)


@pytest.mark.browser
def test_browser_draws_one_point_per_candidate(document: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    write_report(document, tmp_path / "report.html")
    with Visit(browser, tmp_path / "report.html") as visit:
        measured = {"original"} | {c["name"] for c in document["candidates"] if not c["error"]}
        for measure in ("ppl", "kl"):
            visit.page.check(f"input[value={measure}]", force=True)
            visit.page.locator("#chart").scroll_into_view_if_needed()
            points = visit.page.evaluate(_PIXELS)
            assert {p["name"] for p in points} == measured
            widths = visit.page.evaluate(_SYMBOLS)
            assert len(widths) == len(measured)
            assert min(widths) >= 8
            for point in points:
                visit.page.mouse.move(0, 0)
                visit.page.mouse.move(*_uncovered(point, [p for p in points if p is not point]))
                visit.page.wait_for_function(
                    "name => [...document.querySelectorAll('.tip b')].some(b => b.textContent === name)",
                    arg=point["name"],
                )
                verdict = next(c["verdict"] for c in [{"name": "original", "verdict": "as it is"},
                               *document["candidates"]] if c["name"] == point["name"])  # fmt: skip
                if verdict not in ("ok", "as it is"):  # who points at it reads why it is no answer
                    assert verdict in visit.page.locator(".tip").last.inner_text()
        weights = {"original": 33.6, "w4a16-gptq": 10.9}
        sizes = {p["name"]: p["size"] for p in points}
        assert (sizes["original"] / sizes["w4a16-gptq"]) ** 2 == pytest.approx(  # area is weight bytes
            weights["original"] / weights["w4a16-gptq"], rel=1e-6
        )
        assert visit.complaints == []
        assert all(url.startswith("file:") for url in visit.requests)


@pytest.mark.browser
def test_browser_page_never_scrolls_sideways_before_the_picture_is_redrawn(
    browser: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    write_report(document, tmp_path / "report.html")
    with Visit(browser, tmp_path / "report.html", 1280) as visit:
        visit.page.add_init_script("window.ResizeObserver = class { observe() {} }")  # a machine too busy to redraw
        visit.page.reload()
        visit.page.set_viewport_size({"width": 375, "height": 800})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("which", ["document", "bare"])
def test_browser_page_never_scrolls_sideways(
    which: str, width: int, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_report(request.getfixturevalue(which), tmp_path / "report.html")
    with Visit(browser, tmp_path / "report.html", width) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.page.locator("h1").bounding_box()["width"] <= width
        assert visit.complaints == []


@pytest.mark.browser
def test_browser_dark_is_dark_and_readable(document: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    write_report(document, tmp_path / "report.html")
    found = {}
    for scheme in ("light", "dark"):
        with Visit(browser, tmp_path / "report.html", scheme=scheme) as visit:
            found[scheme] = visit.page.evaluate(
                """() => {
                  const color = (e, what) => getComputedStyle(e)[what];
                  const label = [...document.querySelectorAll('#chart text')].find(t => t.textContent.includes('ms'));
                  return {paper: color(document.body, 'backgroundColor'), ink: color(document.body, 'color'),
                          soft: color(document.querySelector('.kicker'), 'color'), chart: color(label, 'fill')};
                }"""
            )
    assert _luminance(found["light"]["paper"]) > 0.9
    assert _luminance(found["dark"]["paper"]) < 0.05
    for scheme in ("light", "dark"):
        for what in ("ink", "soft", "chart"):
            assert _contrast(found[scheme][what], found[scheme]["paper"]) >= 4.5


@pytest.mark.browser
def test_browser_runs_nothing_hostile(document: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    hostile = json.loads(json.dumps(document).replace("w4a16-gptq", json.dumps(HOSTILE)[1:-1]))
    hostile["samples"][0]["prompt"] = HOSTILE
    write_report(hostile, tmp_path / "report.html")
    with Visit(browser, tmp_path / "report.html") as visit:
        visit.page.locator("#chart").scroll_into_view_if_needed()
        point = next(p for p in visit.page.evaluate(_PIXELS) if p["name"] == HOSTILE)
        visit.page.mouse.move(point["x"], point["y"])
        visit.page.wait_for_function("name => document.querySelector('.tip b')?.textContent === name", arg=HOSTILE)
        assert visit.page.evaluate("window.hit") is None
        assert visit.page.locator("img").count() == 0
        assert visit.complaints == []


def _luminance(color: str) -> float:
    """Relative luminance of 'rgb(r, g, b)' (WCAG 2)."""
    values = [int(v) / 255 for v in re.findall(r"\d+", html.unescape(color))[:3]]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
