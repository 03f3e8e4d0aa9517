"""Every field of a model's `generation_config`: the engine does as `generate` does, or refuses it by name."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import CompileConfig

from skipvision import ConfigError, Engine, GenerationError, Sampling, attach, attachment_of
from skipvision.engine.generation import _REPLACED
from skipvision.testing.llava import IMAGE_TOKEN
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    Letters,
    alone,
    ids_of,
    inputs_of,
    one,
    request,
    text_of,
    words,
)

TOKENS, SEED = 8, 13
IDS = alone(0, tokens=TOKENS, seed=SEED)
PROMPT = inputs_of(0, SEED)["input_ids"].shape[1]
ENDS = {"eos_token_id": IDS[2]}
"""A model that ends its answer after three tokens."""

APPLIED = {
    "bad_words_ids": {"bad_words_ids": [[IDS[1]], [IDS[4], IDS[5]]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [IDS[0]]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.5},
    "eos_token_id": {"eos_token_id": [IDS[1], 63]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": [9]},
    "min_length": {**ENDS, "min_length": PROMPT + 6},
    "min_new_tokens": {**ENDS, "min_new_tokens": 6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "sequence_bias": {"sequence_bias": {(IDS[1],): -10.0, (IDS[4], IDS[5]): -10.0, (11, 12): 3.0}},
    "suppress_tokens": {"suppress_tokens": [IMAGE_TOKEN, IDS[0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
}
"""Fields that change the tokens of a greedy answer."""

SAME_TOKENS = {
    "forced_bos_token_id": 9,  # `generate` forces it after a single token, and a prompt has more.
    "remove_invalid_values": True,
    "renormalize_logits": True,
}
"""Fields that are applied, without effect on this answer."""

TOGETHER = {
    "several": {
        **ENDS,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[IDS[0]], [IDS[3]]],
        "min_new_tokens": 4,
        "suppress_tokens": [IMAGE_TOKEN, 11],
        "renormalize_logits": True,
    },
    "SynthID": {
        "watermarking_config": SynthIDTextWatermarkingConfig(
            keys=[3, 5, 7, 11], ngram_len=3, context_history_size=8, sampling_table_size=256
        )
    },
}

DRAWN = {
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "min_p": {"min_p": 0.3},
    "top_h": {"top_h": 0.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.5},
    "typical_p": {"typical_p": 0.4},
}
"""Fields that apply only where tokens are drawn."""

OF_THE_REQUEST = {
    "do_sample": True,
    "max_length": 9,
    "max_new_tokens": 3,
    "num_return_sequences": 2,
    "temperature": 0.3,
}
"""Fields that a request's `Sampling` always replaces."""

NO_EFFECT = {
    "assistant_confidence_threshold": 0.2,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bos_token_id": 5,
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "compile_config": CompileConfig(),
    "continuous_batching_config": {},
    "decoder_start_token_id": 5,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "early_stopping": True,
    "is_assistant": True,
    "length_penalty": 2.0,
    "low_memory": True,
    "max_cache_len": 64,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 5,
    "prefill_chunk_size": 8,
    "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": True,
    "speculation_type": "dflash",
    "target_lookbehind": 3,
    "transformers_version": "5.0.0",
    "use_cache": False,
    "use_mtp": True,
}
"""Fields about speed, output, beams or assistants."""

REFUSED = {
    "constraints": [object()],
    "dola_layers": "high",
    "force_words_ids": [[7]],
    "guidance_scale": 1.5,
    "max_time": 3.0,
    "num_beam_groups": 2,
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "token_healing": True,
}

KINDS = {
    "applied": [*APPLIED, *SAME_TOKENS, "stop_strings"],
    "applied where tokens are drawn": [*DRAWN],
    "replaced by `Sampling`": [*OF_THE_REQUEST],
    "without effect": [*NO_EFFECT],
    "refused": [*REFUSED],
}


@contextlib.contextmanager
def model_with(**settings):
    """The tiny model with these fields in its generation_config."""
    model = words()
    earlier = model.generation_config
    model.generation_config = copy.deepcopy(earlier)
    vars(model.generation_config).update(settings)
    try:
        yield model
    finally:
        model.generation_config = earlier


def of_generate(model, **options):
    inputs = inputs_of(0, SEED)
    with attach(model, CONFIGS["counts"]):
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **options)
    return tuple(output[0, PROMPT:].tolist())


def of_engine(model, **sampling):
    with Engine(model, Letters(), CONFIGS["counts"]) as engine:
        completion = one(engine, request(0, seed=SEED, sampling=Sampling(max_new_tokens=TOKENS, **sampling)))
    return completion.choices[0].token_ids


def test_every_field_of_the_installed_transformers_is_in_the_tables():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = [name for names in KINDS.values() for name in names]
    assert not fields - {*known}, "does it change tokens? extend skipvision/engine/generation.py and a table"
    assert len(known) == len({*known})


