"""Counted FLOPs match products counted by hand, above all those unknown to torch's counter."""

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations import moe  # noqa: F401  registers the product that torch may lack

from skipvision import measure_flops

TOKENS, EXPERTS, IN, OUT = 12, 3, 16, 8
ENDS = torch.tensor([4, 4, 12], dtype=torch.int32)


def test_matrix_products():
    assert measure_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


@pytest.mark.parametrize("key_heads", [4, 2])
def test_fused_attention_counts_every_query_head(key_heads):
    query = torch.randn(2, 4, 10, 16, requires_grad=True)
    key = value = torch.randn(2, key_heads, 10, 16)

    def attend():
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    forward = 2 * 2 * 2 * 4 * 10 * 10 * 16
    assert measure_flops(attend) == forward
    assert measure_flops(lambda: attend().sum().backward()) == pytest.approx(3 * forward, abs=forward)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_fused_attention_of_gpus_does_too(key_heads):
    """The formulas of torch 2.11 refuse shared key heads."""
    query = torch.empty(2, 4, 10, 16, device="meta")
    key = value = torch.empty(2, key_heads, 10, 16, device="meta")
    ops = torch.ops.aten
    attend, backward = (
        ops._scaled_dot_product_flash_attention,
        ops._scaled_dot_product_flash_attention_backward,
    )
    forward = 2 * 2 * 2 * 4 * 10 * 10 * 16
    assert measure_flops(lambda: attend(query, key, value)) == forward
    rest = (query, query[..., 0], None, None, 10, 10, 0.0, False, query, query)
    # The backward computes the scores again.
    assert measure_flops(lambda: backward(query, query, key, value, *rest)) == 2.5 * forward


@pytest.mark.parametrize("product", [F.grouped_mm, torch.ops.transformers.grouped_mm_fallback])
def test_each_token_meets_its_own_experts_matrix(product):
    tokens = torch.randn(TOKENS, IN, requires_grad=True)
    experts = torch.randn(EXPERTS, IN, OUT, requires_grad=True)
    one = 2 * TOKENS * IN * OUT
    assert measure_flops(lambda: product(tokens, experts, offs=ENDS)) == one
    assert measure_flops(lambda: product(tokens, experts, offs=ENDS).square().sum().backward()) == 3 * one
    frozen = experts.detach()
    if product is F.grouped_mm:
        assert measure_flops(lambda: product(tokens, frozen, offs=ENDS).square().sum().backward()) == 2 * one


def test_columns_that_are_shared_out_among_experts():
    left, right = torch.randn(EXPERTS, 4, IN), torch.randn(IN, TOKENS)
    assert measure_flops(lambda: F.grouped_mm(left, right, offs=ENDS)) == 2 * 4 * IN * TOKENS


def test_a_parameter_that_is_expanded_without_gradients():
    class Latents(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = torch.nn.Parameter(torch.ones(1, 2, 3))
            self.project = torch.nn.Linear(3, 5)

        @torch.no_grad()
        def forward(self):
            return self.project(self.latents.expand(1, -1, -1))

    assert measure_flops(Latents()) == 2 * 2 * 3 * 5
