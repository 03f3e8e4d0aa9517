"""Several LoRA adapters, each with its summary layer and SkipConfig, in one batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from skipvision import (
    AdapterError,
    ConfigError,
    Engine,
    Sampling,
    SkipConfig,
    attach,
    attachment_of,
    load_adapter,
    save_adapter,
)
from skipvision.engine import BASE
from skipvision.testing.llava import tiny_llava
from tests.skipvision.cases import train_summary
from tests.skipvision.engine.requests_for_tests import F64, ROWS, drain, ids_of, inputs_of, request

SKIPS = {
    "red": SkipConfig(retained=4, skipped=6),
    "green": SkipConfig(retained=3, skipped=3, merge="pool"),
    "blue": None,
}


def base_model():
    model = tiny_llava(dtype=F64, seed=3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter trained with each config; "blue" with all tokens."""
    where = tmp_path_factory.mktemp("adapters")
    for number, (name, skip) in enumerate(SKIPS.items()):
        torch.manual_seed(number)
        model = get_peft_model(
            base_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        )
        if skip is not None:
            train_summary(attach(model, skip).summary)
        save_adapter(model, where / name)
    return where


@pytest.fixture(scope="module")
def expected(folders):
    """Ids that `generate` returns under each adapter, on a model with that adapter only."""
    answers = {}
    for name in SKIPS:
        model = load_adapter(base_model(), folders / name)
        for row in range(len(ROWS)):
            inputs = inputs_of(row)
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            answers[name, row] = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
    for row in range(len(ROWS)):
        inputs = inputs_of(row)
        with attach(base_model(), SKIPS["red"]) as skip:
            output = skip.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers[BASE, row] = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.fixture
def engine(folders):
    with Engine(load_adapter(base_model(), folders / "red", name="red"), max_sequences=8) as engine:
        engine.add_adapter("green", folders / "green")
        engine.add_adapter("blue", folders / "blue")
        yield engine


def request_of(adapter, row):
    return request(row, adapter=adapter, key=(adapter, row), sampling=Sampling(max_new_tokens=6))


def test_each_request_is_answered_by_its_adapter(engine, expected):
    assert engine.adapters == [BASE, "red", "green", "blue"]
    assert len(set(expected.values())) > len(expected) // 2, "adapters with equal answers would prove nothing"
    requests = [request_of(adapter, row) for row in range(len(ROWS)) for adapter in engine.adapters]
    for completion in engine.run(requests):
        assert ids_of(completion) == expected[completion.key]
    assert engine.statistics().decode_steps < len(requests) * 5 / 4


def test_requests_without_an_adapter_run_under_the_loaded_one(engine, expected):
    (completion,) = engine.run([request_of(None, 0)])
    assert ids_of(completion) == expected["red", 0]
    assert completion.usage.visual_retained == 4


def test_a_named_adapter_runs_under_the_config_of_its_training(folders, expected):
    """The engine's own config only applies to the base model, and to requests that name no adapter."""
    other = SkipConfig(retained=2, skipped=2)
    with Engine(load_adapter(base_model(), folders / "red", name="red"), config=other) as engine:
        engine.add_adapter("green", folders / "green")
        for completion in engine.run([request_of(name, 0) for name in ("red", "green")]):
            assert ids_of(completion) == expected[completion.key]
        for completion in engine.run([request_of(name, 0) for name in (None, BASE)]):
            assert completion.usage.visual_retained == 2
        assert engine.configs == {BASE: other, "red": SKIPS["red"], "green": SKIPS["green"]}


def test_prefixes_are_cached_for_each_adapter(folders, expected):
    with Engine(load_adapter(base_model(), folders / "red", name="red"), prefix_cache_bytes=2**24) as engine:
        engine.add_adapter("green", folders / "green")
        for _ in range(2):
            for completion in engine.run([request_of(a, row) for a in ("red", "green") for row in (0, 2)]):
                assert ids_of(completion) == expected[completion.key]
        assert engine.statistics().prefix_hits == 4


