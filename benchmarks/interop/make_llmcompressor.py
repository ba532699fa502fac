"""llm-compressor makes DIRECTORY: make_llmcompressor.py MODEL SCHEME DIRECTORY TOKENS.npy OUT.npz (in its environment).

Round to nearest in one of its preset schemes; "SCHEME weights alone": the same, read without rounding activations.
OUT.npz has the log-probabilities of what it wrote, read back by transformers in float32 with weights dequantized.
"""

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from compressed_tensors.quantization import disable_quantization
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig


@torch.no_grad()
def main() -> None:
    source, scheme, path, tokens, out = sys.argv[1:]
    preset, alone = scheme.removesuffix(" weights alone"), scheme.endswith(" weights alone")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=[QuantizationModifier(scheme=preset, targets="Linear", ignore=["lm_head"])])
    model.save_pretrained(path, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    config = CompressedTensorsConfig(dequantize=True)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).eval()
    if alone:
        again.apply(disable_quantization)
    logits = again(torch.from_numpy(np.load(tokens))).logits.float()
    np.savez(out, logprobs=logits.log_softmax(-1).numpy())
    print(json.dumps({"versions": {"llm-compressor": version("llmcompressor")}}))


if __name__ == "__main__":
    main()
