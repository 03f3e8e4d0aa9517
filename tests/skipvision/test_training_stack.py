"""Several PEFT adapters, each with its own summary layer, and the unmodified Trainer."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from skipvision import (
    DECODED_KEYWORD,
    AdapterError,
    ConfigError,
    SkipConfig,
    attach,
    attachment_of,
    load_adapter,
    save_adapter,
)
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS, close, labels_for, train_summary

F64 = torch.float64
CONFIG = CONFIGS["counts"]


def lora(**options):
    return LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    )


def tuned(seed=0, config=CONFIG, name="default"):
    """Return an attached model with one adapter, with other summary weights for every seed."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llava(dtype=F64), lora(), adapter_name=name).eval()
    if config is not None:
        train(attach(model, config).summary, seed)
    return model


def train(summary, seed):
    train_summary(summary)
    with torch.no_grad():
        for parameter in summary.parameters():
            parameter.mul_(seed + 1)


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(ROWS, dtype=F64)).logits


def trainable(model):
    """Return the adapter names of the trainable parameters: of LoRA, and of summary layers."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return (
        {name.split(".")[-2] for name in names if "lora" in name},
        {name.split(".")[-3] for name in names if "skip_summary" in name},
    )


def learn(model, steps=2):
    """Train a few steps of plain SGD."""
    inputs = tiny_inputs(ROWS, padding="right", dtype=F64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(**inputs, labels=labels_for(inputs)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def folders(tmp_path):
    """Save two adapters, and return the logits of their models."""
    models = {name: tuned(seed) for seed, name in enumerate("ab")}
    return {name: (save_adapter(model, tmp_path / name), logits(model)) for name, model in models.items()}


# ------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("loader", ["ours", "peft"])
def test_adapters_are_switched_with_their_summaries(folders, loader):
    """Each adapter answers as it does alone, whichever loader added the second."""
    (first, alone_a), (second, alone_b) = folders["a"], folders["b"]
    model = load_adapter(tiny_llava(dtype=F64), first, name="a")
    if loader == "ours":
        assert load_adapter(model, second, name="b") is model
    else:
        model.load_adapter(second, "b")
    assert torch.equal(logits(model), alone_a), "loading is not switching"
    for name, alone in (("b", alone_b), ("a", alone_a), ("b", alone_b)):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone)
    assert not torch.allclose(alone_a, alone_b)


def test_a_new_adapter_starts_from_the_plain_mean_and_changes_no_other():
    model = tuned()
    skip, before = attachment_of(model), logits(model)
    first = skip.summary
    model.add_adapter("b", lora())
    assert torch.equal(logits(model), before)
    model.set_adapter("b")
    assert skip.summary is not first
    assert bool((skip.summary.score.weight == 0).all())
    learn(model)
    assert not bool((skip.summary.score.weight == 0).all())
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_only_the_active_adapter_trains_by_default(folders):
    model = tuned()
    assert trainable(model) == ({"default"}, {"default"})
    model.add_adapter("b", lora())
    assert trainable(model) == ({"default"}, {"default"})
    model.set_adapter("b")
    assert trainable(model) == ({"b"}, {"b"})
    model.set_requires_grad("default", True)
    assert trainable(model) == ({"default", "b"}, {"default", "b"})
    model.set_requires_grad(["default", "b"], False)
    assert trainable(model) == (set(), set())
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == (set(), set())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable_decides_what_trains(folders, is_trainable):
    model = load_adapter(tiny_llava(dtype=F64), folders["a"][0], name="a", is_trainable=is_trainable)
    names = {"a"} if is_trainable else set()
    assert trainable(model) == (names, names)
    load_adapter(model, folders["b"][0], name="b", is_trainable=is_trainable)
    names = {"a", "b"} if is_trainable else set()
    assert trainable(model) == (names, names)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable_decides_for_a_summary_alone(tmp_path, is_trainable):
    base = tiny_llava(dtype=F64)
    attach(base, CONFIG)
    folder = save_adapter(base, tmp_path / "summary")
    model = load_adapter(tiny_llava(dtype=F64), folder, is_trainable=is_trainable)
    assert {p.requires_grad for p in attachment_of(model).summary.parameters()} == {is_trainable}


def test_attached_to_an_adapter_that_does_not_train_the_summary_does_not_either(tmp_path):
    folder = save_adapter(tuned(config=None), tmp_path / "full")
    model = load_adapter(tiny_llava(dtype=F64), folder)
    attach(model, CONFIG)
    assert trainable(model) == (set(), set())


def test_with_adapters_disabled_the_base_models_own_summary_is_used():
    model, base = tuned(), tiny_llava(dtype=F64)
    before = logits(model)
    with attach(base, CONFIG), model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        assert bool((attachment_of(model).summary.score.weight == 0).all())
    assert torch.equal(logits(model), before)


def test_merging_leaves_the_active_adapters_summary_attached():
    model = tuned()
    model.add_adapter("b", lora())
    model.set_adapter("b")
    skip = attachment_of(model)
    train(skip.summary, 3)
    before, summary = logits(model), skip.summary
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert attachment_of(merged) is skip
    assert skip.summary is summary
    close(logits(merged), before)
    names = {name.rpartition("language_model.")[2] for name in merged.state_dict() if "skip_" in name}
    assert names == {"skip_summary.norm.weight", "skip_summary.norm.bias", "skip_summary.score.weight"}
    skip.detach()
    assert list(merged.state_dict()) == list(tiny_llava().state_dict())


def test_merging_a_named_adapter_takes_its_summary():
    model, expected = tuned(), None
    expected = logits(model)
    model.add_adapter("b", lora())
    model.set_adapter("b")
    close(logits(model.merge_and_unload(adapter_names=["default"])), expected)


def test_unloading_leaves_the_base_models_summary():
    model, base = tuned(), tiny_llava(dtype=F64)
    with attach(base, CONFIG):
        assert torch.equal(logits(model.unload()), logits(base))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleting_an_adapter_deletes_its_summary(folders):
    model = tuned()
    load_adapter(model, folders["b"][0], name="b")
    model.delete_adapter("default")
    assert not [name for name in model.state_dict() if "default" in name]
    assert torch.equal(logits(model), folders["b"][1])


def test_merging_in_place_and_back():
    model = tuned()
    before = logits(model)
    model.merge_adapter()
    close(logits(model), before)
    model.unmerge_adapter()
    close(logits(model), before)


def test_several_active_adapters_are_refused():
    model = tuned()
    model.add_adapter("b", lora())
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="Cannot add weighted adapters"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    attachment_of(model).detach()
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ConfigError, match=r"\['default', 'b'\] are active together"):
        attach(model, CONFIG)
    assert attachment_of(model) is None
    with attach(model, CONFIGS["no-summary"]):
        logits(model)


def test_lora_on_all_linear_layers_leaves_summaries_alone():
    model = get_peft_model(tiny_llava(dtype=F64), lora(target_modules="all-linear"))
    attach(model, CONFIG)
    model.add_adapter("b", lora(target_modules="all-linear"))
    assert not [name for name in model.state_dict() if "skip_summary" in name and "lora" in name]


def test_models_with_one_peft_config_do_not_share_changes():
    config = lora()
    one, other = (get_peft_model(tiny_llava(dtype=F64), config) for _ in range(2))
    attach(one, CONFIG)
    with attach(other, CONFIG):
        pass
    assert config.modules_to_save is None
    assert one.peft_config["default"].modules_to_save == ["skip_summary"]
    assert other.peft_config["default"].modules_to_save is None


def test_attached_first_the_summary_can_be_one_of_pefts_modules_to_save():
    base = tiny_llava(dtype=F64)
    skip = attach(base, CONFIG)
    model = get_peft_model(base, lora(modules_to_save=["skip_summary"]))
    assert trainable(model) == ({"default"}, {"default"})
    learn(model)
    assert not bool((skip.summary.score.weight == 0).all())
    with model.disable_adapter():
        assert bool((skip.summary.score.weight == 0).all())


def test_an_adapter_whose_summary_peft_could_not_place_is_not_attached_to(folders):
    model = PeftModel.from_pretrained(tiny_llava(dtype=F64), folders["a"][0])
    with pytest.raises(
        ConfigError, match=r"\['default'\] were loaded without their summary layer, because .* none yet"
    ):
        attach(model, CONFIG)
    assert attachment_of(model) is None
    base = tiny_llava(dtype=F64)
    attach(base, CONFIG)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folders["a"][0])), folders["a"][1])


# -------------------------------------------------------------------------------- saving, loading


def test_one_of_several_adapters_is_saved_by_name(tmp_path):
    model = tuned()
    model.add_adapter("b", lora())
    first = logits(model)
    save_adapter(model, tmp_path / "default")
    model.set_adapter("b")
    train(attachment_of(model).summary, 2)
    second = logits(model)
    save_adapter(model, tmp_path / "active")
    model.set_adapter("default")
    save_adapter(model, tmp_path / "named", name="b")
    files = sorted(path.name for path in (tmp_path / "default").iterdir())
    for folder, expected in (("default", first), ("active", second), ("named", second)):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == files
        assert torch.equal(logits(load_adapter(tiny_llava(dtype=F64), tmp_path / folder)), expected)
    with pytest.raises(AdapterError, match=r"not \['c'\]: choose one of \['default', 'b'\]"):
        save_adapter(model, tmp_path / "c", name="c")


def test_an_adapter_that_was_never_active_is_saved_with_its_plain_mean(tmp_path):
    model = tuned()
    model.add_adapter("b", lora())
    loaded = load_adapter(tiny_llava(dtype=F64), save_adapter(model, tmp_path / "b", name="b"))
    model.set_adapter("b")
    assert torch.equal(logits(loaded), logits(model))


def test_wrappers_of_the_model_are_not_saved(tmp_path):
    model = tuned()
    wrapped = torch.nn.ModuleDict({"module": model})
    loaded = load_adapter(tiny_llava(dtype=F64), save_adapter(wrapped, tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(model))


def older(folder):
    """Write the folder as before PEFT knew of summary layers."""
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("skip_summary" in name for name in weights)
    kept = {name: weight for name, weight in weights.items() if "skip_summary" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["skip_summary"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    return folder


def test_adapters_saved_before_still_load(folders):
    (first, alone_a), (second, alone_b) = folders["a"], folders["b"]
    model = load_adapter(tiny_llava(dtype=F64), older(first))
    assert torch.equal(logits(model), alone_a)
    load_adapter(model, older(second), name="b")
    model.set_adapter("b")
    assert torch.equal(logits(model), alone_b)


def test_peft_refuses_to_load_an_adapter_without_a_summary_where_one_is_expected(folders):
    model = tuned()
    with pytest.raises(KeyError, match="skip_summary"):
        model.load_adapter(older(folders["b"][0]), "b")


OTHERS = {
    "another": (SkipConfig(retained=7, skipped=4, merge="pool"), "retained is 7, not 5, merge is 'pool'"),
    "none": (None, r"it has none \(full tokens\), not SkipConfig\(retained=5"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_trained_under_another_config_is_refused(other, tmp_path):
    """The message names the fields that differ and what to do."""
    config, difference = OTHERS[other]
    folder = save_adapter(tuned(config=config), tmp_path / "other")
    model = tuned()
    before = logits(model)
    with pytest.raises(AdapterError, match=rf"{difference}.*another copy of the base model"):
        load_adapter(model, folder, name="b")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_an_adapter_with_skipping_is_not_added_to_one_without(folders):
    model = tuned(config=None)
    with pytest.raises(AdapterError, match=r"it has SkipConfig\(retained=5.*not none \(full tokens\)"):
        load_adapter(model, folders["b"][0], name="b")


def test_an_adapter_name_that_is_taken(folders):
    with pytest.raises(AdapterError, match="has an adapter 'default' already: give this one another name="):
        load_adapter(tuned(), folders["b"][0])


def test_a_summary_alone_is_not_added_to_adapters(tmp_path):
    base = tiny_llava(dtype=F64)
    attach(base, CONFIG)
    folder = save_adapter(base, tmp_path / "summary")
    with pytest.raises(AdapterError, match="only a summary layer"):
        load_adapter(tuned(), folder, name="b")
    with pytest.raises(AdapterError, match="only a summary layer"):
        load_adapter(base, folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "skip_summary.safetensors"])
def test_a_damaged_second_adapter_leaves_the_model_unchanged(folders, name):
    model = tuned()
    before, names = logits(model), list(model.state_dict())
    file = folders["b"][0] / name
    weights = load_file(file)
    save_file({key: torch.cat([weight, weight]) for key, weight in weights.items()}, file)
    with pytest.raises(AdapterError, match="fit"):
        load_adapter(model, folders["b"][0], name="b")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)


# --------------------------------------------------------------------------------------- Trainer


class Rows(torch.utils.data.Dataset):
    """Rows with one image, none, two."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return ROWS[index % len(ROWS)], index


