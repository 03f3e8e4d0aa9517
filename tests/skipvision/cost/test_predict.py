"""Predicted costs match counted FLOPs, cache bytes, and the published ratios."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    T5Config,
)

from skipvision import SkipConfig, UnsupportedModelError, as_teacher, attach, measure_flops, predict_cost
from skipvision.kv_cache import cache_bytes
from skipvision.testing.llava import tiny_inputs, tiny_llava

CONFIGS = {
    "full": SkipConfig.full(),
    "default-shaped": SkipConfig(retained=12, skipped=16),
    "fractions": SkipConfig(retained=0.25, skipped=0.5, summary_tokens=2),
    "no-summary": SkipConfig(retained=12, skipped=16, summary_tokens=0),
    "diversity": SkipConfig(retained=16, skipped=20, select="diversity"),
    "ffn-ratio": SkipConfig(retained=16, skipped=20, select="ffn_ratio"),
    "ffn-ratio-later": SkipConfig(retained=16, skipped=20, select="ffn_ratio", probe_layer=2),
    "attention": SkipConfig(retained=16, skipped=0, merge="drop", select="attention"),
    "attention-later": SkipConfig(retained=16, skipped=20, select="attention", probe_layer=2),
    "vision-attention": SkipConfig(retained=16, skipped=20, select="vision_attention"),
    "relevance": SkipConfig(retained=16, skipped=20, select="relevance"),
    "tome": SkipConfig(retained=0, skipped=11, merge="tome", skip_ffn=False, skip_kv=False),
    "tome-of-the-rest": SkipConfig(retained=20, skipped=16, merge="tome"),
    "grid": SkipConfig(retained=0, skipped=20, merge="grid", skip_ffn=False, skip_kv=False),
    "pool": SkipConfig(retained=16, skipped=20, merge="pool"),
    "retained-only": SkipConfig(retained=20, skipped=0),
    "sized": SkipConfig(retained=20, skipped=8, size_bias=True),
    "ffn-for-all": SkipConfig(retained=12, skipped=32, skip_ffn=False),
    "some-layers": SkipConfig(retained=12, skipped=32, skip_layers=[1]),
    "drop-after": SkipConfig(retained=12, skipped=32, summary_tokens=2, skip_layers=[1], drop_after=1),
    "drop-everything": SkipConfig(retained=1.0, skipped=0, summary_tokens=0, drop_after=0),
    "cache-for-all": SkipConfig(retained=12, skipped=32, skip_kv=False),
    "more-than-there-are": SkipConfig(retained=50, skipped=50),
}
SIDE, PROMPT, ANSWER = 8, 20, 12
SHAPES = {
    "sdpa": {"attention": "sdpa"},
    "eager": {"attention": "eager"},
    "all-heads": {"text": "qwen2", "num_key_value_heads": 4},
}


def build(**options):
    return tiny_llava(side=SIDE, hidden_size=64, intermediate_size=224, vocab_size=128, **options)


def one_row(images, words):
    return tiny_inputs([["image"] * images + [words]], side=SIDE)


def with_shapes(first, other):
    """Return two values with every shape; all but one shape are quick with the first only."""
    pairs = [(shape, value) for shape in SHAPES for value in (first, other)]
    slow = [shape != "sdpa" and value == other for shape, value in pairs]
    return [
        pytest.param(*pair, marks=[pytest.mark.slow] * late) for pair, late in zip(pairs, slow, strict=True)
    ]


@pytest.mark.parametrize(("shape", "images"), with_shapes(1, 2))
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill(name, shape, images):
    model, config = build(**SHAPES[shape]), CONFIGS[name]
    predicted = predict_cost(model.config, config, images=images, text_tokens=PROMPT)
    inputs, seen = one_row(images, PROMPT), []
    with torch.no_grad(), attach(model, config) as skip:
        flops = measure_flops(lambda: seen.append(model(**inputs, use_cache=True, logits_to_keep=1)))
    assert predicted.prefill_flops == pytest.approx(flops, rel=0.02)
    assert predicted.kv_bytes == cache_bytes(seen[0].past_key_values)
    assert predicted.sequence == skip.plan.roles.shape[1]


@pytest.mark.parametrize(("shape", "rank"), with_shapes(4, 0))
@pytest.mark.parametrize("name", CONFIGS)
def test_training_step(name, shape, rank):
    model, config = build(**SHAPES[shape]), CONFIGS[name]
    predicted = predict_cost(model.config, config, text_tokens=PROMPT, new_tokens=ANSWER, lora_rank=rank)
    # Only the decoder trains: by LoRA on each of its linear layers, or as a whole.
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    llava = model
    if rank:
        every_linear = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=every_linear))
    model.train()
    inputs = one_row(1, PROMPT + ANSWER)

    def step():
        """The LM head at the answer's positions only."""
        hidden = llava.model(**inputs, use_cache=False).last_hidden_state[:, -ANSWER:]
        llava.lm_head(hidden).logsumexp(dim=-1).sum().backward()

    with attach(model, config):
        flops = measure_flops(step)
    assert predicted.train_flops == pytest.approx(flops, rel=0.02)


def without_training(cost):
    return replace(cost, train_flops=0, activation_bytes=0)