def test_the_page_names_the_same_fields():
    page = Path("docs/engine.md").read_text(encoding="utf-8").split("## Settings of the model")[1]
    items = re.findall(r"^- \*\*(.+?)\*\*.*?:\n((?:  .+\n)+)", page.split("\n## ")[0], flags=re.MULTILINE)
    found = {kind: sorted(re.findall(r"`(\w+)`", names)) for kind, names in items}
    assert found == {kind: sorted(names) for kind, names in KINDS.items()}


@pytest.mark.filterwarnings("ignore")  # of transformers, about some fields
@pytest.mark.parametrize("name", [*APPLIED, *SAME_TOKENS, *TOGETHER])
def test_the_answer_is_that_of_generate(name):
    settings = {**APPLIED, **TOGETHER}.get(name) or {name: SAME_TOKENS[name]}
    with model_with(**settings) as model:
        expected = of_generate(model)
        assert of_engine(model) == expected
        assert (expected == IDS) is (name in SAME_TOKENS), "a setting without effect would prove nothing"


def test_logits_that_are_no_numbers_are_replaced_as_generate_replaces_them():
    """With `remove_invalid_values`, NaN and infinite logits of some tokens in some steps end no request."""

    def spoil(head, args, logits):
        logits = logits.clone()
        logits[..., IDS[0]] = torch.nan
        logits[..., 20] = torch.where(logits[..., 21] > logits[..., 22], torch.inf, logits[..., 20])
        logits[..., 23] = torch.where(logits[..., 21] < logits[..., 22], -torch.inf, torch.nan)
        return logits

    with model_with(remove_invalid_values=True) as model:
        handle = model.get_output_embeddings().register_forward_hook(spoil)
        try:
            expected = of_generate(model)
            assert 20 in expected
            assert len({*expected}) > 1, "not infinite in each step"
            assert of_engine(model) == expected
            drawn = of_engine(model, temperature=1.0, seed=1)
            model.generation_config.remove_invalid_values = None
            with pytest.raises(GenerationError, match="NaN or infinite"):
                of_engine(model)
        finally:
            handle.remove()
    assert len(drawn) == TOKENS


def test_a_request_replaces_settings_of_the_model_as_arguments_of_generate_do():
    with model_with(repetition_penalty=2.5, bad_words_ids=[[IDS[1]]]) as model:
        assert of_engine(model, repetition_penalty=1.0) == of_generate(model, repetition_penalty=1.0)
        assert of_engine(model, repetition_penalty=0.8) == of_generate(model, repetition_penalty=0.8)
        assert len({of_engine(model), of_engine(model, repetition_penalty=1.0)}) == 2


def test_rows_of_a_batch_count_their_own_tokens():
    with model_with(repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=6, **ENDS) as model:
        expected = {}
        for row in range(6):
            inputs = inputs_of(row)
            with attach(model, CONFIGS["counts"]):
                output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            expected[row] = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
        with Engine(model, Letters(), CONFIGS["counts"], max_sequences=4) as engine:
            for completion in engine.run(request(row, key=row, tokens=TOKENS) for row in range(6)):
                assert ids_of(completion) == expected[completion.key]


@pytest.mark.parametrize("name", [*DRAWN, "with a request's own"])
def test_draws_follow_the_distribution_of_generate(name):
    """Frequencies of 1,000 first tokens against the scores that `generate` draws from."""
    own = {} if name in DRAWN else {"top_k": 6, "top_p": 0.9}
    with model_with(**DRAWN.get(name, {"min_p": 0.1, "top_k": 3})) as model:
        with attach(model, CONFIGS["counts"]):
            output = model.generate(
                **inputs_of(0, SEED),
                **{"top_k": model.generation_config.top_k or 0, **own},
                max_new_tokens=1,
                do_sample=True,
                temperature=0.5,
                output_scores=True,
                return_dict_in_generate=True,
            )
        expected = output.scores[0][0].softmax(0)
        sampling = Sampling(max_new_tokens=1, temperature=0.5, seed=3, n=1000, **own)
        with Engine(model, Letters(), CONFIGS["counts"], max_sequences=1000) as engine:
            choices = one(engine, request(0, seed=SEED, sampling=sampling)).choices
    drawn = torch.tensor([choice.token_ids[0] for choice in choices])
    frequencies = drawn.bincount(minlength=len(expected)) / len(choices)
    assert 1 < int((expected > 0).sum()) < 40, "a filter that keeps one token or all would prove nothing"
    assert not frequencies[expected == 0].any()
    assert float((frequencies - expected).abs().sum()) / 2 < 0.1


def test_sampling_settings_of_the_model_leave_greedy_requests_as_they_are():
    drawn = {key: value for settings in DRAWN.values() for key, value in settings.items()}
    with (
        model_with(do_sample=True, **drawn) as model,
        pytest.warns(UserWarning, match="do_sample=True, which"),
    ):
        assert of_engine(model) == IDS


@pytest.mark.parametrize("name", NO_EFFECT)
def test_fields_that_change_no_token(name):
    with model_with(**{name: NO_EFFECT[name]}) as model:
        assert of_engine(model) == IDS


