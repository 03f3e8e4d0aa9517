"""Every kind of PEFT adapter next to the base model and plain LoRA: right answers, or a clear refusal."""

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import ArrowConfig

from skipvision import (
    AdapterError,
    ConfigError,
    Engine,
    Sampling,
    UnsupportedModelError,
    attach,
    attachment_of,
    load_adapter,
    save_adapter,
)
from skipvision.engine import BASE
from skipvision.engine.adapter_kinds import reason_to_refuse
from tests.skipvision.cases import train_summary
from tests.skipvision.engine.requests_for_tests import ids_of, inputs_of, request
from tests.skipvision.engine.test_adapters import SKIPS, base_model

WORDS = r".*language_model.*(q_proj|v_proj|down_proj)"
SKIP = SKIPS["red"]


def lora(targets=WORDS, **options):
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)


SHARED = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "LoRA with a rank and an alpha for each module": lora(
        rank_pattern={r"layers\.1\..*q_proj": 7, "down_proj": 2}, alpha_pattern={"v_proj": 32}
    ),
    "LoRA with biases": lora(lora_bias=True),
    "LoRA on embeddings": lora(r".*(embed_tokens|q_proj)"),
    "LoRA on the projector": lora(r".*(multi_modal_projector.linear_\d|language_model.*q_proj)"),
    "LoRA on the tower": lora(r".*vision.*(q_proj|k_proj|v_proj)"),
    "whole projector": lora(modules_to_save=["multi_modal_projector"]),
}
"""Kinds whose rows share decode steps with rows under other adapters."""

ALONE = {
    "DoRA": lora(use_dora=True),
    "whole LM head": lora(modules_to_save=["lm_head"]),
    "whole norms": lora(modules_to_save=["post_attention_layernorm"]),
    "trained tokens": lora(trainable_token_indices=[7, 8, 9]),
}
"""Kinds that PEFT loads next to plain LoRA, but cannot mix with it in one call."""

OTHERS = {
    "IA3": IA3Config(
        target_modules=WORDS, feedforward_modules=r".*language_model.*down_proj", init_ia3_weights=False
    ),
    "LoHa": LoHaConfig(r=4, target_modules=WORDS, init_weights=False),
    "LoKr": LoKrConfig(r=4, target_modules=WORDS, init_weights=False),
    "OFT": OFTConfig(oft_block_size=8, target_modules=WORDS, init_weights=False),
    "VeRA": VeraConfig(r=4, target_modules=r".*language_model.*q_proj", init_weights=False),
    "norms": LNTuningConfig(target_modules=r".*language_model.*layernorm"),
}
"""Kinds that PEFT does not load next to LoRA. It would run base-model rows under them without a word."""

REFUSED = {
    "prefix tuning": (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "PREFIX_TUNING adds virtual tokens",
    ),
    "activated LoRA": (
        lora(alora_invocation_tokens=[7], task_type="CAUSAL_LM"),
        "begins in the middle of a prompt",
    ),
    "arrow": (lora(arrow_config=ArrowConfig()), "mixes all loaded adapters"),
    "parameters": (lora(target_parameters=["mlp.experts.down_proj"]), "cannot run in a batch with other"),
    "repeated layers": (lora(layer_replication=[(0, 2), (1, 3)]), "adds decoder layers"),
}


def saved(kind, folder):
    torch.manual_seed(1)
    model = get_peft_model(base_model(), kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("modules_to_save", "ln_tuning", "token_adapter", "vera_lambda")):
                weight.add_(torch.randn_like(weight) / 2)
    train_summary(attach(model, SKIP).summary)
    return save_adapter(model, folder)


def generated(model, row):
    inputs = inputs_of(row)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


