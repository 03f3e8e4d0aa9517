"""Largest singular values: of matrices, from above; of a function's Jacobian, by power iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch


def spectral_norm(matrix: torch.Tensor, rounds: int = 9) -> torch.Tensor:
    """(…, m, n) → (…): an upper bound of each matrix's largest singular value, by less than half a percent.

    Power iteration comes to it from below, which would make a bound that is none. Squaring the Gram matrix
    instead is power iteration on all vectors at once, 2^rounds steps of it, and its Frobenius norm is never
    too small: ‖W‖ ≤ ‖(WᵀW)^(2^k)‖_F^(1 / 2^(k+1)), and at most rank^(1 / 2^(k+2)) times too large.
    """
    wide = matrix.double()
    gram = wide @ wide.mT if wide.shape[-2] < wide.shape[-1] else wide.mT @ wide
    logarithm = torch.zeros(gram.shape[:-2], dtype=gram.dtype, device=gram.device)
    for done in range(rounds + 1):
        size = torch.linalg.matrix_norm(gram).clamp(min=torch.finfo(gram.dtype).tiny)
        logarithm = logarithm + size.log() / 2 ** (done + 1)
        gram = gram / size[..., None, None]
        if done < rounds:
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
    """Spectral norm of a function's Jacobian at a point, by power iteration with its jvp and vjp.

    It comes from below, and ends when a round changes it by less than ``tolerance`` of itself.
    """
    generator = torch.Generator(at.device).manual_seed(seed)
    direction = torch.randn(at.shape, generator=generator, dtype=at.dtype, device=at.device)
    norm = 0.0
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        value = function(point)
        # The vjp is linear in what is pulled back, so its own derivative by that is the jvp.
        given = torch.zeros_like(value, requires_grad=True)
        [pulled] = torch.autograd.grad(value, point, given, create_graph=True)
        for _ in range(rounds):
            direction = direction / direction.norm().clamp(min=torch.finfo(at.dtype).tiny)
            [pushed] = torch.autograd.grad(pulled, given, direction, retain_graph=True)
            before, norm = norm, float(pushed.norm())
            if norm == 0.0 or abs(norm - before) < tolerance * norm:
                break
            [direction] = torch.autograd.grad(value, point, pushed, retain_graph=True)
    return norm
