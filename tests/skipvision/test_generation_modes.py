"""Every way to generate gives the tokens of greedy decoding under the plan, or is refused, as documented."""

import contextlib
import copy
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from skipvision import ConfigError, InputError, SkipConfig, UnsupportedModelError, attach
from skipvision.testing.families import tiny_batch, tiny_model
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava
from tests.skipvision.family_table import LEFT_OUT, VERSION, since_5_18

CONFIG = SkipConfig(retained=4, skipped=5)
NEW = 12
SAME = "same tokens"
FP8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8")
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}


class Silent(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


@functools.cache
def model():
    made = tiny_llava(seed=3)
    made.generation_config.eos_token_id = None
    return made


def text_config():
    return model().config.text_config


def attached_assistant():
    assistant = tiny_llava(seed=1)
    attach(assistant, SkipConfig(retained=3, skipped=2))
    return assistant


def gemma4_assistant():
    """One without layers: transformers 5.23 cannot build others."""
    text = {"model_type": "gemma4_text", "num_hidden_layers": 0, "layer_types": [], "vocab_size": 64}
    text |= {"hidden_size": 16, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    config = AutoConfig.for_model("gemma4_assistant", text_config=text, backbone_hidden_size=16)
    return AutoModelForCausalLM.from_config(config)


def tokenizer(words):
    """A tokenizer whose ids are the indices of words."""
    own = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own)


def other_tokenizer():
    """An assistant that knows the words by other ids, and one more word."""
    words = [f"w{number}" for number in range(text_config().vocab_size)]
    others = [*reversed(words), "more"]
    assistant = tiny_llava(seed=1, vocab_size=len(others))
    return {
        "assistant_model": AutoModelForCausalLM.from_config(assistant.config.text_config),
        "tokenizer": tokenizer(words),
        "assistant_tokenizer": tokenizer(others),
    }


def cache(name, **options):
    return lambda: {"cache_implementation": name, **options}


STATIC = (
    UnsupportedModelError,
    r"=\W\w+\W makes a KV cache that cannot be pruned \(a static cache keeps its size\)",
)
QUANTISED = (
    UnsupportedModelError,
    r"=\W\w+\W makes a KV cache .* \(its entries have another form\).*'dynamic'",
)
OFFLOADED = (
    UnsupportedModelError,
    "cannot be pruned .transformers copies its entries between CPU and GPU",
)
MOVED = ValueError, "requires `trust_remote_code=True`"

MODES = {
    "prompt_lookup_num_tokens": (SAME, lambda: {"prompt_lookup_num_tokens": 3}),
    "assistant_model": (SAME, lambda: {"assistant_model": tiny_llava(seed=1)}),
    "assistant_tokenizer": (SAME, other_tokenizer),
    "an assistant that Skip-Vision is attached to": (
        (InputError, r"attached to the assistant_model, but generate passes it no images: detach\(\)"),
        lambda: {"assistant_model": attached_assistant()},
    ),
    "an assistant of gemma4": (
        (ConfigError, "Gemma4AssistantForCausalLM drafts from the keys and values .* use prompt_lookup"),
        lambda: {"assistant_model": gemma4_assistant()},
    ),
    "assistant_early_exit": (
        (ConfigError, "assistant_early_exit=1 .* read the prompt again without its images"),
        lambda: {"assistant_early_exit": 1},
    ),
    "streamer": (SAME, lambda: {"streamer": Silent()}),
    "custom_generate": (SAME, lambda: {"custom_generate": GenerationMixin._sample}),
    '"dynamic"': (SAME, cache("dynamic")),
    "DynamicCache": (SAME, lambda: {"past_key_values": DynamicCache(config=text_config())}),
    "DynamicCache (without a config)": (SAME, lambda: {"past_key_values": DynamicCache()}),
    '"hybrid"': (SAME, cache("hybrid")),
    '"offloaded"': (OFFLOADED, cache("offloaded")),
    "DynamicCache(offloading=True)": (
        OFFLOADED,
        lambda: {"past_key_values": DynamicCache(config=text_config(), offloading=True)},
    ),
    **{
        f'"{name}"': (STATIC, cache(name))
        for name in ("static", "offloaded_static", "sliding_window", "hybrid_chunked")
    },
    **{f'"offloaded_{name}"': (STATIC, cache(f"offloaded_{name}")) for name in ("hybrid", "hybrid_chunked")},
    "StaticCache": (
        (UnsupportedModelError, "layer 0 is a StaticLayer, .* static cache keeps its size.*DynamicCache"),
        lambda: {"past_key_values": StaticCache(config=text_config(), max_cache_len=64)},
    ),
    **{
        f'"quantized" ({backend})': (QUANTISED, cache("quantized", cache_config={"backend": backend}))
        for backend in ("fp8", "quanto", "hqq")
    },
    "QuantizedCache": (
        (UnsupportedModelError, "layer 0 is a Fp8QuantizedLayer, .* have another form.*DynamicCache"),
        lambda: {"past_key_values": QuantizedCache("fp8", text_config())},
    ),
    "EncoderDecoderCache": (
        (
            UnsupportedModelError,
            "the KV cache is a EncoderDecoderCache, which cannot be pruned .*DynamicCache",
        ),
        lambda: {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())},
    ),
    '"paged"': ((ConfigError, "continuous batching, which reads no images"), cache("paged")),
    "prefill_chunk_size": ((InputError, "Leave out prefill_chunk_size"), lambda: {"prefill_chunk_size": 8}),
    "token_healing": ((ConfigError, "without its images"), lambda: {"token_healing": True}),
    "penalty_alpha": (MOVED, lambda: {"penalty_alpha": 0.6, "top_k": 4}),
    "dola_layers": (MOVED, lambda: {"dola_layers": "high"}),
    "num_beam_groups": (
        MOVED,
        lambda: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    ),
    "force_words_ids": (MOVED, lambda: {"num_beams": 2, "force_words_ids": [[7]]}),
    "constraints": (MOVED, lambda: {"num_beams": 2, "constraints": [object()]}),
}
BUILT = ("an assistant of gemma4", "QuantizedCache")
"""Modes whose arguments not every version can build."""
MARKS = {"assistant_tokenizer": since_5_18, "QuantizedCache": FP8}
"""Older versions hand images to an assistant that cannot take them, or have no such cache."""
ELSEWHERE = {"use_mtp": SAME, 'speculation_type="dflash"': SAME}
"""Modes that some families have, which tests below show."""

