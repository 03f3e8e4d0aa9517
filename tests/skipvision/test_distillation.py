"""The teacher is the untouched model; the divergence and its gradients are those of a loop over positions."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import skipvision as sv
from skipvision.testing.families import tiny_batch, tiny_model
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, checkpoint_activations, close, labels_for, train_summary

F64 = torch.float64
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@pytest.fixture
def inputs():
    return tiny_inputs(ROWS, padding="right", dtype=F64)


def student_of(config, *, dtype=F64, trained=True, dropout=0.0):
    """A tiny LLaVA with LoRA and Skip-Vision, in training mode; ``trained`` gives both some weights."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=not trained, lora_dropout=dropout)
    model = get_peft_model(tiny_llava(dtype=dtype, attention_dropout=dropout), lora).train()
    if config is not None:
        skip = sv.attach(model, config)
        if trained:
            train_summary(skip.summary)
    return model


def learnt(inputs):
    """(B, T) positions that predict one of the last two words of each row."""
    words = labels_for(inputs) != -100
    last = words & (words.flip(1).cumsum(dim=1).flip(1) <= 2)
    return torch.cat([last[:, 1:], torch.zeros_like(last[:, :1])], dim=1)


def soft_targets(model, inputs, **options):
    with sv.as_teacher(model):
        logits = model(**inputs, use_cache=False).logits[learnt(inputs)]
    return sv.SoftTargets.of(logits, **options)


def loss_of(model, inputs, **options):
    targets = soft_targets(model, inputs, **options)
    logits = model(**inputs, use_cache=False).logits[learnt(inputs)]
    return targets.divergence(logits).sum()


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return taken


def divergence_by_hand(teacher, student, temperature, top_k):
    """Compare two lists of logits token by token, and the tokens after the first ``top_k`` as one."""
    p = torch.softmax(teacher / temperature, dim=-1)
    q = torch.softmax(student / temperature, dim=-1)
    order = p.argsort(descending=True).tolist()
    kept = order if top_k is None else order[:top_k]
    total = sum(p[token] * (p[token].log() - q[token].log()) for token in kept)
    if len(kept) < len(order):
        rest_p, rest_q = (sum(each[token] for token in order[len(kept) :]) for each in (p, q))
        total = total + rest_p * (rest_p.log() - rest_q.log())
    return total * temperature**2


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.0, 5), (0.5, 1)])
@pytest.mark.parametrize("name", ["counts", "drop", "grouped-contiguous"])
def test_loss_and_gradients_are_those_of_the_reference(inputs, name, temperature, top_k):
    """Teacher and student are aligned although the student's sequence is shorter, row by row differently."""
    model = student_of(CONFIGS[name])
    loss = loss_of(model, inputs, temperature=temperature, top_k=top_k)
    loss.backward()
    got = gradients(model)
    teacher = tiny_llava(dtype=F64)(**inputs).logits
    summary = sv.attachment_of(model).summary
    sv.attachment_of(model).detach()
    student = naive.logits(model.get_base_model(), inputs, CONFIGS[name], summary)
    expected = sum(
        divergence_by_hand(teacher[row, position].detach(), student[row, position], temperature, top_k)
        for row, position in learnt(inputs).nonzero().tolist()
    )
    close(loss, expected)
    assert loss > 0.01
    expected.backward()
    for parameter, gradient in gradients(model).items():
        close(got[parameter], gradient)
        assert gradient.abs().max() > 1e-9, parameter


