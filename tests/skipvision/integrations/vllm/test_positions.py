"""Position ids of pruned images, set in two steps. These tests run without vLLM."""

import pytest
import torch

from skipvision.integrations.vllm.positions import (
    Span,
    number_prompt,
    place,
    shift_of,
    split_offsets,
    with_offsets,
)

# Two words, 3 of an image's 9 tokens, one word, 2 of an image's 4 tokens.
SPANS = [Span(2, 3, 9), Span(6, 2, 4)]
VISUAL = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1]).bool()
OFFSETS = [torch.tensor([[1, 5, 8]]), torch.tensor([[0, 3]])]
WHOLE = [0, 1, 3, 7, 10, 11, 12, 15]


def test_text_after_an_image_has_its_position_before_the_image_is_encoded():
    positions, shift = number_prompt(8, SPANS)
    assert positions[0][~VISUAL].tolist() == [0, 1, 11]
    assert shift == 16 - 8 == shift_of(positions, one_axis=True)


def test_tokens_of_images_get_theirs_when_they_enter_the_decoder():
    positions, _ = number_prompt(8, SPANS)
    placed = place(positions, VISUAL, 0, OFFSETS)
    assert placed[0].tolist() == WHOLE
    assert shift_of(placed, one_axis=True) == 8


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_prompt_may_enter_in_two_parts_and_again(cut):
    positions, _ = number_prompt(8, SPANS)
    visual = torch.cat(OFFSETS, dim=1)
    before = int(VISUAL[:cut].sum())
    for begin, part in ((0, visual[:, :before]), (cut, visual[:, before:]), (0, visual)):
        positions = place(positions, VISUAL, begin, [part] if part.numel() else [])
    assert positions[0].tolist() == WHOLE


def test_three_axes_are_relative_to_the_image():
    positions = torch.tensor([[0, 1, 1, 4], [0, 1, 1, 4], [0, 1, 1, 4]])
    visual = torch.tensor([False, True, True, False])
    offsets = torch.tensor([[0, 0], [0, 2], [1, 1]])
    once = place(positions, visual, 0, [offsets])
    assert once.tolist() == [[0, 1, 1, 4], [0, 1, 3, 4], [0, 2, 2, 4]]
    assert place(once, visual, 0, [offsets]).tolist() == once.tolist()
    assert shift_of(once, one_axis=False) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_are_exact_in_every_dtype(dtype):
    embeds = torch.randn(4, 6).to(dtype)
    offsets = torch.tensor([[0, 257, 2047, 70_001], [5, 128, 16_383, 1]])
    wide = with_offsets(embeds, offsets)
    own, read = split_offsets(wide, 6)
    assert torch.equal(own, embeds)
    assert read.tolist() == offsets.tolist()
    assert split_offsets(embeds, 6)[1] is None
