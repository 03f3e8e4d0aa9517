"""Two processes learn what one learns from both their batches: DistributedDataParallel and FSDP2.

Starting processes is slow, so one pair runs all scenarios; each test reads how its own went.
"""

import os
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from skipvision import AdapterError, ConfigError, attach, attachment_of, load_adapter, save_adapter
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, close, labels_for, train_summary
from tests.skipvision.test_training import checkpointing, lora_model

F64 = torch.float64
WORLD = 2
BOTH = [[[3, "image", 4], [5]], [["image", 2, "image", 3]]]
ONE_WITHOUT = [[[3, "image", 4], ["image", 6]], [[5], [7]]]
"""The rows of each process: with images in both, and with none in the second."""


def batches(rows, seed=0):
    """Return the joint batch and each process's share of it, cut to the length of its rows."""
    joint = tiny_inputs([row for part in rows for row in part], padding="right", dtype=F64, seed=seed)
    shares, row, image = [], 0, 0
    for part in rows:
        ids, mask = (joint[name][row : row + len(part)] for name in ("input_ids", "attention_mask"))
        length = int(mask.sum(dim=1).max())
        share = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
        images = int((share["input_ids"] == IMAGE_TOKEN).sum()) // 16
        if images:
            share["pixel_values"] = joint["pixel_values"][image : image + images]
        shares.append(share)
        row, image = row + len(part), image + images
    return joint, shares


def total_loss(model, inputs):
    labels = labels_for(inputs)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def learnt_tokens(inputs):
    return int((labels_for(inputs)[:, 1:] != -100).sum())


def build(name="counts", lora=True):
    """Build the same attached model in every process, with a summary that scores every token differently."""
    model = lora_model() if lora else tiny_llava(dtype=F64)
    train_summary(attach(model.train(), CONFIGS[name]).summary)
    return model


def gradients(model):
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            grads[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    model.zero_grad()
    return grads


def learns_the_same(wrap, rank, rows, *, name="counts", lora=True, use_reentrant=None):
    """Compare loss and gradients of two steps with one process on the joint batches."""
    alone, model = build(name, lora), build(name, lora)
    if use_reentrant is not None:
        checkpointing(model, use_reentrant)
    wrapped = wrap(model)
    for seed in range(2):
        joint, shares = batches(rows, seed)
        count = learnt_tokens(joint)
        expected = total_loss(alone, joint) / count
        expected.backward()
        loss = total_loss(wrapped, shares[rank])
        (loss * WORLD / count).backward()
        loss = loss.detach()
        distributed.all_reduce(loss)
        close(loss / count, expected)
        got, needed = gradients(wrapped), gradients(alone)
        assert got.keys() == needed.keys()
        assert any("skip_summary" in name for name in got)
        for parameter, gradient in needed.items():
            assert (got[parameter] is None) == (gradient is None), parameter
            if gradient is not None:
                torch.testing.assert_close(
                    got[parameter], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}"
                )


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


ddp_as_the_trainer = partial(ddp, find_unused_parameters=True)


