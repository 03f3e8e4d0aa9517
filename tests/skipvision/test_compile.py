"""torch.compile: each layer is one graph, planning stays outside, and results do not change."""

import logging
import shutil

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from skipvision import attach
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS, close, labels_for, train_summary
from tests.skipvision.test_training import checkpointing, gradients, lora_model

# Dynamo emits these itself while it inspects tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

F64 = torch.float64
BATCHES = [
    tiny_inputs(ROWS, padding="right", dtype=F64),
    tiny_inputs([["image", 3], [2, "image", 1]], padding="right", dtype=F64, seed=1),
    tiny_inputs([[4], [7]], padding="right", dtype=F64, seed=2),
    tiny_inputs([[1, "image", 9], [9], [4]], padding="right", dtype=F64, seed=3),
]


@pytest.fixture(autouse=True)
def _fresh(caplog):
    """Reset Dynamo for each test, let it compile often, and hide its trace of thousands of lines."""
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    dynamo.reset()
    with dynamo.config.patch(recompile_limit=64):
        yield
    dynamo.reset()


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**inputs, **options).logits


def answers(model, inputs):
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def layers_of(model):
    return next(m for m in model.modules() if hasattr(m, "language_model")).language_model.layers


def compile_layers(model, backend="eager"):
    for layer in layers_of(model):
        layer.compile(fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    "name",
    ["counts", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grouped-contiguous", "ffn-ratio-later"))],
)
def test_every_layer_compiles_as_one_graph(name):
    model = tiny_llava(dtype=F64)
    with attach(model, CONFIGS[name]) as skip:
        train_summary(skip.summary)
        expected = [logits(model, inputs, use_cache=False) for inputs in BATCHES]
        counter = CompileCounter()
        compile_layers(model, counter)
        for inputs, eager in zip(BATCHES, expected, strict=True):
            assert torch.equal(logits(model, inputs, use_cache=False), eager)
        graphs = counter.frame_count
        assert 0 < graphs <= 2 * len(BATCHES), "one for all layers, and again for some shapes"
        for inputs in BATCHES:
            logits(model, inputs, use_cache=False)
        assert counter.frame_count == graphs, "what has been compiled is used again"


def test_attaching_does_not_make_layers_compile_more_often():
    """One graph serves all batches of one shape with images of one size."""
    model = tiny_llava(dtype=F64)
    with attach(model, CONFIGS["counts"]):
        counter = CompileCounter()
        compile_layers(model, counter)
        for seed in range(4):
            logits(model, tiny_inputs([[3, "image", 4]] * 2, dtype=F64, seed=seed), use_cache=False)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.slow  # a checkpoint around compiled layers, below, is trained quickly
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_compiled_layers_train_as_uncompiled_ones(use_reentrant):
    """Without checkpointing and with both kinds; two forwards run before the first backward."""
    first, second = BATCHES[:2]
    model = lora_model().train()
    with attach(model, CONFIGS["counts"]) as skip:
        train_summary(skip.summary)

        def loss(inputs):
            return model(**inputs, labels=labels_for(inputs), use_cache=False).loss

        expected = []
        for inputs in (first, second):
            loss(inputs).backward()
            expected.append(gradients(model))
        if use_reentrant is not None:
            checkpointing(model, use_reentrant)
        counter = CompileCounterWithBackend("aot_eager")
        compile_layers(model, counter)
        one, other = loss(first), loss(second)
        got = []
        for total in (one, other):
            total.backward()
            got.append(gradients(model))
        assert counter.frame_count > 0
    for alone, compiled in zip(expected, got, strict=True):
        for name, gradient in alone.items():
            close(compiled[name], gradient)


def test_a_checkpoint_around_compiled_layers_repeats_the_right_plan():
    """The user's own checkpoint calls a layer again in backward; the plan comes with the call."""
    first, second = BATCHES[:2]
    model = lora_model().train()
    with attach(model, CONFIGS["counts"]):

        def loss(inputs):
            return model(**inputs, labels=labels_for(inputs), use_cache=False).loss

        expected = []
        for inputs in (first, second):
            loss(inputs).backward()
            expected.append(gradients(model))
        compile_layers(model, "aot_eager")
        for layer in layers_of(model):
            inner = layer._compiled_call_impl

            def again(*args, inner=inner, **kwargs):
                return torch.utils.checkpoint.checkpoint(inner, *args, use_reentrant=False, **kwargs)

            layer._compiled_call_impl = again
        one, other = loss(first), loss(second)
        for total, alone in zip((one, other), expected, strict=True):
            total.backward()
            got = gradients(model)
            for name, gradient in alone.items():
                close(got[name], gradient)


# ----------------------------------------------------------------------------------- whole models


def of_the_model(model):
    return torch.compile(model, backend="eager")


def of_the_decoder(model):
    model.model.language_model.compile(backend="eager")
    return model


def of_the_layers(model):
    compile_layers(model)
    return model


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(of_the_model, "counts", marks=pytest.mark.slow),
        pytest.param(of_the_decoder, "ffn-ratio", marks=pytest.mark.slow),
        (of_the_layers, "counts"),
    ],
)
def test_compiled_prefill_and_decoding(way, name):
    model = tiny_llava(dtype=F64)
    prompt = tiny_inputs(ROWS, dtype=F64)
    with attach(model, CONFIGS[name]) as skip:
        train_summary(skip.summary)
        expected, answer = logits(model, prompt), answers(model, prompt)
        compiled = way(model)
        assert torch.equal(logits(compiled, prompt), expected)
        assert torch.equal(answers(compiled, prompt), answer)


