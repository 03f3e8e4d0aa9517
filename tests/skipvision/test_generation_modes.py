"""Every way to generate gives the tokens of greedy decoding under the plan, or is refused, as documented."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, QuantizedCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from skipvision import InputError, SkipConfig, UnsupportedModelError, attach
from skipvision.testing.families import tiny_batch, tiny_model
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.family_table import LEFT_OUT

CONFIG = SkipConfig(retained=4, skipped=5)
NEW = 12
SAME = "same tokens"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from GPUs only")


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


def quantized(backend):
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend}}


STATIC = UnsupportedModelError, "layer 0 is a StaticLayer, .* static cache keeps its size.*DynamicCache"
QUANTISED = UnsupportedModelError, "layer 0 is a Fp8QuantizedLayer, .*entries have another form.*DynamicCache"
MOVED = ValueError, "requires `trust_remote_code=True`"

MODES = {
    "prompt_lookup_num_tokens": (SAME, lambda: {"prompt_lookup_num_tokens": 3}),
    "assistant_model": (SAME, lambda: {"assistant_model": tiny_llava(seed=1)}),
    "an assistant that Skip-Vision is attached to": (
        (InputError, "neither pixel_values nor encoded images"),  # `generate` hands it no images.
        lambda: {"assistant_model": attached_assistant()},
    ),
    "streamer": (SAME, lambda: {"streamer": Silent()}),
    "custom_generate": (SAME, lambda: {"custom_generate": GenerationMixin._sample}),
    '"dynamic"': (SAME, lambda: {"cache_implementation": "dynamic"}),
    "DynamicCache": (SAME, lambda: {"past_key_values": DynamicCache(config=text_config())}),
    "DynamicCache without a config": (SAME, lambda: {"past_key_values": DynamicCache()}),
    '"offloaded"': (SAME, lambda: {"cache_implementation": "offloaded"}),
    "DynamicCache(offloading=True)": (
        SAME,
        lambda: {"past_key_values": DynamicCache(config=text_config(), offloading=True)},
    ),
    '"static"': (STATIC, lambda: {"cache_implementation": "static"}),
    '"offloaded_static"': (STATIC, lambda: {"cache_implementation": "offloaded_static"}),
    "StaticCache": (
        STATIC,
        lambda: {"past_key_values": StaticCache(config=text_config(), max_cache_len=64)},
    ),
    "fp8": (QUANTISED, lambda: quantized("fp8")),
    "QuantizedCache": (QUANTISED, lambda: {"past_key_values": QuantizedCache("fp8", text_config())}),
    "quanto": ((UnsupportedModelError, ImportError), lambda: quantized("quanto")),
    "hqq": ((UnsupportedModelError, ImportError), lambda: quantized("hqq")),
    "prefill_chunk_size": ((InputError, "Leave out prefill_chunk_size"), lambda: {"prefill_chunk_size": 8}),
    "penalty_alpha": (MOVED, lambda: {"penalty_alpha": 0.6, "top_k": 4}),
    "dola_layers": (MOVED, lambda: {"dola_layers": "high"}),
    "num_beam_groups": (
        MOVED,
        lambda: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    ),
    "force_words_ids": (MOVED, lambda: {"num_beams": 2, "force_words_ids": [[7]]}),
}


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=GPU if "offload" in name and "static" not in name else ()) for name in MODES],
)
def test_a_mode_gives_the_same_tokens_or_is_refused(name):
    (expected, options), answer = MODES[name], greedy()
    with attach(model(), CONFIG):
        if expected == SAME:
            assert tokens(**options()) == answer
        else:
            error, message = expected if isinstance(expected[1], str) else (expected, None)
            decoder, calls = model().model.language_model, []
            handle = decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
            with pytest.raises(error, match=message):
                tokens(**options())
            handle.remove()
            assert not calls, "refused before the decoder runs"
        assert tokens() == answer, "and nothing is left of it"


def test_the_page_lists_these_modes():
    page = Path("docs/library.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in page.split("## Ways to generate")[1].split("\n## ")[0].splitlines()]
    rows = [row for row in rows if len(row) == 2]
    for name, (expected, _) in MODES.items():
        key = name.removesuffix(" without a config")
        (result,) = {result for modes, result in rows if f"{key}`" in modes or modes == f"| {key}"}
        names = [SAME] if expected == SAME else [e.__name__ for e in expected if isinstance(e, type)]
        assert all(word in result for word in names), name


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
            with pytest.raises(ValueError, match="not supported with stateful models"):
                tokens(batch, drafting, **lookup)
        else:
            assert tokens(batch, drafting, **lookup) == tokens(batch, drafting)
