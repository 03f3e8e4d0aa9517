"""The arithmetic of sizing against hand-made numbers, and the command that prints it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from skipvision.__main__ import main
from skipvision.cost import Cost
from skipvision.cost.sizing import GPUS, Demand, Gpu, Workload, size, storage_per_day
from skipvision.errors import ConfigError

GPU = Gpu(memory=100.0, bandwidth=10.0, flops=1000.0, price=2.0, source="none")
WORK = Workload(
    images_per_day=864,
    new_tokens=11,
    compute_share=0.5,
    bandwidth_share=0.5,
    memory_share=0.8,
    max_sequences=4,
)


def needed(prefill: int = 1000, decode: int = 50, weights: int = 40, kv: int = 8, states: int = 0) -> Demand:
    cost = Cost(prefill, decode, 0, kv, 0, 0, weights, 0, state_bytes=states)
    return Demand(cost, kv + 2)


def test_the_time_of_an_image_is_its_prefill_and_its_share_of_the_steps():
    one = size(needed(), GPU, WORK)
    assert one.sequences == 4  # 80 bytes − 40 of weights, 10 each
    # Prefill: 1000 / 500. Each of 10 steps reads 40 + 4 × 9 bytes at 5 per second, for 4 answers.
    assert 1 / one.images_per_second == pytest.approx(2 + 10 * 76 / 5 / 4)
    assert one.gpu_hours == pytest.approx(864 * 40 / 3600)
    assert one.gpus == 1
    assert one.dollars_per_day == pytest.approx(2 * one.gpu_hours)
    assert one.dollars_per_million == pytest.approx(1e6 * 40 / 3600 * 2)


def test_steps_with_much_arithmetic_are_bound_by_it():
    one = size(needed(decode=100_000), GPU, WORK)
    assert 1 / one.images_per_second == pytest.approx(2 + 10 * 10_000 / 500)


def test_the_busiest_hour_needs_more_gpus_and_costs_no_more():
    mean, busy = size(needed(), GPU, WORK), size(needed(), GPU, replace(WORK, peak=5.0))
    assert (mean.gpus, busy.gpus) == (1, 2)
    assert busy.gpu_hours == mean.gpu_hours


def test_memory_limits_answers_and_may_not_hold_the_model():
    assert size(needed(kv=18), GPU, WORK).sequences == 2
    assert size(needed(weights=75), GPU, WORK) is None
    assert size(needed(weights=200), GPU, WORK) is None


def test_states_take_memory_twice_and_are_read_and_written_in_each_step():
    one = size(needed(states=5), GPU, WORK)
    assert one.sequences == 2  # 80 bytes − 40 of weights, 10 + 2 × 5 each
    assert 1 / one.images_per_second == pytest.approx(2 + 10 * (40 + 2 * (9 + 10)) / 5 / 2)


def test_one_token_needs_no_decode_step():
    one = size(needed(decode=0), GPU, replace(WORK, new_tokens=1))
    assert 1 / one.images_per_second == pytest.approx(2)


def test_storage_grows_with_images_and_tokens():
    assert storage_per_day(Workload(10, new_tokens=20)) == 10 * (200 + 60 + 225)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images_per_day": 0}, "images_per_day=0: expected 1 or more"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"text_tokens": -1}, "text_tokens=-1: expected 0 or more"),
        ({"visual_tokens": 0}, "visual_tokens=0: expected 1 or more"),
        ({"compute_share": 1.5}, "compute_share=1.5: expected a number above 0"),
        ({"memory_share": 0.0}, "memory_share=0.0"),
        ({"peak": 0.5}, "peak=0.5: the busiest hour"),
        ({"peak": float("nan")}, "peak=nan"),
        ({"peak": float("inf")}, "peak=inf"),
    ],
)
def test_impossible_workloads_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        replace(WORK, **changed)


def test_every_gpu_has_a_plausible_data_sheet_and_a_source():
    for gpu in GPUS.values():
        assert 100 < gpu.flops / gpu.bandwidth < 600
        assert 16e9 < gpu.memory < 300e9
        assert 0.1 < gpu.price < 20
        sheet, _, price = gpu.source.rpartition("; ")
        assert "data sheet" in sheet
        assert re.search(r"\d{4}-\d\d-\d\d$", price)


def test_the_command_compares_full_and_skipped(tiny_model, capsys):
    arguments = [
        "size",
        "--model",
        str(tiny_model),
        "--images-per-day",
        "1e6",
        "--gpu",
        "l4",
        "--retained",
        "4",
    ]
    main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    per_image, l4 = result["per_image"], result["gpus"]["l4"]
    assert per_image["skipped"]["kv_bytes"] < per_image["full"]["kv_bytes"]
    assert per_image["skipped"]["prefill_flops"] < per_image["full"]["prefill_flops"]
    assert l4["skipped"]["images_per_second"] > l4["full"]["images_per_second"]
    assert result["workload"]["images_per_day"] == 1_000_000
    main([*arguments, "--price", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("l4")] == [
        ["l4", "full"],
        ["l4", "skipped"],
    ]
    assert lines[-1] == "Prices: --price."
    full, skipped = (
        int(one) for one in re.findall(r"\d+", next(x for x in lines if x.startswith("prompt:")))
    )
    assert skipped < full
    assert "skipped: 4 tokens retained, 25% of the tokens skipped" in lines  # 4 is a count, 0.25 a share


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_command_prints(tmp_path, capsys):
    # LLaVA-1.5-7B: its text model has Llama's default sizes.
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    tower |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    config |= {"vision_config": tower, "vision_feature_layer": -2, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = (Path(__file__).parents[3] / "docs/deploy.md").read_text()
    commands = re.findall(r"python -m skipvision (size (?:.*\\\n)*.*)", page)
    assert len(commands) == 2
    for command in commands:
        main(command.replace("llava-hf/llava-1.5-7b-hf", str(tmp_path)).replace("\\\n", " ").split())
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line.split() for line in re.findall(r"^    (\S+ +(?:full|skipped) .*)$", page, re.MULTILINE)]
    assert len(rows) == 8
    assert [row for row in rows if row not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images-per-day", "1.5"], "'1.5' is not a whole number"),
        (["--images-per-day", "many"], "'many' is not a whole number"),
        (["--images-per-day", "9", "--retained", "x"], "'x' is neither a count"),
        (["--images-per-day", "9", "--price", "0"], "--price 0.0: give dollars"),
        (["--images-per-day", "9", "--price", "nan"], "--price nan: give dollars"),
        (["--images-per-day", "9", "--peak", "nan"], "peak=nan"),
        (["--images-per-day", "0"], "images_per_day=0"),
        (["--images-per-day", "9", "--retained", "0.9", "--skipped", "0.2"], "more than all visual tokens"),
        (["--images-per-day", "9", "--model", "/nothing"], "/nothing"),
    ],
)
def test_wrong_options_are_reported_without_a_traceback(arguments, message, tiny_model, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["size", "--model", str(tiny_model), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
