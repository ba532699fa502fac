"""The model card: what this directory is, in a page a person reads first."""

import json
from pathlib import Path
from typing import Any

from lowbit.artifact import write_bytes

_CARD = """# {title}

`{model}` quantized to **{scheme}** with **{method}** by lowbit {version}: {bits:.2f} bits per weight in the quantized
layers (codes, scales and tables), {count} layers{fallbacks}.

## Use

    lowbit evaluate {output} --against {model} --text YOUR_TEXT
{use}
## Made with

    lowbit quantize {model} -o OUT --recipe {output}/lowbit.json

Every layer's loss, the data's hash and the versions are in `lowbit.json`; `lowbit verify {output}` checks the files.
"""

_USE = {
    "compressed-tensors": """    vllm serve {output}

```python
from transformers import AutoModelForCausalLM  # needs the compressed-tensors package
model = AutoModelForCausalLM.from_pretrained("{output}"{words})
```
""",
    "lowbit": """
```python
import lowbit.transformers  # registers lowbit's own layout, which no other engine reads
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{output}")  # weights become 16-bit in memory
```
""",
}


_ASYMMETRIC = """
(transformers 5.23 reads packed zero points only with `dequantize=True`; import `CompressedTensorsConfig` from it.)
"""
_EMBEDDING = """
The embedding is quantized too. lowbit reads that; transformers 5.23 does not, and starts with a random one.
"""


def write_card(path: Path, manifest: dict[str, Any], document: dict[str, Any]) -> None:
    output = Path(document["output"]).name
    asymmetric = any(r["scheme"].endswith("-asym") for r in document["layers"])
    embedding = any("embed" in r["name"] for r in document["layers"])
    fallbacks = sum(1 for r in document["layers"] if r["fallback"])
    layout = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    words = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asymmetric else ""
    text = _CARD.format(
        title=output,
        use=_USE[layout].format(output=output, words=words) + _ASYMMETRIC * asymmetric + _EMBEDDING * embedding,
        output=output,
        model=manifest["model"]["name"],
        scheme=document["scheme"],
        method=document["method"],
        version=manifest["lowbit_version"],
        bits=document["bits_per_weight"],
        count=len(document["layers"]),
        fallbacks=f" ({fallbacks} fell back to rtn)" if fallbacks else "",
    )
    write_bytes(path / "README.md", text.encode())