NO_MODES = {
    "arguments of the modes above": """assistant_confidence_threshold assistant_ensemble_weight
        assistant_lookbehind cache_config continuous_batching_config is_assistant max_cache_len
        max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
        diversity_penalty tokenizer""",
    "beams and draws": """do_sample early_stopping epsilon_cutoff eta_cutoff length_penalty low_memory min_p
        num_beams num_return_sequences temperature top_h top_k top_p typical_p""",
    "logits": """bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size encoder_repetition_penalty
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale
        logits_processor min_length min_new_tokens negative_prompt_attention_mask negative_prompt_ids
        no_repeat_ngram_size prefix_allowed_tokens_fn remove_invalid_values renormalize_logits
        repetition_penalty sequence_bias suppress_tokens watermarking_config""",
    "where answers end": "eos_token_id max_length max_new_tokens max_time stop_strings stopping_criteria",
    "what is returned": """output_attentions output_hidden_states output_logits output_scores
        return_dict_in_generate""",
    "others": """bos_token_id compile_config decoder_start_token_id disable_compile generation_config inputs
        kwargs pad_token_id self synced_gpus transformers_version use_cache""",
}
"""What else `generate` takes: it changes neither the cache nor which calls the model gets; use_cache=False
is tested below."""


def prompt():
    """A prompt whose last words occurred before, so that the first call has drafts already."""
    inputs = tiny_inputs([[3, "image", 4]], seed=1)
    words = inputs["input_ids"][:, -4:]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words, words], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def tokens(batch=None, using=None, **options):
    generated = (using or model()).generate(
        **(batch or prompt()), max_new_tokens=NEW, do_sample=False, **options
    )
    return generated.tolist()


@functools.cache
def greedy(skip_kv=True):
    with attach(model(), CONFIG.model_copy(update={"skip_kv": skip_kv})):
        return tokens()