def fsdp_whole(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def fsdp(model):
    """Shard as FSDP2 recommends: each decoder layer, then the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in attachment_of(model)._anatomy.layers:
        fully_shard(layer.whole, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def evaluates_the_same(rank, folder, name="counts"):
    """Each process has its own batch, one of them without an image."""
    alone, model = build(name).eval(), fsdp(build(name).eval())
    _, shares = batches(ONE_WITHOUT)
    with torch.no_grad():
        close(model(**shares[rank]).logits, alone(**shares[rank]).logits)


def generates_the_same(rank, folder):
    alone, model = build().eval(), fsdp(build().eval())
    register_fsdp_forward_method(model, "generate")
    inputs = tiny_inputs([[2, "image", 3], [4]], dtype=F64, seed=rank)
    expected = alone.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), expected
    )


def the_summary_is_sharded(rank, folder):
    model = fsdp(build())
    weights = dict(attachment_of(model).summary.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    assert weights["norm.weight"].to_local().shape == (16,)


def a_sharded_adapter_is_gathered_and_saved(rank, folder):
    """Save as `save_adapter` documents for FSDP2."""
    model = fsdp(build())
    with pytest.raises(AdapterError, match="sharded over processes"):
        save_adapter(model, folder / "sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        whole = lora_model()
        attach(whole, CONFIGS["counts"])
        assert whole.load_state_dict(state, strict=False).unexpected_keys == []
        loaded = load_adapter(tiny_llava(dtype=F64), save_adapter(whole, folder / "whole"))
        inputs = batches(BOTH)[0]
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, build().eval()(**inputs).logits)
    distributed.barrier()


def attaching_late_is_refused(wrap, rank, folder):
    model = lora_model()
    wrapped = wrap(model)
    with pytest.raises(ConfigError, match="attach before the model is wrapped or sharded"):
        attach(wrapped, CONFIGS["counts"])
    assert attachment_of(model) is None
    attach(wrapped, CONFIGS["no-summary"])


def probing_sharded_layers_is_refused(rank, folder):
    model = fsdp(build("ffn-ratio-later"))
    with pytest.raises(ConfigError, match="use another select, or shard the model as a whole"):
        model(**batches(BOTH)[1][rank])


def learning(wrap, rows, **options):
    return lambda rank, folder: learns_the_same(wrap, rank, rows, **options)


SCENARIOS = {
    "ddp": {
        "images in both": learning(ddp, BOTH),
        "no image in one": learning(ddp, ONE_WITHOUT),
        "three summaries": learning(ddp, ONE_WITHOUT, name="three-summaries"),
        "selected by FFN ratio": learning(ddp, ONE_WITHOUT, name="ffn-ratio"),
        "checkpointing": learning(ddp, ONE_WITHOUT, use_reentrant=False),
        "re-entrant checkpointing": learning(ddp, ONE_WITHOUT, use_reentrant=True),
        "as the Trainer wraps": learning(ddp_as_the_trainer, ONE_WITHOUT),
        "without LoRA": learning(ddp_as_the_trainer, ONE_WITHOUT, lora=False),
        "attaching late": partial(attaching_late_is_refused, ddp),
    },
    "fsdp": {
        "images in both": learning(fsdp, BOTH),
        "no image in one": learning(fsdp, ONE_WITHOUT),
        "sharded as a whole": learning(fsdp_whole, ONE_WITHOUT),
        "selected by FFN ratio": learning(fsdp_whole, ONE_WITHOUT, name="ffn-ratio-later"),
        "selected by FFN ratio of sharded layers": probing_sharded_layers_is_refused,
        "checkpointing": learning(fsdp, ONE_WITHOUT, use_reentrant=False),
        "re-entrant checkpointing": learning(fsdp, ONE_WITHOUT, use_reentrant=True),
        "without LoRA": learning(fsdp, BOTH, lora=False),
        "the summary is sharded": the_summary_is_sharded,
        "evaluating": evaluates_the_same,
        "generating": generates_the_same,
        "saving": a_sharded_adapter_is_gathered_and_saved,
        "attaching late": partial(attaching_late_is_refused, fsdp_whole),
    },
}
NAMES = [(kind, name) for kind, scenarios in SCENARIOS.items() for name in scenarios]


def work(rank, folder):
    """Run every scenario in one process, and record each result."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meet", timeout=timedelta(seconds=20), rank=rank, world_size=WORLD
    )
    errors = {}
    for kind, name in NAMES:
        try:
            SCENARIOS[kind][name](rank, folder)
            errors[kind, name] = ""
        except Exception:
            errors[kind, name] = traceback.format_exc()
    torch.save(errors, folder / f"{rank}.pt")
    # A scenario that fails in one process can leave the other waiting: end without it.
    os._exit(0)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return, by kind and name of the scenario, the errors of both processes, "" for none."""
    folder = Path(tmp_path_factory.mktemp("distributed"))
    multiprocessing.spawn(work, args=(folder,), nprocs=WORLD)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(WORLD))
    return {name: first[name] + second[name] for name in NAMES}


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_two_processes_learn_what_one_learns(errors, kind, name):
    assert not errors[kind, name]
