"""A dry run keeps the shapes of floating-point tensors and the values of integers."""

import pytest
import torch
from torch.nn import functional as F

from skipvision.cost.dry_run import DryRun
from skipvision.cost.flops import measure_flops


def shape_only(*sizes):
    return torch.empty(*sizes, device="meta")


def test_floats_have_shapes_and_integers_have_values():
    with DryRun():
        floats = torch.randn(3, device="meta") @ torch.randn(3, 5, device="meta")
        assert floats.is_meta
        assert floats.shape == (5,)
        numbers = torch.arange(4, device="meta")
        assert numbers.tolist() == [0, 1, 2, 3]
        assert torch.tensor([2, 1]).to("meta").tolist() == [2, 1]
        assert torch.tensor([[1, 4, 4]], device="meta").tolist() == [[1, 4, 4]]
        assert torch.tensor([0.5], device="meta").is_meta
        with torch.device("meta"):
            assert torch.as_tensor([3, 2]).tolist() == [3, 2]
        assert torch.zeros_like(floats, dtype=torch.long).tolist() == [0] * 5
        assert floats.new_full((2,), 7, dtype=torch.long).tolist() == [7, 7]
        assert torch.ones(2, device="meta").is_meta


def test_integers_choose_among_shapes():
    with DryRun():
        table = shape_only(6, 4)
        chosen = table[torch.tensor([True, False, True, False, False, True])]
        assert chosen.is_meta
        assert chosen.shape == (3, 4)
        assert F.embedding(torch.tensor([[1, 2]]), table).shape == (1, 2, 4)
        assert [part.shape[0] for part in table.split(torch.tensor([2, 4]).tolist())] == [2, 4]
        table[torch.tensor([1, 2])] = shape_only(2, 4)
        assert table.is_meta


def test_integers_computed_from_shapes_are_those_of_zeros():
    with DryRun():
        scores, experts = shape_only(5, 8).topk(2)
        assert scores.is_meta
        assert not experts.is_meta
        assert experts.shape == (5, 2)
        assert sorted(shape_only(3).argsort().tolist()) == [0, 1, 2]
        assert (shape_only(2) > 0).tolist() == [False, False]
        assert shape_only(1).item() == 0


def test_a_wrong_shape_is_still_an_error():
    with DryRun(), pytest.raises(RuntimeError):
        shape_only(2, 3) @ shape_only(2, 3)


def test_flops_and_gradients_without_values():
    weight = shape_only(7, 3).requires_grad_()

    def step():
        F.linear(shape_only(5, 3), weight).sum().backward()

    with DryRun():
        assert measure_flops(step) == 2 * 2 * 5 * 3 * 7
    assert weight.grad.shape == weight.shape


def test_outside_the_block_nothing_changes():
    with DryRun():
        pass
    assert torch.arange(3, device="meta").is_meta