@contextlib.contextmanager
def no_work():
    """Fail if a layer of the decoder or the vision tower runs in the block."""
    calls = []
    parts = model().model.language_model.layers[0], model().model.vision_tower
    handles = [part.register_forward_hook(lambda part, *_: calls.append(type(part))) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not calls


@pytest.mark.filterwarnings("ignore")  # of transformers, about deprecated names
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, ())) for name in MODES],
)
def test_a_mode_gives_the_same_tokens_or_is_refused(name):
    (expected, options), answer = MODES[name], greedy()
    if expected == SAME:
        with attach(model(), CONFIG):
            assert tokens(**options()) == answer
            assert tokens() == answer, "and nothing is left of it"
        return
    error, message = expected
    # These two would run the tower and layers to select.
    for select in ("similarity", "attention", "ffn_ratio"):
        with attach(model(), CONFIG.model_copy(update={"select": select})):
            with no_work(), pytest.raises(error, match=message):
                tokens(**options())
            if select == CONFIG.select:
                assert tokens() == answer, "and nothing is left of it"


@torch.no_grad()
@pytest.mark.parametrize("select", ["similarity", "attention"])
def test_a_call_with_another_cache_is_refused_before_its_images_are_encoded(select):
    caches = [
        StaticCache(config=text_config(), max_cache_len=64),
        StaticCache(config=text_config(), max_cache_len=64, offloading=True),
        DynamicCache(config=text_config(), offloading=True),
        DynamicCache(offloading=True),
    ]
    if not FP8.args[0]:
        caches.append(QuantizedCache("fp8", text_config()))
    config = CONFIG.model_copy(update={"select": select})
    everything = SkipConfig(retained=16, skipped=0, select=select, summary_tokens=0)
    for each in caches:
        for applied in (config, everything):
            with attach(model(), applied), no_work(), pytest.raises(UnsupportedModelError, match="be pruned"):
                model()(**prompt(), past_key_values=each, use_cache=True)


def test_with_full_tokens_a_static_cache_is_no_problem():
    with attach(model(), SkipConfig.full()):
        assert tokens(cache_implementation="static") == tokens()


def test_a_mode_of_the_models_own_settings_is_refused():
    with attach(model(), CONFIG), no_work():
        model().generation_config.cache_implementation = "static"
        try:
            with pytest.raises(UnsupportedModelError, match="also in the model's generation_config"):
                tokens()
        finally:
            model().generation_config.cache_implementation = None


def test_prompts_without_images_are_generated_as_the_model_does():
    batch = tiny_inputs([[9]], seed=1)
    expected = tokens(batch)
    with attach(model(), CONFIG):
        for options in ({"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
            assert tokens(batch, **options) == expected


def test_the_page_lists_these_modes_and_no_others():
    page = Path("docs/library.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in page.split("## Ways to generate")[1].split("\n## ")[0].splitlines()]
    results = {}
    for modes, result in (row for row in rows if len(row) == 2 and not row[1].startswith(("result", "---"))):
        labels = re.findall(r"`([^`]+)`", modes) or [modes.removeprefix("| ")]
        results |= dict.fromkeys(labels, result)
    tested = {name.partition(" (")[0]: expected for name, (expected, _) in MODES.items()} | ELSEWHERE
    assert results.keys() == tested.keys()
    for name, expected in tested.items():
        assert (SAME if expected == SAME else expected[0].__name__) in results[name], name


def test_everything_that_generate_takes_is_a_mode_or_none():
    options = {option for name, (_, made) in MODES.items() if name not in BUILT for option in made()}
    options |= {"assistant_model", "past_key_values", *(name.partition("=")[0] for name in ELSEWHERE)}
    others = {name for names in NO_MODES.values() for name in names.split()}
    assert not options & others - {"num_beams", "top_k", "diversity_penalty", "cache_config", "tokenizer"}
    taken = FIELDS | inspect.signature(GenerationMixin.generate).parameters.keys()
    assert not taken - options - others, "does a plan fit it? test it in this file and add it to the page"
    assert {f'"{name}"' for name in (*ALL_CACHE_IMPLEMENTATIONS, "paged")} <= {
        name.partition(" (")[0] for name in MODES
    }


# ---------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize("greedy_placeholder", [False, True], ids=["wrong drafts", "right drafts"])
def test_drafts_that_repeat_image_placeholders(greedy_placeholder):
    """The word before an image ends the prompt, too, so prompt lookup drafts placeholders."""
    inputs = tiny_inputs([[3, "image", 4]], seed=1)
    first = inputs["input_ids"].tolist()[0].index(IMAGE_TOKEN)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, first - 1 : first]], dim=1)
    batch = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "suppress_tokens": None}
    own = tiny_llava(seed=3)
    own.generation_config.eos_token_id = own.generation_config.suppress_tokens = None
    if greedy_placeholder:
        lookup["sequence_bias"] = {(int(ids[0, -1]), IMAGE_TOKEN): 9.0}
    seen = []
    handle = own.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with attach(own, CONFIG):
        with_drafts = tokens(batch, own, **lookup)
        handle.remove()
        del lookup["prompt_lookup_num_tokens"]
        assert with_drafts == tokens(batch, own, **lookup)
    assert seen[0][0, -1] == IMAGE_TOKEN, "drafted in the first call"
    generated = with_drafts[0][ids.shape[1] :]
    assert (generated[0] == IMAGE_TOKEN) is greedy_placeholder
    assert len({*generated}) > 1


