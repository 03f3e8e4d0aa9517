"""The upper bound of singular values is tight, and power iteration finds a Jacobian's norm."""

from __future__ import annotations

import pytest
import torch

from skipvision.analysis.spectral import jacobian_norm, spectral_norm


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 3), (64, 64), (2, 5, 30, 20)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_bound_is_never_too_small_and_hardly_too_large(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double) * scale
    ratio = spectral_norm(matrix) / torch.linalg.matrix_norm(matrix, ord=2)
    assert bool((ratio >= 1 - 1e-12).all())
    assert bool((ratio < 1.005).all())


def test_equal_singular_values_are_the_worst_case_of_the_bound():
    assert 1.0 <= float(spectral_norm(torch.eye(512))) < 1.005


def test_a_matrix_of_zeros():
    assert float(spectral_norm(torch.zeros(3, 4))) < 1e-100


def test_the_jacobian_norm_matches_the_dense_jacobian():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 12, generator=generator, dtype=torch.double)
    at = torch.randn(3, 12, generator=generator, dtype=torch.double)

    def function(x):
        return (x.sum(dim=0) * torch.tanh(x)) @ weight

    dense = torch.autograd.functional.jacobian(function, at).reshape(36, 36)
    expected = float(torch.linalg.matrix_norm(dense, ord=2))
    assert jacobian_norm(function, at) == pytest.approx(expected, rel=0.01)
    assert jacobian_norm(lambda x: 0 * x, at) == 0.0