@pytest.mark.parametrize("way", [pytest.param(of_the_model, marks=pytest.mark.slow), of_the_layers])
def test_compiled_models_notice_attaching_and_detaching(way):
    model = tiny_llava(dtype=F64)
    inputs = {**BATCHES[0], "use_cache": False}
    plain = logits(model, inputs)
    with attach(model, CONFIGS["counts"]):
        skipped = logits(model, inputs)
    with attach(model, CONFIGS["pool"]):
        pooled = logits(model, inputs)
    compiled = way(model)
    assert torch.equal(logits(compiled, inputs), plain)
    for name, expected in (("counts", skipped), ("pool", pooled)):
        with attach(model, CONFIGS[name]):
            assert torch.equal(logits(compiled, inputs), expected)
        assert torch.equal(logits(compiled, inputs), plain)


def attentions(explained):
    """Count the attentions in each graph that has any."""
    counts = (graph.code.count("scaled_dot_product") for graph in explained.graphs)
    return [count for count in counts if count]


@torch.no_grad()
@pytest.mark.slow
def test_attaching_breaks_the_whole_models_graph_around_tower_and_decoder_and_nowhere_else():
    model = tiny_llava(dtype=F64)
    inputs = {**BATCHES[0], "use_cache": False}
    model(**inputs)  # In the first call transformers adds hooks of its own, which break graphs once.
    plain = dynamo.explain(model)(**inputs)
    with attach(model, CONFIGS["counts"]):
        attached = dynamo.explain(model)(**inputs)
    tower, decoder = 2, 3
    assert attentions(plain) == attentions(attached) == [tower, decoder], "a graph each"
    ours = [reason for reason in attached.break_reasons if "torch.compiler.disable" in str(reason.reason)]
    others = {str(reason.reason) for reason in attached.break_reasons if reason not in ours}
    assert others <= {str(reason.reason) for reason in plain.break_reasons}
    assert attached.graph_count <= plain.graph_count + 3, "behind the tower, before the decoder, behind it"


@torch.no_grad()
def test_a_decoding_step_on_a_pruned_cache_has_the_decoder_in_one_graph():
    model = tiny_llava(dtype=F64)
    prompt = tiny_inputs(ROWS, dtype=F64)
    word = torch.full((len(ROWS), 1), 9)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(word)], dim=1)
    with attach(model, CONFIGS["counts"]) as skip:
        cache = model(**prompt, use_cache=True).past_key_values
        assert cache.get_seq_length() == int(skip.plan.cache_mask.sum(dim=1).max())
        step = dynamo.explain(model)(
            input_ids=word, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    assert attentions(step) == [3]
    assert step.graph_count <= 3, "words, decoder, LM head"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own modules
@pytest.mark.skipif(shutil.which("c++") is None, reason="the CPU backend of inductor needs a C++ compiler")
def test_inductor_gives_the_same_results():
    model = tiny_llava(dtype=F64)
    with attach(model, CONFIGS["counts"]):
        expected = [logits(model, inputs, use_cache=False) for inputs in BATCHES]
        compile_layers(model, "inductor")
        for inputs, eager in zip(BATCHES, expected, strict=True):
            # Norms compute in float32, whose sums inductor takes in another order.
            torch.testing.assert_close(logits(model, inputs, use_cache=False), eager, rtol=1e-4, atol=1e-5)