def requests_of(names):
    return [
        request(row, adapter=name, key=(name, row), sampling=Sampling(max_new_tokens=4 + row))
        for row in (0, 2)
        for name in names
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(lora(), tmp_path_factory.mktemp("plain") / "plain")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about these kinds
@pytest.mark.parametrize("name", [*SHARED, *ALONE, *OTHERS])
def test_rows_under_one_kind_leave_the_others_as_they_are(name, plain, tmp_path):
    kind = {**SHARED, **ALONE, **OTHERS}[name]
    folder = saved(kind, tmp_path / "new")
    alone = {BASE: base_model(), "new": load_adapter(base_model(), folder)}
    attach(alone[BASE], SKIP)
    if name not in OTHERS:
        alone["plain"] = load_adapter(base_model(), plain)
    expected = {(key, row): generated(model, row) for key, model in alone.items() for row in (0, 2)}
    assert expected["new", 0] != expected[BASE, 0], "an adapter without effect would prove nothing"
    with Engine(base_model(), config=SKIP, max_sequences=8) as engine:
        if name not in OTHERS:
            engine.add_adapter("plain", plain)
        engine.add_adapter("new", folder)
        assert engine._adapters.decodes_alone("new") is (name not in SHARED)
        for completion in engine.run(requests_of(alone)):
            ids = ids_of(completion)
            assert ids == expected[completion.key][: len(ids)], completion.key
        if name in OTHERS:
            with pytest.raises(AdapterError, match=r"it is of the kind LORA, and PEFT loads no other kind"):
                engine.add_adapter("plain", plain)
        assert len(list(engine.run(requests_of([BASE])))) == 2


KINDS = {**SHARED, **ALONE}
TOGETHER = [name for name in KINDS if name not in ("whole projector", "trained tokens", "LoRA on embeddings")]
ORDERS = {
    "forwards": (
        [*TOGETHER, "LoRA on embeddings", "whole projector", "trained tokens"],
        {
            "whole projector": r"replaces multi_modal_projector \(modules_to_save\), where another adapter",
            "trained tokens": "trainable_token_indices cannot be applied to modules of type",
        },
    ),
    "backwards": (
        ["whole projector", *reversed(TOGETHER), "trained tokens"],
        {"LoRA on the projector": "changes layers of multi_modal_projector, which another adapter replaces"},
    ),
    "tokens first": (
        ["trained tokens", "LoRA"],
        {"LoRA": "'trained tokens' has trainable_token_indices, and PEFT adds none without them after it"},
    ),
}
"""Orders in which adapters are added, and those that are refused then."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The folder of an adapter of each kind, and what `generate` answers under each alone."""
    where = tmp_path_factory.mktemp("kinds")
    folders = {name: saved(kind, where / str(number)) for number, (name, kind) in enumerate(KINDS.items())}
    alone = {BASE: base_model(), **{name: load_adapter(base_model(), at) for name, at in folders.items()}}
    attach(alone[BASE], SKIP)
    return folders, {(name, row): generated(model, row) for name, model in alone.items() for row in (0, 2)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about these kinds
@pytest.mark.parametrize("order", ORDERS)
def test_all_kinds_of_lora_answer_in_one_engine(order, kinds):
    """Each request gets the tokens of its own model; a kind that PEFT cannot add harms no other."""
    (folders, expected), (names, refused) = kinds, ORDERS[order]
    with Engine(base_model(), config=SKIP, max_sequences=8) as engine:
        for name in names:
            if name in refused:
                with pytest.raises(AdapterError, match=refused[name]):
                    engine.add_adapter(name, folders[name])
            else:
                engine.add_adapter(name, folders[name])
        assert engine.adapters == [BASE, *(name for name in names if name not in refused)]
        for completion in engine.run(requests_of(engine.adapters)):
            ids = ids_of(completion)
            assert ids == expected[completion.key][: len(ids)], completion.key


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_the_engine_cannot_run(name, plain, tmp_path, monkeypatch):
    kind, reason = REFUSED[name]
    assert reason in reason_to_refuse(kind)
    kind.save_pretrained(tmp_path)
    for file in ("skip_config.json", "skip_summary.safetensors"):
        (tmp_path / file).write_bytes((plain / file).read_bytes())
    with Engine(base_model(), config=SKIP) as engine:
        with pytest.raises(AdapterError, match=f"the engine cannot run .*{reason}|has peft_type 'PREFIX"):
            engine.add_adapter("new", tmp_path)
        assert engine.adapters == [BASE]
        assert len(list(engine.run(requests_of([BASE])))) == 2


@pytest.mark.parametrize("name", ["", "../x", "v1.2"])
def test_names_that_peft_cannot_take_are_named(name, plain):
    with Engine(base_model(), config=SKIP) as engine:
        with pytest.raises(ConfigError, match="no empty name of an adapter, and none with a"):
            engine.add_adapter(name, plain)
        assert engine.adapters == [BASE]


def test_a_model_that_brings_such_an_adapter_is_refused():
    model = get_peft_model(base_model(), lora(alora_invocation_tokens=[7], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="cannot run adapter 'default': activated LoRA"):
        Engine(model, config=SKIP)
    assert attachment_of(model) is None