def test_without_a_cache_nothing_is_forgotten():
    expected = greedy(skip_kv=False)
    with attach(model(), CONFIG):
        assert tokens(use_cache=False) == expected


STATEFUL = ("qwen3_5", "minicpmv4_6", "nemotron_h_omni", "glm5_next", "qwen4_exp")
DRAFTING = ("lfm2_vl", "unlimited_ocr", "minimax_m3_vl", "dots3_note")


@pytest.mark.parametrize("family", [name for name in (*STATEFUL, *DRAFTING) if name not in LEFT_OUT])
def test_drafts_in_families_with_other_caches(family):
    drafting = tiny_model(family)
    drafting.generation_config = copy.deepcopy(drafting.generation_config)
    drafting.generation_config.eos_token_id = None
    batch = tiny_batch(drafting, [[3, "image", 8]])
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    with attach(drafting, SkipConfig(retained=0.3, skipped=0.3)):
        if family in STATEFUL:
            with pytest.raises(ConfigError, match="has recurrent states, which cannot be restored"):
                tokens(batch, drafting, **lookup)
        else:
            assert tokens(batch, drafting, **lookup) == tokens(batch, drafting)


DRAFTERS = {
    "muse_glimmer": "muse_glimmer_assistant" in CONFIG_MAPPING,
    "step3p7": Version("5.23") <= VERSION,  # older ones cannot draft for it
}
"""Families with drafters of their own, and whether the installed transformers has them."""


def dflash(drafting):
    text = drafting.config.text_config
    shared = "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim sliding_window"
    config = AutoConfig.for_model(
        "muse_glimmer_assistant",
        **{name: getattr(text, name) for name in shared.split()},
        num_hidden_layers=2,
        block_size=4,
        mask_token_id=7,
        target_layer_ids=[0, 2],
        pad_token_id=0,
    )
    return {"assistant_model": AutoModel.from_config(config).eval(), "speculation_type": "dflash"}


def mtp(drafting, monkeypatch):
    from transformers.modeling_layers import MtpModel

    for name, value in MTP.items():
        setattr(drafting.config.text_config, name, value)
    drafter = MtpModel(drafting, MTP["num_nextn_predict_layers"]).eval()
    # Its weights come from the model's checkpoint.
    monkeypatch.setattr(MtpModel, "from_pretrained", lambda *_, **__: drafter)
    return {"use_mtp": True}


MTP = {
    "num_nextn_predict_layers": 2,
    "mtp_layer_types": ["full_attention"] * 2,
    "mtp_mlp_layer_types": ["dense"] * 2,
}


@pytest.mark.parametrize("family", [name for name, exists in DRAFTERS.items() if exists])
def test_drafters_that_read_hidden_states(family, monkeypatch):
    drafting = tiny_model(family)
    drafting.generation_config = copy.deepcopy(drafting.generation_config)
    drafting.generation_config.eos_token_id = None
    batch = tiny_batch(drafting, [[3, "image", 8]])
    torch.manual_seed(0)
    options = dflash(drafting) if family == "muse_glimmer" else mtp(drafting, monkeypatch)
    with attach(drafting, SkipConfig(retained=0.3, skipped=0.3)):
        expected, calls = tokens(batch, drafting), []
        handle = drafting.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assert tokens(batch, drafting, **options) == expected
        handle.remove()
    assert max(calls[1:]) > 1, "drafts are checked"
