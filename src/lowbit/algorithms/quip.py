"""QuIP: round in a rotated basis where no weight stands out, each block repaired by the ones after it.

With random orthogonal U, V (hadamard.py) the weight W̃ = U W Vᵀ and the Hessian H̃ = V H Vᵀ are incoherent: no entry is
much larger than the others (Chee et al. 2023, "QuIP", section 4; Tseng et al. 2024, "QuIP#", section 3). The loss
tr (W - Ŵ) H (W - Ŵ)ᵀ is the same in both bases. In the new one, LDLQ feeds back the error of what is rounded,

    Ŵ_b = Q(W_b + (W - Ŵ)_{before b} A_{before b, b}),      A from H̃ = N D Nᵀ, N upper triangular with ones

which on scalar grids is GPTQ (QuIP, theorem 6: LDLQ is OPTQ), so `gptq` does it; on the lattice b is eight columns.
Afterwards sweeps revisit every block with all others fixed, at the target t = Ŵ_b + [(W - Ŵ) H̃]_b H̃_bb⁻¹, and keep a
new point only where (t - p) H̃_bb (t - p)ᵀ falls; row scales are refitted by least squares. The loss never rises.

The rotation stays with the tensor: its inverse is part of `dequantize()`, or a Hadamard transform of the activations.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit import lattice
from lowbit.algorithms.gptq import GPTQSettings, alive, factorize, gptq
from lowbit.hadamard import Rotation
from lowbit.numerics import choose_qparams, storable
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor

B = lattice.WIDTH


@dataclass(frozen=True)
class QuipSettings:
    """dampening_frac: λ / mean(diag H). sweeps: passes after the first. signs_seed: of the random signs.
    follow_original: towards the original model's outputs (model/original.py)."""

    dampening_frac: float = 0.01
    sweeps: int = 8
    signs_seed: int = 0
    follow_original: bool = True


def quip(
    weight: Tensor, hessian: Tensor, scheme: TensorScheme, settings: QuipSettings, scale_dtype: torch.dtype
) -> tuple[QuantizedTensor, float]:
    """Quantize weight (out, in) given H (in, in) float32. Returns the tensor and the dampening_frac that was used.

    Raises ValueError if H is not finite or no damping makes it positive definite.
    """
    rotation = Rotation.random(weight.shape[0], weight.shape[1], settings.signs_seed)
    W, H = rotation.apply(weight.float()), rotation.apply_to_hessian(alive(hessian.float()))
    if scheme.kind == "e8p":
        result, used = lattice_ldlq(W, H, scheme, settings, scale_dtype)
    else:
        inner = GPTQSettings(dampening_frac=settings.dampening_frac, sweeps=settings.sweeps)
        result, used = gptq(W, H, scheme, inner, scale_dtype)
    return replace(result, rotation=rotation), used


def lattice_ldlq(
    W: Tensor, H: Tensor, scheme: TensorScheme, settings: QuipSettings, scale_dtype: torch.dtype
) -> tuple[QuantizedTensor, float]:
    """Blocks of eight columns of W (out, in) onto the lattice, in order, with feedback; then the sweeps."""
    factored = factorize(H, settings.dampening_frac)
    N = factored.N
    scale, _ = choose_qparams(W, scheme, scale_dtype)
    step = scale.float()
    repaired, codes = torch.zeros_like(W), []
    for start in range(0, W.shape[1], B):
        end = start + B
        repairs = torch.linalg.solve_triangular(
            N[start:end, start:end], repaired[:, start:end], upper=True, left=False, unitriangular=True
        )
        code = lattice.encode((W[:, start:end] + repairs) / step, scheme.bits)
        value = lattice.decode(code, scheme.bits) * step
        repaired[:, end:].addmm_(W[:, start:end] - value, N[start:end, end:])
        codes.append(code)
    state = QuantizedTensor(torch.stack(codes, 1), scale, None, scheme)
    for _ in range(settings.sweeps):
        state = lattice_sweep(W, state, H)
    return state, factored.dampening_frac


def lattice_sweep(W: Tensor, quantized: QuantizedTensor, H: Tensor) -> QuantizedTensor:
    """One descent sweep on (W - Ŵ) H (W - Ŵ)ᵀ: row scales, then every block's points. Never worse."""
    bits = quantized.scheme.bits
    points = replace(quantized, rotation=None, scale=torch.ones_like(quantized.scale)).dequantize()
    step = refit_row_scales(W, points, quantized.scale, H)
    scale = step.to(quantized.scale.dtype)
    W_hat = points * step
    G = (W - W_hat) @ H
    codes = quantized.codes.clone()
    for block, start in enumerate(range(0, W.shape[1], B)):
        columns = slice(start, start + B)
        H_bb = H[columns, columns]
        old = W_hat[:, columns].clone()
        damped = H_bb + 1e-4 * H_bb.diagonal().mean() * torch.eye(B)
        move = torch.linalg.solve(damped, G[:, columns].T).T
        code = lattice.encode((old + move) / step, bits)
        change = lattice.decode(code, bits) * step - old
        gain = 2 * (change * G[:, columns]).sum(1) - ((change @ H_bb) * change).sum(1)
        better = gain > 0
        change = torch.where(better[:, None], change, 0.0)
        codes[:, block] = torch.where(better[:, None], code, codes[:, block])
        W_hat[:, columns] = old + change
        G.addmm_(change, H[columns], alpha=-1)
    return replace(quantized, codes=codes, scale=scale)


def refit_row_scales(W: Tensor, points: Tensor, scale: Tensor, H: Tensor) -> Tensor:
    """(out, 1) float32, at values of the storage dtype: least squares for points (out, in); the old where no better."""
    product = points @ H
    curvature = (product * points).sum(1, keepdim=True)
    optimum = (product * W).sum(1, keepdim=True) / curvature.clamp(min=1e-30)
    old, new = scale.float(), storable(optimum, scale.dtype).float()
    better = (new - optimum).square() < (old - optimum).square()
    return torch.where(better, new, old)
