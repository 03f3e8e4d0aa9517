"""Packed weights: the same answers, no second copy of the weights, and the model restored at the end."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from skipvision import Engine, Request, Sampling, attach, load_adapter, save_adapter
from skipvision._compat_onednn import multiplies_packed
from skipvision.engine import BASE
from skipvision.engine.adapter_kinds import reads_weights
from skipvision.engine.packing import PackedLinear, PackedWeights
from skipvision.testing.families import tiny_batch, tiny_model
from skipvision.testing.llava import tiny_llava
from tests.skipvision.cases import train_summary
from tests.skipvision.engine.requests_for_tests import CONFIGS, inputs_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CONFIG = CONFIGS["counts"]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU has no products with packed bfloat16 weights",
)


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    """Pack bfloat16 also where oneDNN emulates it."""
    monkeypatch.setattr(
        "skipvision.engine.engine.multiplies_packed", lambda device, dtype: (device, dtype) == (CPU, BF16)
    )


def model_in(dtype=BF16, **options):
    model = tiny_llava(dtype=dtype, seed=3, **options)
    model.generation_config.eos_token_id = None
    return model


def requests(adapters=(None,)):
    return [
        Request(
            inputs=inputs_of(row),
            sampling=Sampling(max_new_tokens=4, logprobs=2),
            adapter=adapter,
            key=(row, adapter),
        )
        for row in range(3)
        for adapter in adapters
    ]


def answers(engine, adapters=(None,)):
    """Tokens of each request, and their log probabilities."""
    found = {}
    for completion in engine.run(requests(adapters)):
        assert completion.error is None
        (choice,) = completion.choices
        found[completion.key] = (choice.token_ids, [[one.logprob, *one.top] for one in choice.logprobs])
    return found


def close(found, expected):
    """Whether tokens are equal, and log probabilities as near as bfloat16 allows, or tokens nearly tied."""
    assert found.keys() == expected.keys()
    for key, (ids, reports) in found.items():
        for token, other, report, reference in zip(
            ids, expected[key][0], reports, expected[key][1], strict=True
        ):
            assert report[0] == pytest.approx(reference[0], abs=0.1)
            if token != other:
                break  # the answers differ from here on
    return True


def answers_both_ways(model, adapters=(None,), add=lambda engine: None):
    """Answers of an engine with packed weights, and of one without."""
    results = []
    for pack_weights in (True, False):
        with Engine(model, None, CONFIG, max_sequences=4, pack_weights=pack_weights) as engine:
            add(engine)
            results.append(answers(engine, adapters))
            assert (engine.statistics().packed_bytes > 0) is pack_weights
    return results


def test_answers_are_those_of_unpacked_weights():
    assert close(*answers_both_ways(model_in()))


def test_answers_in_float32_and_float64_are_untouched():
    for dtype in (torch.float32, torch.float64):
        model = model_in(dtype)
        with Engine(model, None, CONFIG) as engine:
            assert engine.statistics().packed_bytes == 0
            assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_the_switch_turns_it_off():
    for options in ({"pack_weights": False}, {"compile_decoding": "eager"}):
        with Engine(model_in(), None, CONFIG, **options) as engine:
            assert engine.statistics().packed_bytes == 0


def test_weights_exist_once_and_come_back_bit_for_bit():
    model = model_in()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]
    with Engine(model, None, CONFIG) as engine:
        weights = [parameters[f"{name}.weight"] for name in linear]
        assert [weight.numel() for weight in weights] == [0] * len(weights)
        assert [weight.untyped_storage().nbytes() for weight in weights] == [0] * len(weights)
        size = sum(before[f"{name}.weight"].nbytes for name in linear)
        assert engine.statistics().packed_bytes == size
        assert model.dtype == BF16
        list(engine.run(requests()[:1]))
    assert dict(model.named_modules()) == modules
    assert all(now is parameters[name] for name, now in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_is_the_embedding_stays_as_it_came():
    model = model_in()
    model.lm_head.weight = model.get_input_embeddings().weight
    with Engine(model, None, CONFIG, max_sequences=4) as engine:
        assert type(model.lm_head) is nn.Linear
        assert isinstance(model.model.language_model.layers[0].mlp.up_proj, PackedLinear)
        packed = answers(engine)
    with Engine(model, None, CONFIG, max_sequences=4, pack_weights=False) as engine:
        assert close(packed, answers(engine))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_biases_and_experts(family):
    """Qwen2.5 has biases; the experts of a mixture are no `nn.Linear`."""
    model = tiny_model(family, dtype=BF16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    inputs = tiny_batch(model, [[3, "image", 4]])
    found = []
    for pack_weights in (True, False):
        with Engine(model, None, CONFIG, pack_weights=pack_weights) as engine:
            request = Request(inputs=inputs, sampling=Sampling(max_new_tokens=4, logprobs=2))
            (completion,) = engine.run([request])
            (choice,) = completion.choices
            found.append({0: (choice.token_ids, [[one.logprob] for one in choice.logprobs])})
    assert close(*found)


# --------------------------------------------------------------------------------------------- adapters


def lora(**options):
    targets = r".*language_model.*(q_proj|v_proj|down_proj)"
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters by name; "whole" also replaces the projector, and "dora" reads the weights."""
    where = tmp_path_factory.mktemp("adapters")
    kinds = {
        "red": lora(),
        "whole": lora(modules_to_save=["multi_modal_projector"]),
        "dora": lora(use_dora=True),
    }
    for number, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(number)
        model = get_peft_model(model_in(), kind)
        train_summary(attach(model, CONFIG).summary)
        save_adapter(model, where / name)
    return where


