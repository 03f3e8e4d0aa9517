"""Largest singular values: an upper bound for matrices, an estimate for Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import torch


def spectral_norm(matrix: torch.Tensor, rounds: int = 9) -> torch.Tensor:
    """(…, m, n) → (…): upper bound of each matrix's largest singular value, at most half a percent too large.

    Power iteration approaches the value from below, so it gives no upper bound. Squaring the Gram matrix
    ``rounds`` times is power iteration on all vectors at once, and its Frobenius norm is never too small:
    ‖W‖ ≤ ‖(WᵀW)^(2^k)‖_F^(1 / 2^(k+1)), at most rank^(1 / 2^(k+2)) times too large.
    """
    wide = matrix.double()
    gram = wide @ wide.mT if wide.shape[-2] < wide.shape[-1] else wide.mT @ wide
    logarithm = torch.zeros(gram.shape[:-2], dtype=gram.dtype, device=gram.device)
    for power in range(rounds + 1):
        size = torch.linalg.matrix_norm(gram).clamp(min=torch.finfo(gram.dtype).tiny)
        logarithm = logarithm + size.log() / 2 ** (power + 1)
        gram = gram / size[..., None, None]
        if power < rounds:
            gram = gram @ gram
    return logarithm.exp()


def jacobian_norm(
    function: Callable[[torch.Tensor], torch.Tensor],
    at: torch.Tensor,
    *,
    rounds: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> float:
    """Estimate the spectral norm of a function's Jacobian at a point by power iteration, from below.

    The iteration ends when a round changes the estimate by less than a fraction ``tolerance``.
    """
    generator = torch.Generator(at.device).manual_seed(seed)
    direction = torch.randn(at.shape, generator=generator, dtype=at.dtype, device=at.device)
    norm = 0.0
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        value = function(point)
        # The vjp is linear in its vector, so its derivative by that vector gives the jvp.
        vector = torch.zeros_like(value, requires_grad=True)
        [pulled] = torch.autograd.grad(value, point, vector, create_graph=True)
        for _ in range(rounds):
            direction = direction / direction.norm().clamp(min=torch.finfo(at.dtype).tiny)
            [pushed] = torch.autograd.grad(pulled, vector, direction, retain_graph=True)
            before, norm = norm, float(pushed.norm())
            if norm == 0.0 or abs(norm - before) < tolerance * norm:
                break
            [direction] = torch.autograd.grad(value, point, pushed, retain_graph=True)
    return norm