@pytest.mark.parametrize("config", [None, sv.SkipConfig.full()], ids=["detached", "full"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(inputs, config, top_k):
    model = student_of(config, trained=False)
    loss = loss_of(model, inputs, top_k=top_k)
    loss.backward()
    assert loss == 0
    assert max(float(gradient.abs().max()) for gradient in gradients(model).values()) < 1e-12


@pytest.mark.parametrize("name", ["counts", "no-summary", "ffn-ratio", "vision-attention"])
def test_the_teacher_is_the_untouched_model(inputs, name):
    """Bit for bit, also if adapter and summary are trained and the student has dropout."""
    model = student_of(CONFIGS[name], dropout=0.5)
    skip = sv.attachment_of(model)
    model(**inputs)
    model.get_base_model().model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    frozen = next(name for name, p in model.named_parameters() if p.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)
    trainable = [p.requires_grad for p in model.parameters()]
    plan, random = skip.plan, torch.get_rng_state()
    with sv.as_teacher(model):
        out = model(**inputs, use_cache=False)
    assert torch.equal(out.logits, tiny_llava(dtype=F64)(**inputs).logits)
    assert not out.logits.requires_grad
    assert torch.equal(torch.get_rng_state(), random)

    def unchanged():
        assert (skip.plan, skip.config) == (plan, CONFIGS[name])
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == trainable
        assert torch.is_grad_enabled()

    unchanged()
    with pytest.raises(RuntimeError), sv.as_teacher(model):
        raise RuntimeError
    unchanged()
    assert not torch.equal(model(**inputs).logits, out.logits)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava_next"])
def test_teachers_of_other_families(family):
    model = tiny_model(family)
    batch = tiny_batch(model, [[3, "image", 4], [5], ["image", 2]])
    expected = model(**batch, use_cache=False).logits.detach()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).train()
    with sv.attach(model, sv.SkipConfig(retained=0.25, skipped=0.25)), sv.as_teacher(model):
        assert torch.equal(model(**batch, use_cache=False).logits, expected)


def test_the_summary_layer_alone_can_learn(inputs):
    model = tiny_llava(dtype=F64).requires_grad_(False)
    with sv.attach(model, CONFIGS["counts"]) as skip:
        loss_of(model, inputs).backward()
        assert skip.summary.score.weight.grad.abs().max() > 0


def test_checkpointing_changes_no_gradient(inputs):
    found = []
    for checkpointing in (False, True):
        model = student_of(CONFIGS["counts"])
        if checkpointing:
            checkpoint_activations(model.get_base_model(), use_reentrant=False)
        loss_of(model, inputs).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


def test_autocast_gives_the_student_no_weights_of_the_teacher():
    """It caches its copies of weights that train; a copy without gradients would cut the student's off."""
    inputs = tiny_inputs(ROWS, padding="right")
    found = []
    for teach in (False, True):
        model = student_of(CONFIGS["counts"], dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            if teach:
                targets = soft_targets(model, inputs)
            logits = model(**inputs, use_cache=False).logits[learnt(inputs)]
            if teach:
                assert targets.divergence(logits).dtype == torch.float32
            logits.float().logsumexp(dim=-1).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_keeping_fewer_tokens_never_adds_to_the_divergence():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(2, 20, 50, dtype=F64)
    kept = [sv.SoftTargets.of(teacher, top_k=k).divergence(student) for k in (1, 5, 20, 49)]
    whole = sv.SoftTargets.of(teacher).divergence(student)
    for fewer, more in zip(kept, [*kept[1:], whole], strict=True):
        assert bool((fewer <= more + 1e-12).all())
    close(sv.SoftTargets.of(teacher, top_k=50).divergence(student), whole)
    assert bool((kept[0] > 0).all())


@pytest.mark.parametrize("top_k", [None, 2, 3])
def test_excluded_tokens_add_nothing_and_no_nan(top_k):
    """As in models that give unused entries of the vocabulary −∞."""
    teacher = torch.tensor([[1.0, 2.0, 3.0, -math.inf, -math.inf]])
    student = torch.tensor([[3.0, 2.0, 1.0, -math.inf, -math.inf]], requires_grad=True)
    loss = sv.SoftTargets.of(teacher, top_k=top_k).divergence(student).sum()
    expected = sv.SoftTargets.of(teacher[:, :3], top_k=top_k).divergence(student[:, :3]).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert bool(student.grad.isfinite().all())


def test_wrong_arguments_are_explained(inputs):
    logits = torch.zeros(3, 7)
    for temperature in (0, -1.0, math.nan, math.inf):
        with pytest.raises(sv.ConfigError, match=f"temperature={temperature}: pass a number above 0"):
            sv.SoftTargets.of(logits, temperature=temperature)
    for top_k in (0, 8):
        with pytest.raises(sv.ConfigError, match=f"top_k={top_k}: pass 1 to 7"):
            sv.SoftTargets.of(logits, top_k=top_k)
    targets = sv.SoftTargets.of(logits)
    for wrong in (torch.zeros(4, 7), torch.zeros(3, 8), torch.zeros(3)):
        with pytest.raises(sv.InputError, match="take the same positions of both"):
            targets.divergence(wrong)
    with pytest.raises(sv.ConfigError, match=r"weights of the base model train, such as model\."):
        loss_of(tiny_llava(dtype=F64), inputs)