def collate(rows, decoded=False):
    inputs = tiny_inputs([row for row, _ in rows], padding="right", dtype=F64, seed=rows[0][1])
    labels = labels_for(inputs)
    if decoded:
        image = inputs["input_ids"] == IMAGE_TOKEN
        read = image.flip(1).cumsum(dim=1).flip(1) > 0  # up to the row's last image
        inputs[DECODED_KEYWORD] = ((labels != -100).cumsum(dim=1) > 0) & ~read
    return {**inputs, "labels": labels}


def run(model, folder, *, steps=2, resume=None, decoded=False, **options):
    """Train with an unmodified Trainer: two rows per step, in order, by SGD without clipping."""
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=lambda rows: collate(rows, decoded),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def learnt(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], msg=name, **tolerance)


def by_hand(model, steps, accumulated=1, decoded=False):
    """Train as `run` should, in a loop."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = [Rows()[index % len(Rows())] for index in range(2 * steps * accumulated)]
    for step in range(steps):
        batches = [
            collate(rows[2 * (step * accumulated + part) :][:2], decoded) for part in range(accumulated)
        ]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            (model(**batch, use_cache=False).loss * count / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_trainer_learns_what_a_loop_by_hand_learns(tmp_path, accumulated):
    model, expected = tuned().train(), tuned().train()
    before = learnt(model)
    run(model, tmp_path, gradient_accumulation_steps=accumulated)
    by_hand(expected, 2, accumulated)
    same(learnt(model), learnt(expected), rtol=1e-5, atol=1e-7)
    moved = {name for name, weight in learnt(model).items() if not torch.allclose(weight, before[name])}
    assert any("skip_summary" in name for name in moved)
    assert any("lora" in name for name in moved)


def test_the_trainer_passes_the_mask_of_generated_tokens(tmp_path):
    """The collator can add the keyword that attach documents."""
    model, expected, other = (tuned().train() for _ in range(3))
    model.config.text_config.use_cache = False
    run(model, tmp_path, decoded=True)
    by_hand(expected, 2, decoded=True)
    by_hand(other, 2)
    same(learnt(model), learnt(expected), rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        same(learnt(model), learnt(other), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_with_checkpointing_learns_the_same(tmp_path, use_reentrant):
    model, expected = tuned().train(), tuned().train()
    if use_reentrant:
        model.enable_input_require_grads()
    checkpointing = "activation_checkpointing"
    if not hasattr(TrainingArguments, checkpointing):
        checkpointing = "gradient_checkpointing"  # its name before transformers 5.23
    options = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": use_reentrant}}
    run(model, tmp_path, **options)
    by_hand(expected, 2)
    same(learnt(model), learnt(expected), rtol=1e-5, atol=1e-7)


def test_the_trainers_predictions_have_the_callers_length(tmp_path):
    model = tuned()
    # Before 5.20 transformers cannot gather a cache, also without Skip-Vision.
    model.config.text_config.use_cache = Version(transformers.__version__) >= Version("5.20")
    trainer = run(model, tmp_path, steps=1, per_device_eval_batch_size=8)
    batch = collate([Rows()[index] for index in range(8)])
    with torch.no_grad():
        expected = trainer.model(**batch)
    predicted = trainer.predict(Rows())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    close(torch.from_numpy(predicted.predictions[0]), expected.logits)
    assert predicted.predictions[0].shape[:2] == batch["labels"].shape


def test_the_trainer_resumes_from_a_checkpoint_with_the_summary(tmp_path):
    """A new process only builds the model, attaches, and resumes."""
    whole = tuned().train()
    run(whole, tmp_path / "whole", steps=4)
    half = tuned().train()
    run(half, tmp_path / "halves", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "halves" / "checkpoint-2"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.skip_summary."
    for name, weight in attachment_of(half).summary.named_parameters():
        assert torch.equal(saved[prefix + name], weight)
    resumed = tuned(seed=5).train()
    run(resumed, tmp_path / "halves", steps=4, resume=str(checkpoint))
    same(learnt(resumed), learnt(whole), rtol=0, atol=0)


@pytest.mark.slow
def test_a_trainers_checkpoint_with_several_adapters_is_resumed(tmp_path):
    def two():
        model = tuned(seed=5)
        model.add_adapter("b", lora())
        train(attachment_of(model).summary, 5)
        return model

    whole, half, resumed = two(), two(), two()
    for model in (whole, half, resumed):
        model.set_adapter("b")
    run(whole.train(), tmp_path / "whole", steps=3)
    run(half.train(), tmp_path, save_strategy="steps", save_steps=2)
    with torch.no_grad():
        for parameter in attachment_of(resumed).summary.parameters():
            parameter.zero_()
    run(resumed.train(), tmp_path, steps=3, resume=str(tmp_path / "checkpoint-2"))
    same(learnt(resumed), learnt(whole), rtol=0, atol=0)
    whole.set_adapter("default")
    resumed.set_adapter("default")
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))


def test_a_trainers_checkpoint_becomes_an_adapter(tmp_path):
    """A checkpoint lacks the SkipConfig: attach it, load the checkpoint with PEFT, and save an adapter."""
    half = tuned().train()
    run(half, tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(AdapterError, match=r"it has no skip_config\.json"):
        load_adapter(tiny_llava(dtype=F64), tmp_path / "checkpoint-2")
    base = tiny_llava(dtype=F64)
    attach(base, CONFIG)
    model = PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    loaded = load_adapter(tiny_llava(dtype=F64), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(half.eval()))


def test_a_model_trained_whole_is_saved_in_two_parts(tmp_path):
    """Hugging Face saves its weights, and an adapter holds the summary layer and the SkipConfig."""
    model = tiny_llava(dtype=F64).train()
    attach(model, CONFIG)
    run(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=F64)
    close(logits(load_adapter(base, tmp_path / "adapter")), logits(model.eval()))