def test_adapters_are_added_and_removed(engine, folders, expected):
    number = engine.submit(request_of("green", 0))
    with pytest.raises(ConfigError, match="1 requests run under adapter 'green'"):
        engine.remove_adapter("green")
    engine.cancel(number)
    engine.step()
    engine.remove_adapter("green")
    with pytest.raises(ConfigError, match="no adapter 'green' is loaded: choose from __base__, red, blue"):
        engine.submit(request_of("green", 0))
    with pytest.raises(ConfigError, match="cannot be removed"):
        engine.remove_adapter("red")
    with pytest.raises(ConfigError, match="adapter 'blue' is already loaded"):
        engine.add_adapter("blue", folders / "green")
    engine.add_adapter("green", folders / "green")
    for completion in engine.run([request_of("green", 0), request_of("blue", 0)]):
        assert ids_of(completion) == expected[completion.key]


def test_an_adapter_with_another_number_of_summary_tokens_is_rejected(engine, tmp_path, expected):
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules="all-linear"))
    attach(model, SkipConfig(retained=4, skipped=4, summary_tokens=3))
    save_adapter(model, tmp_path / "three")
    with pytest.raises(ConfigError, match="summary_tokens=3, but this model is attached with 1"):
        engine.add_adapter("three", tmp_path / "three")
    with pytest.raises(AdapterError):
        engine.add_adapter("missing", tmp_path / "missing")
    assert engine.adapters == [BASE, "red", "green", "blue"]
    for completion in engine.run([request_of(adapter, 0) for adapter in engine.adapters]):
        assert ids_of(completion) == expected[completion.key]


@pytest.mark.parametrize(
    ("names", "compiled"),
    [
        (("red", "blue", "green"), False),
        pytest.param(("blue", "green", "red"), "eager", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_a_bare_model_are_added_and_removed_while_it_answers(folders, expected, names, compiled):
    model = base_model()
    modules = dict(model.named_modules())

    def check(engine, adapters):
        assert sorted(engine.adapters) == sorted(adapters)
        for completion in engine.run([request_of(a, row) for row in range(len(ROWS)) for a in adapters]):
            assert ids_of(completion) == expected[completion.key]

    with Engine(model, config=SKIPS["red"], max_sequences=8, compile_decoding=compiled) as engine:
        attached = dict(model.named_modules())
        check(engine, [BASE])
        for number, name in enumerate(names, start=1):
            for row in range(3):
                engine.submit(request_of(BASE, row))
            chunks = [chunk for _ in range(3) for chunk in engine.step()]
            engine.add_adapter(name, folders / name)
            chunks += drain(engine)
            for chunk in chunks:
                if chunk.completion is not None:
                    assert ids_of(chunk.completion) == expected[chunk.completion.key]
            check(engine, [BASE, *names[:number]])
        for number, name in enumerate(names, start=1):
            engine.remove_adapter(name)
            check(engine, [BASE, *names[number:]])
        assert dict(model.named_modules()) == attached
        engine.add_adapter("green", folders / "green")
        check(engine, [BASE, "green"])
    assert dict(model.named_modules()) == modules


def test_the_first_adapter_with_a_summary_decides_the_number_of_summary_tokens(folders, expected, tmp_path):
    """A damaged adapter decides nothing; nor does the config that the engine was created with."""
    three = get_peft_model(base_model(), LoraConfig(r=4, target_modules="all-linear"))
    attach(three, SkipConfig(retained=4, skipped=4, summary_tokens=3))
    save_adapter(three, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    save_file({name: weight[:1] for name, weight in load_file(weights).items()}, weights)
    with Engine(base_model(), config=SkipConfig.full()) as engine:
        plain = [ids_of(done) for row in range(3) for done in engine.run([request_of(BASE, row)])]
        for names in ((), ("blue",), ("red", "green")):
            for name in names:
                engine.add_adapter(name, folders / name)
            if "red" not in names:
                with pytest.raises(AdapterError, match="does not fit this model, or its files are damaged"):
                    engine.add_adapter("damaged", tmp_path / "damaged")
            for completion in engine.run([request_of(a, row) for row in (0, 2) for a in engine.adapters[1:]]):
                assert ids_of(completion) == expected[completion.key]
            assert plain == [ids_of(done) for row in range(3) for done in engine.run([request_of(BASE, row)])]
        assert engine.adapters == [BASE, "blue", "red", "green"]


def test_closing_keeps_the_loaded_adapter_and_its_attachment(folders):
    model = load_adapter(base_model(), folders / "red", name="red")
    attachment = attachment_of(model)
    with Engine(model) as engine:
        engine.add_adapter("green", folders / "green")
        list(engine.run([request_of(BASE, 0)]))
    assert attachment_of(model) is attachment
    assert attachment.config == SKIPS["red"]
    assert model.active_adapters == ["red"]
