"""What a forward keeps for its backward: counted on a model that trains, and predicted from its config."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pipelines.finetune.learner import leave_casts_to_autocast
from skipvision import SkipConfig, attach, predict_cost
from skipvision.cost.kept import KeptTensors
from skipvision.cost.predict import predict_activations
from skipvision.testing.llava import tiny_inputs, tiny_llava

SIDE, PROMPT, ANSWER, RANK = 16, 20, 12, 4
CONFIGS = {
    "full": None,
    "no-summary": SkipConfig(retained=0.2, skipped=0.3, summary_tokens=0),
    "summary": SkipConfig(retained=0.2, skipped=0.3),
    "ffn-for-all": SkipConfig(retained=0.2, skipped=0.3, skip_ffn=False),
    "some-layers": SkipConfig(retained=0.2, skipped=0.3, skip_layers=[1]),
    "drop-after": SkipConfig(retained=0.2, skipped=0.3, drop_after=1),
}


def test_tensors_are_counted_once_and_without_the_model():
    model = nn.Linear(8, 4)
    inputs = torch.randn(5, 8, requires_grad=True)
    with KeptTensors(model) as kept:
        outputs = model(inputs).exp() + model(inputs.view(5, 8)).exp()
    assert kept.bytes == 4 * (5 * 8 + 2 * 5 * 4)  # the inputs, which both calls share, and two exponentials
    outputs.sum().backward()
    assert inputs.grad is not None


def test_nothing_is_kept_without_gradients():
    model = nn.Linear(8, 4)
    with torch.no_grad(), KeptTensors(model) as kept:
        model(torch.randn(5, 8)).exp()
    assert kept.bytes == 0


def counted(model, config, images, dtype):
    """Bytes that a LoRA step with the loss at the answer keeps, in the precision that training uses."""
    model.requires_grad_(False)
    lora = LoraConfig(r=RANK, target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
    tuned = get_peft_model(model, lora).train()
    if dtype == torch.bfloat16:
        leave_casts_to_autocast(tuned)
    inputs = tiny_inputs([["image"] * images + [PROMPT + ANSWER]], side=SIDE, dtype=dtype)
    answer = slice(-ANSWER - 1, -1)

    def loss():
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, answer]
        return nn.functional.cross_entropy(model.lm_head(hidden)[0].float(), torch.zeros(ANSWER).long())

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    if config is None:
        with autocast, KeptTensors(tuned) as kept:
            loss()
        return kept.bytes
    with attach(model, config), autocast, KeptTensors(tuned) as kept:
        loss()
    return kept.bytes


def build(dtype):
    return tiny_llava(side=SIDE, hidden_size=64, intermediate_size=224, vocab_size=128, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_prediction(name, dtype):
    model, config = build(dtype), CONFIGS[name]
    given = {"text_tokens": PROMPT, "new_tokens": ANSWER, "lora_rank": RANK, "dtype": dtype}
    predicted = predict_cost(model.config, config, images=2, **given).activation_bytes
    assert predict_activations(model.config, config, visual_tokens=[SIDE**2] * 2, **given) == predicted
    assert predicted == pytest.approx(counted(model, config, 2, dtype), rel=0.15)


def test_skipping_needs_less():
    config = build(torch.float32).config
    full, skipping, all_ffn = (
        predict_cost(config, CONFIGS[name]).activation_bytes for name in ("full", "no-summary", "ffn-for-all")
    )
    assert skipping < all_ffn < full
