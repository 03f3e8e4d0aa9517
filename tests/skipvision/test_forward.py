"""A whole reduced forward pass against the naive reference: Skip-FFN, merge, summary, layout, positions."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from skipvision import SkipConfig, TokenRole, attach
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, close, train_summary

F64 = torch.float64


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dtype=F64)


@torch.no_grad()
def both(model, inputs, config):
    """Return the logits of the library and of the reference, and the plan."""
    with attach(model, config) as skip:
        train_summary(skip.summary)
        got = model(**inputs).logits
    return got, naive.logits(model, inputs, config, skip.summary), skip.plan


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reduced_forward_is_the_naive_one(model, name, padding):
    inputs = tiny_inputs(ROWS, padding=padding, dtype=F64, seed=1)
    got, expected, plan = both(model, inputs, CONFIGS[name])
    assert plan is not None
    close(got, expected)


def test_plain_calls_need_neither_mask_nor_positions(model):
    """Position ids have gaps, which attention code without a mask may mistake for packed sequences."""
    inputs = tiny_inputs([[3, "image", 4], [1, "image", 6]], dtype=F64)
    for name in ("counts", "drop", "grouped-contiguous"):
        config = CONFIGS[name]
        with torch.no_grad(), attach(model, config) as skip:
            train_summary(skip.summary)
            got = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits
            close(got, model(**inputs).logits)
        close(got, naive.logits(model, inputs, config, skip.summary))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "name",
    [
        "counts",
        "grouped-contiguous",
        "ffn-ratio",
        "diversity",
        "attention-later",
        "vision-attention",
        "tome",
        "grid",
    ],
)
def test_each_row_of_a_batch_is_as_alone(model, name, padding):
    rows = [[3, "image", 4], [5], ["image", 2, "image", 3], [1, "image"], [2, "image", "image", "image", 1]]
    inputs = tiny_inputs(rows, padding=padding, dtype=F64)
    real = inputs["attention_mask"].bool()
    pixels = inputs.pop("pixel_values").split([row.count("image") for row in rows])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, CONFIGS[name]) as skip:
        train_summary(skip.summary)
        together = model(**inputs, pixel_values=torch.cat(pixels), position_ids=positions).logits
        for row, own in enumerate(real):
            images = {"pixel_values": pixels[row]} if len(pixels[row]) else {}
            alone = model(input_ids=inputs["input_ids"][row : row + 1, own], **images).logits
            close(together[row, own], alone[0])


def test_unskipped_rows_are_those_of_the_plain_model(model):
    inputs = tiny_inputs([[3, "image", 4], [5], [9]], dtype=F64)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, CONFIGS["counts"]):
            skipping = model(**inputs).logits
    assert not torch.allclose(plain[0], skipping[0])
    for row, real in list(enumerate(inputs["attention_mask"].bool()))[1:]:
        close(skipping[row, real], plain[row, real])


def test_skipped_tokens_enter_every_attention_but_no_ffn(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    attended, entered = [], []
    handles = []
    for layer in model.model.language_model.layers:
        for part, seen in ((layer.self_attn.q_proj, attended), (layer.mlp.gate_proj, entered)):
            handles.append(part.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])))
    with torch.no_grad(), attach(model, CONFIGS["counts"]) as skip:
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert [hidden.shape[:2] for hidden in attended] == [skip.plan.roles.shape] * 3
    assert [hidden.shape[:-1].numel() for hidden in entered] == [int(skip.plan.ffn_mask.sum())] * 3
    assert int(skip.plan.ffn_mask.sum()) == int(skip.plan.attention_mask.sum()) - 12


def test_only_the_named_layers_skip(model):
    """Fewer layers, fewer tokens that bypass; naming all layers is the default."""
    inputs, entered = tiny_inputs(ROWS, dtype=F64), []

    def count(module, args):
        entered.append(args[0].shape[:-1].numel())

    layers = model.model.language_model.layers
    handles = [layer.mlp.gate_proj.register_forward_pre_hook(count) for layer in layers]
    with torch.no_grad(), attach(model, CONFIGS["counts"]) as skip:
        everywhere = model(**inputs).logits
        with skip.using(SkipConfig(retained=5, skipped=4, skip_layers=[0, 1, 2])):
            assert torch.equal(model(**inputs).logits, everywhere)
        entered.clear()
        with skip.using(CONFIGS["some-layers"]):
            model(**inputs)
    for handle in handles:
        handle.remove()
    assert skip.plan.skip_layers == (0, 2)
    few = int(skip.plan.ffn_mask.sum())
    assert entered == [few, skip.plan.ffn_mask.numel(), few]


def test_the_plan_of_the_last_prefill_is_available(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    with torch.no_grad(), attach(model, CONFIGS["counts"]) as skip:
        assert skip.plan is None
        model(**inputs)
        plan = skip.plan
        assert plan.count(TokenRole.RETAINED).tolist() == [5, 0, 10]
        assert plan.count(TokenRole.SKIPPED).tolist() == [4, 0, 8]
        assert plan.count(TokenRole.SUMMARY).tolist() == [2, 0, 4]
        assert plan.merged_into.shape == inputs["input_ids"].shape
        assert plan.removed.tolist() == [16 - 11, 0, 32 - 22]
        model(**tiny_inputs([["image", 1]], dtype=F64))
        assert skip.plan.roles.shape == (1, 12)


def test_hidden_states_have_the_callers_length(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    with torch.no_grad(), attach(model, CONFIGS["counts"]):
        plain = model(**inputs)
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.logits, plain.logits)
        assert len(out.hidden_states) == 4
        assert {hidden.shape for hidden in out.hidden_states} == {(*inputs["input_ids"].shape, 32)}
        close(model.lm_head(out.hidden_states[-1]), out.logits)


def test_results_can_be_tuples(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    with torch.no_grad(), attach(model, CONFIGS["counts"]):
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_an_image_smaller_than_the_counts_is_kept_whole(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    config = SkipConfig(retained=10, skipped=99)
    got, expected, plan = both(model, inputs, config)
    assert plan.count(TokenRole.RETAINED).tolist() == [10, 0, 20]
    assert plan.count(TokenRole.SKIPPED).tolist() == [6, 0, 12]
    close(got, expected)


def test_half_precision_follows_the_same_plan():
    inputs = tiny_inputs(ROWS, dtype=torch.bfloat16)
    model = tiny_llava(dtype=torch.bfloat16)
    with torch.no_grad(), attach(model, CONFIGS["counts"]) as skip:
        half = model(**inputs).logits
    wide = model.float()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with torch.no_grad(), attach(wide, CONFIGS["counts"]):
        full = wide(**inputs).logits
    assert half.dtype == torch.bfloat16
    assert skip.plan is not None
    real = inputs["attention_mask"].bool()
    difference = (half.float() - full)[real]
    assert float(difference.abs().median()) < 0.05 * float(full[real].abs().median())


def test_two_threads_at_once_follow_their_own_plans(model):
    """Both threads are between a layer's attention and its FFN at the same time."""
    batches = [tiny_inputs(ROWS, dtype=F64), tiny_inputs([["image", 7], [2, "image", "image"]], dtype=F64)]
    barrier = threading.Barrier(2, timeout=60)
    layers = model.model.language_model.layers

    def meet(*_):
        barrier.wait()

    def run(inputs):
        with torch.no_grad():
            return model(**inputs).logits

    with attach(model, CONFIGS["counts"]):
        alone = [run(inputs) for inputs in batches]
        handles = [layer.post_attention_layernorm.register_forward_hook(meet) for layer in layers]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, batches))
    for handle in handles:
        handle.remove()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