def test_each_request_has_its_adapter(folders):
    def add(engine):
        for name in ("red", "whole"):
            engine.add_adapter(name, folders / name)

    model = model_in()
    packed, unpacked = answers_both_ways(model, (BASE, "red", "whole"), add)
    assert close(packed, unpacked)
    assert len({ids for ids, _ in packed.values()}) > len(packed) // 2, "equal answers would prove nothing"
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_model_that_comes_with_an_adapter(folders):
    model = load_adapter(model_in(), folders / "red", name="red")
    packed, unpacked = answers_both_ways(model, ("red", BASE))
    assert close(packed, unpacked)


def test_weights_are_unpacked_while_an_adapter_reads_them(folders):
    model = load_adapter(model_in(), folders / "red", name="red")
    found = []
    for pack_weights in (True, False):
        with Engine(model, None, CONFIG, max_sequences=4, pack_weights=pack_weights) as engine:
            engine.add_adapter("dora", folders / "dora")
            assert engine.statistics().packed_bytes == 0
            found.append(answers(engine, (BASE, "red", "dora")))
            engine.remove_adapter("dora")
            assert (engine.statistics().packed_bytes > 0) is pack_weights
            found.append(answers(engine, (BASE, "red")))
    assert close(found[0], found[2])
    assert close(found[1], found[3])


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, False),
        ({"init_lora_weights": "gaussian", "use_rslora": True}, False),
        ({"use_dora": True}, True),
        ({"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "olora"}, True),
    ],
)
def test_adapters_that_read_weights_are_known(options, reads):
    assert reads_weights(LoraConfig(target_modules="all-linear", **options)) is reads


def test_merged_adapters_and_watched_modules_are_left_alone(folders):
    model = load_adapter(model_in(), folders / "red", name="red")
    model.merge_adapter()
    with Engine(model, None, CONFIG):
        layer = model.get_base_model().model.language_model.layers[0]
        assert type(layer.mlp.down_proj.base_layer) is nn.Linear
    model = model_in()
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with Engine(model, None, CONFIG):
        assert type(model.lm_head) is nn.Linear
    handle.remove()


# ----------------------------------------------------------------------------------------- the module


def test_the_product_of_any_shape_and_the_unpacked_copy():
    torch.manual_seed(0)
    parent = nn.Module()
    parent.one = nn.Linear(40, 24).to(BF16)
    parent.again, parent.plain = parent.one, nn.Linear(40, 24, bias=False).to(BF16)
    expected = copy.deepcopy(parent)
    weights = PackedWeights(parent, lambda *_: True)
    weights.pack()
    weights.pack()
    assert parent.one is parent.again
    assert weights.nbytes == 2 * 24 * 40 * 2
    for name in ("one", "plain"):
        packed, linear = getattr(parent, name), getattr(expected, name)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(packed.weight, linear.weight)
        for shape in ((40,), (1, 40), (0, 40), (2, 3, 40)):
            values = torch.randn(shape).to(BF16)
            with torch.no_grad():
                torch.testing.assert_close(packed(values), linear(values), atol=0.02, rtol=0.02)
        copied = copy.deepcopy(packed)
        assert type(copied) is nn.Linear
        assert torch.equal(copied.weight, linear.weight)
    weights.unpack()
    assert type(parent.one) is nn.Linear
    assert parent.one is parent.again
    assert torch.equal(parent.one.weight, expected.one.weight)


def test_only_bfloat16_on_cpus_that_multiply_it_is_packed(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert multiplies_packed(CPU, BF16)
    assert not multiplies_packed(CPU, torch.float32)
    assert not multiplies_packed(CPU, torch.float16)
    assert not multiplies_packed(torch.device("cuda"), BF16)
    assert not multiplies_packed(torch.device("meta"), BF16)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert not multiplies_packed(CPU, BF16)