@pytest.mark.parametrize("name", [*OF_THE_REQUEST, "all"])
def test_fields_that_requests_replace_are_named_in_a_warning(name):
    settings = OF_THE_REQUEST if name == "all" else {"do_sample": True, name: OF_THE_REQUEST[name]}
    has = ", ".join(f"{key}={settings[key]}" for key in _REPLACED if key in settings)
    with (
        model_with(**NO_EFFECT, **settings) as model,
        pytest.warns(UserWarning, match=rf"generation_config has {has}, which generate applies\.") as warned,
    ):
        assert of_engine(model) == IDS
    assert len(warned) == 1


def test_settings_without_effect_cause_no_warning():
    with model_with(do_sample=False, temperature=0.3, num_return_sequences=1) as model:
        assert of_engine(model) == IDS


@pytest.mark.parametrize("name", REFUSED)
def test_the_engine_refuses_by_name(name):
    with (
        model_with(**{name: REFUSED[name]}) as model,
        pytest.raises(
            ConfigError, match=rf"cannot apply .*: {name}=.*; set it to .*, or call model.generate"
        ),
    ):
        Engine(model, Letters(), CONFIGS["counts"])


def test_all_refused_fields_are_named_at_once():
    with model_with(**REFUSED) as model, pytest.raises(ConfigError) as caught:
        Engine(model, Letters(), CONFIGS["counts"])
    assert all(f"{name}=" in str(caught.value) for name in REFUSED)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": "two"},
        {"repetition_penalty": -1.0},
        {"sequence_bias": {(640,): 1.0}},
        {"exponential_decay_length_penalty": (2, 3.0)},
        {"top_k": -3},
    ],
)
def test_invalid_settings_are_reported_before_any_request(settings):
    with (
        model_with(**settings) as model,
        pytest.raises(ConfigError, match=r"generation_config .* is invalid"),
    ):
        Engine(model, Letters(), CONFIGS["counts"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", [[1]]),
        ("eos_token_id", "</s>"),
        ("suppress_tokens", 5.0),
        ("stop_strings", 5),
        ("stop_strings", ["a", 5]),
        ("num_beams", "four"),
    ],
)
def test_settings_of_another_type_are_named(name, value):
    with (
        model_with(**{name: value}) as model,
        pytest.raises(ConfigError, match=rf"is invalid: {name}={re.escape(repr(value))} must be a "),
    ):
        Engine(model, Letters(), CONFIGS["counts"])


def test_ids_may_be_tensors():
    settings = {"suppress_tokens": [IMAGE_TOKEN, IDS[0]], "eos_token_id": [9, IDS[2]]}
    with model_with(**settings) as model:
        expected = of_generate(model)
    with model_with(**{name: torch.tensor(ids) for name, ids in settings.items()}) as model:
        assert of_engine(model) == expected
    with model_with(eos_token_id=torch.tensor(IDS[1])) as model:
        assert of_engine(model) == IDS[: IDS.index(IDS[1]) + 1]


def test_suppressed_tokens_outside_the_vocabulary_are_ignored():
    with model_with(suppress_tokens=[IMAGE_TOKEN, IDS[0], 999_999, -1]) as model:
        assert of_engine(model) == of_generate(model)


def test_stop_strings_of_the_model_end_answers():
    text = text_of(IDS)
    with model_with(stop_strings=[text[3:5]]) as model:
        with Engine(model, Letters(), CONFIGS["counts"]) as engine:
            choice = one(engine, request(0, seed=SEED, tokens=TOKENS)).choices[0]
        with pytest.raises(ConfigError, match="pass the processor"):
            Engine(model, None, CONFIGS["counts"])
        assert attachment_of(model) is None
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[3:5])], "stop")


def test_stop_strings_that_are_special_tokens_end_answers():
    """Texts of answers leave special tokens out, so they are found by their ids."""

    class WithMarks(Letters):
        def get_added_vocab(self):
            return {"<|end|>": IDS[1]}

    with (
        model_with(stop_strings="<|end|>") as model,
        Engine(model, WithMarks(), CONFIGS["counts"]) as engine,
    ):
        assert (
            one(engine, request(0, seed=SEED, tokens=TOKENS)).choices[0].token_ids
            == IDS[: IDS.index(IDS[1]) + 1]
        )


def test_a_constraint_comes_after_the_settings_of_the_model():
    """As `generate` applies the processors that it is passed."""
    seen = []

    def adjust(ids, logits):
        seen.append((list(ids), bool(logits[IDS[0]].isneginf())))
        return logits.index_fill(0, torch.tensor([IDS[1]]), -torch.inf)

    with (
        model_with(bad_words_ids=[[IDS[0]]], no_repeat_ngram_size=3) as model,
        Engine(model, Letters(), CONFIGS["counts"]) as engine,
    ):
        choice = one(engine, request(0, seed=SEED, tokens=TOKENS, adjust=lambda: adjust)).choices[0]
    assert not {IDS[0], IDS[1]} & {*choice.token_ids}
    assert seen == [(list(choice.token_ids[:step]), True) for step in range(TOKENS)]
