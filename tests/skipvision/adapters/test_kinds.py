"""Every kind of LoRA is trained with Skip-Vision attached, saved, loaded and trained further."""

import pytest
import torch
from peft import get_peft_model

from skipvision import DECODED_KEYWORD, attach, load_adapter, save_adapter
from skipvision.testing.llava import tiny_inputs
from tests.skipvision.cases import close, labels_for
from tests.skipvision.engine.test_adapter_kinds import ALONE, SHARED, SKIP
from tests.skipvision.engine.test_adapters import base_model

KINDS = {**SHARED, **ALONE}
F64 = torch.float64


def learn(model):
    """One step of plain SGD."""
    inputs = tiny_inputs([["image", 6], [7, 2]], padding="right", dtype=F64)
    inputs["input_ids"][1, :3] = torch.tensor([7, 8, 9])  # those of trainable_token_indices
    labels = labels_for(inputs)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decoded = {DECODED_KEYWORD: (labels != -100).cumsum(dim=1) > 0}
    model.train()(**inputs, **decoded, labels=labels, use_cache=False).loss.backward()
    torch.optim.SGD(weights, lr=0.1).step()
    model.zero_grad()
    model.eval()


def trained(model):
    return {
        name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


@torch.no_grad()
def results(model):
    inputs = tiny_inputs([[3, "image", 4], [5]], dtype=F64)
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about these kinds
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_trained_saved_loaded_and_trained_further(name, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(base_model(), KINDS[name])
    attach(model, SKIP)
    before = trained(model)
    learn(model)
    learn(model)
    assert any("skip_summary" in weight for weight in before)
    assert not [weight for weight, value in trained(model).items() if torch.equal(value, before[weight])]
    save_adapter(model, tmp_path / "adapter")
    logits, answers = results(model)
    loaded = load_adapter(base_model(), tmp_path / "adapter")
    assert not trained(loaded)
    found, tokens = results(loaded)
    assert torch.equal(found, logits)
    assert torch.equal(tokens, answers)
    further = load_adapter(base_model(), tmp_path / "adapter", is_trainable=True)
    assert trained(further).keys() == before.keys()
    for each in (model, further):
        learn(each)
    close(results(further)[0], results(model)[0])
    assert not torch.equal(results(further)[0], logits)
