"""doctor: what this machine has for low-bit models, and what to do about what is missing."""

import os
from typing import Any

import torch

from lowbit.environment import environment, installed
from lowbit.kernels.pack import native
from lowbit.speed.bandwidth import measure_bandwidth

_EXTRAS = {  # package -> what it is for, how to get it
    "compressed_tensors": ("transformers loading of lowbit's outputs", "pip install compressed-tensors"),
    "datasets": ("--calibration hub:NAME", "pip install 'lowbit[datasets]'"),
    "onnxruntime": ("export --format onnx", "pip install 'lowbit[onnx]'"),
    "litert_torch": ("export --format litert", "pip install 'lowbit[litert]'"),
}


def doctor() -> dict[str, Any]:
    """The `doctor` document: environment, instruction sets, kernels, bandwidth, extras, and advice."""
    flags = _cpu_flags()
    bandwidth = measure_bandwidth()
    advice = []
    wanted = {"avx512_vnni": "int8 products", "avx512_bf16": "bfloat16 products"}
    sets = {name: name in flags for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")}
    for name, use in wanted.items():
        if not sets[name]:
            advice.append(f"This CPU has no {name}: {use} run slower here.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        advice.append(f"torch uses {torch.get_num_threads()} threads on {cores} cores; set OMP_NUM_THREADS={cores}.")
    if native is None:
        advice.append(
            "lowbit's kernels were not built: install a C++ compiler (gcc or clang) and install lowbit again."
        )
    if torch.version.cuda and not torch.cuda.is_available():
        advice.append(
            "torch is a CUDA build but finds no GPU. The CPU build is 2 GB smaller; see 'Install' in the README."
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        advice.append(f"The machine is busy (load {load:.1f} on {cores} cores): timings taken now will mislead.")
    extras = {name: installed(name.replace("_", "-")) for name in _EXTRAS}
    for name, version in extras.items():
        if version is None:
            use, how = _EXTRAS[name]
            advice.append(f"{name} is not installed (for {use}): {how}.")
    return {
        "environment": environment(),
        "instruction_sets": sets,
        "kernels": _kernels(),
        "peak_bandwidth_bytes_per_s": bandwidth,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": load,
        "extras": extras,
        "advice": advice,
    }


def _kernels() -> dict[str, str]:
    """What computes which scheme here."""
    if native is None:
        own = "torch's own kernels; others dequantized at load, which saves disk and not time"
        return {"native": "not built", "w4a16, w8a16-channel, w8a8": own}
    return {
        "native": native.isa(),
        "w2, w3, w4, w8 (a16) and w8a8": "lowbit's decoder, for Llama, Mistral, Qwen2/3, Gemma, Phi-3",
        "other schemes and models": "transformers with torch's kernels",
    }


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return set(next(line for line in lines if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()