@torch.no_grad()
def test_without_a_training_step():
    """It is measured with gradients, whatever the caller has set."""
    config = tiny_llava(vocab_size=96).config
    whole, part = (predict_cost(config, CONFIGS["default-shaped"], training=each) for each in (True, False))
    assert whole.train_flops > whole.prefill_flops
    assert part == without_training(replace(whole, full=without_training(whole.full)))


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher(shape):
    model = build(**SHAPES[shape])
    predicted = predict_cost(model.config, CONFIGS["default-shaped"], text_tokens=PROMPT, new_tokens=ANSWER)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*_proj")).train()
    learnt = torch.zeros(1, SIDE**2 + PROMPT + ANSWER, dtype=torch.bool)
    learnt[:, -ANSWER:] = True
    with attach(model, CONFIGS["default-shaped"]), as_teacher(model):
        inputs = one_row(1, PROMPT + ANSWER)
        flops = measure_flops(lambda: model(**inputs, use_cache=False, logits_to_keep=learnt))
    assert predicted.teacher_flops == predicted.full.teacher_flops == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("name", ["full", "default-shaped", "cache-for-all", "drop-after"])
def test_decoding(name):
    model, config = build(), CONFIGS[name]
    predicted = predict_cost(model.config, config, text_tokens=PROMPT, new_tokens=6)
    with torch.no_grad(), attach(model, config):
        cache = model(**one_row(1, PROMPT), use_cache=True).past_key_values

        def decode():
            for _ in range(5):
                model(input_ids=torch.tensor([[7]]), past_key_values=cache)

        assert predicted.decode_flops == pytest.approx(measure_flops(decode), rel=0.02)


def test_parts_of_the_prefill():
    model = build()
    inputs = one_row(1, PROMPT)
    vision = measure_flops(lambda: model.model.get_image_features(inputs["pixel_values"]))
    cost = predict_cost(model.config, SkipConfig(retained=12, skipped=16, select="ffn_ratio"))
    assert cost.vision_flops == pytest.approx(vision, rel=0.001)
    probe = measure_flops(lambda: probe_only(model))
    assert cost.planning_flops == pytest.approx(probe, rel=0.05)
    assert predict_cost(model.config, None).planning_flops == 0


def probe_only(model):
    """Run a layer, and once more without its FFN."""
    embeds = torch.zeros(1, SIDE**2 + 64, 64)
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    decoder.layers[0](embeds, position_embeddings=rotary)
    decoder.layers[0].self_attn(embeds, position_embeddings=rotary, attention_mask=None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_and_cache_in_bytes(dtype):
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cost = predict_cost(model.config, None, text_tokens=PROMPT, dtype=dtype)
    size = 2 if dtype else 4
    assert cost.weight_bytes == parameters * size
    assert cost.kv_bytes == (SIDE**2 + PROMPT) * 2 * 3 * 2 * 16 * size


def test_ratios_compare_field_by_field():
    model = build()
    cost = predict_cost(model.config, CONFIGS["default-shaped"], text_tokens=PROMPT)
    full = predict_cost(model.config, None, text_tokens=PROMPT)
    assert cost.full == full
    assert full == replace(predict_cost(model.config, SkipConfig.full(), text_tokens=PROMPT), full=None)
    for name in ("prefill_flops", "decode_flops", "train_flops", "kv_bytes"):
        ratio = getattr(cost.ratio_to_full, name)
        assert ratio == getattr(cost, name) / getattr(full, name)
        assert 0 < ratio < 1
        assert getattr(full.ratio_to_full, name) == 1.0
        assert isinstance(getattr(cost, name), int)


def test_other_numbers_of_visual_tokens():
    model = build()
    config = SkipConfig(retained=12, skipped=16)
    standard = predict_cost(model.config, config)
    assert predict_cost(model.config, config, visual_tokens=SIDE**2) == standard
    more = predict_cost(model.config, config, visual_tokens=1000)
    assert more.sequence == standard.sequence
    assert more.full.sequence == 1064


def test_no_such_family():
    with pytest.raises(UnsupportedModelError, match="BertConfig"):
        predict_cost(BertConfig(), SkipConfig())


def llava_with_llama_3_8b():
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576)


@pytest.mark.slow  # measures a decoder of 32 layers
@pytest.mark.parametrize(
    ("retained", "skipped", "tokens", "published"),
    [(100, 156, 576, 25), (256, 320, 576, 60), (272, 256, 1296, 25)],
)
def test_published_prefill_ratios(retained, skipped, tokens, published):
    """Skip-Vision's table of FLOPs, with Llama-3-8B and 16 tokens of text.

    Its LLaVA-HD row (2,880 tokens, 576 + 576) says 50 %. With these N, N_r and N_s nothing comes near
    that: about 24 % here, so its baseline must be something else than 2,880 tokens, and it is left out.
    """
    cost = predict_cost(
        llava_with_llama_3_8b(),
        SkipConfig(retained=retained, skipped=skipped),
        text_tokens=16,
        visual_tokens=tokens,
    )
    assert 100 * cost.ratio_to_full.prefill_flops == pytest.approx(published, abs=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(), "LlamaConfig takes no images"),
        (Gemma3TextConfig(), "Gemma3TextConfig takes no images"),
        (BertConfig(), "BertConfig takes no images"),
        (T5Config(), "T5Config takes no images"),
        (CLIPConfig(), "CLIPConfig is not the config of an image-text-to-text model"),
        (CLIPVisionConfig(), "CLIPVisionConfig is not the config of an image-text-to-text model"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_configs_of_other_models_are_refused_in_a_few_words(config, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        predict_cost(config, None)
    assert len(str(caught.value)) < 200
