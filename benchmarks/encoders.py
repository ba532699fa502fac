"""What phones start from: BERT base and a small MobileNet (random weights) as float and int8: size and time.

    python benchmarks/encoders.py --format onnx       (an environment with lowbit[onnx] and onnxscript)
    python benchmarks/encoders.py --format litert     (an environment with lowbit[litert])

Each format's rows replace its own earlier ones in the results. `bytes` are those of all files of the export,
`agreement` what `lowbit export` says of the engine against lowbit in float32, `seconds` of one run (128 tokens, or one
image of 224 x 224) on two threads: the median of --rounds, float and int8 taking turns.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from partial import RESULTS, save
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, MobileNetV2Config, MobileNetV2ForImageClassification

from lowbit.exporting import export
from lowbit.model.checkpoint import DEMO

TOKENS, PIXELS, THREADS = 128, 224, 2
FILES = {"onnx": "", "litert": ".tflite"}


def models(folder: Path) -> dict[str, Path]:
    bert(folder / "bert-base")
    mobilenet(PIXELS, num_labels=1000).save_pretrained(folder / "mobilenet-v2")
    save_file({"pixel_values": images(32, PIXELS, seed=12)}, folder / "images.safetensors")
    return {name: folder / name for name in ("bert-base", "mobilenet-v2")}


def mobilenet(size: int, **words: Any) -> Any:
    """Random, for images of size x size. Batch norms have seen images, and classes are apart: else its int8 outputs
    would all be the same code."""
    torch.manual_seed(0)
    network: Any = MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=size, classifier_dropout_prob=0.0, **words)
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    nn.init.normal_(network.classifier.weight, std=0.5)
    with torch.no_grad():
        for seed in range(12):
            network.train()(pixel_values=images(16, size, seed))
    return network.eval()


def images(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth random images, brighter and darker."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 11, size // 11, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return smooth + torch.randn(count, 3, 1, 1, generator=generator)


def bert(path: Path, **words: Any) -> Path:
    """A random BERT with the demo's tokenizer, saved to a directory."""
    torch.manual_seed(0)
    BertModel(BertConfig(**words)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return path


def numbers(shape: list[int], dtype: Any) -> np.ndarray:
    whole = np.issubdtype(dtype, np.integer)
    return np.ones(shape, dtype) if whole else np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)


def with_onnx(path: Path) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    texts = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    fed = {
        i.name: numbers([1, TOKENS] if i.type in texts else [1, 3, PIXELS, PIXELS], texts.get(i.type, np.float32))
        for i in session.get_inputs()
    }
    return lambda: session.run(None, fed)


def with_litert(path: Path) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=THREADS)
    interpreter.allocate_tensors()
    for i in interpreter.get_input_details():
        interpreter.set_tensor(i["index"], numbers(list(i["shape"]), i["dtype"]))
    return interpreter.invoke


def taking_turns(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for taken, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FILES, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoders.json")
    args = parser.parse_args()
    engine = {"onnx": with_onnx, "litert": with_litert}[args.format]
    found = json.loads(args.output.read_text()).get("results", []) if args.output.exists() else []
    rows = [r for r in found if r["format"] != args.format]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, path in models(folder).items():
            texts = model == "bert-base"
            made = []
            for kind in ("float", "int8"):
                words: dict[str, Any] = {"seq_len": TOKENS} if texts and args.format == "litert" else {}
                if kind == "int8" and not texts:
                    words["calibration"] = str(folder / "images.safetensors")
                out = folder / f"{model}-{kind}{FILES[args.format]}"
                document = export(path, out, args.format, type=kind, **words)
                row = {"model": model, "format": args.format, "type": kind, "bytes": document["bytes"]}
                made.append((row | {"agreement": document["agreement"]}, engine(out)))
            for (row, _), seconds in zip(made, taking_turns([run for _, run in made], args.rounds), strict=True):
                rows.append(row | {"seconds": seconds})
                print(json.dumps(rows[-1]), flush=True)
    save(args.output, {"tokens": TOKENS, "pixels": PIXELS, "threads": THREADS}, {"results": rows}, finished=True)


if __name__ == "__main__":
    main()
