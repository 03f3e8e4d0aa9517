"""The command that tries every family, its table in the docs, and its reasons."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText

from skipvision import InputError, SkipConfig, TokenRole, UnsupportedModelError, attach
from skipvision.__main__ import main
from skipvision.kv_cache import compact
from skipvision.testing.configs import EXCEPTIONS, tiny_config
from skipvision.testing.families import UNSUPPORTED, WITH_TIMM, _build_failure, tiny_batch, tiny_model
from skipvision.testing.survey import EVERY, Finding, count, lines, markdown, survey
from tests.skipvision.family_table import (
    ALL_OTHERS,
    ALL_SUPPORTED,
    HAS_TIMM,
    LEFT_OUT,
    NEWER,
    OLDEST,
    OTHERS,
    ROOT,
    ROWS,
    SUPPORTED,
    TABLE,
)

SAMPLE = ["gemma3", "idefics3", "internvl", "llava_next", "mllama", "qwen3_5", "qwen3_vl_moe"]
NEVER_BUILT = {"diffusion_gemma", "evolla", "pi0"}
"""Families of which transformers cannot build a tiny generating model."""
if Version(transformers.__version__) < Version("5.18"):
    NEVER_BUILT.add("vision-encoder-decoder")  # has no default sections


@pytest.mark.parametrize("family", SAMPLE)
def test_the_table_rows_of_some_families(family):
    assert ROWS[family] in markdown([survey(family)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_table():
    findings = [survey(family) for family in EVERY]
    if LEFT_OUT or HAS_TIMM:
        assert [found.family for found in findings if found.supported] == sorted(SUPPORTED)
        rows = {line for line in markdown(findings).splitlines() if line.startswith("| ")}
        assert rows >= {ROWS[family] for family in {*SUPPORTED, *OTHERS} - {*WITH_TIMM}}
        if transformers.__version__ == OLDEST[1]:
            assert count(findings).startswith(f"{OLDEST[2]} image-text-to-text")
        return
    assert markdown(findings) == TABLE, "python -m skipvision families --markdown prints the table"


@pytest.mark.parametrize("family", LEFT_OUT)
def test_a_family_that_needs_a_newer_transformers(family):
    if family not in EVERY:
        pytest.skip(f"{family} came with transformers {NEWER[family]}")
    assert not survey(family).supported


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_table_entry_for_tiles(family):
    """Counts are per tile if each tile is an image, and per image if tiles are joined."""
    model, config = tiny_model(family), SkipConfig(retained=2, skipped=1, merge="drop", summary_tokens=0)
    with torch.no_grad(), attach(model, config) as skip:
        model(**tiny_batch(model, [["large image", 4]]))
    entries = int(skip.plan.count(TokenRole.RETAINED).sum()) // 2
    assert (entries > 1) == (ROWS[family].split(" | ")[1] == "tiles")


def test_a_missing_package_is_named():
    error = ImportError("\nXModel requires the timm library but")
    assert _build_failure("new", error) == "not tried here: needs timm"
    assert _build_failure("fast_vlm", error).startswith("supported where timm is installed")
    assert _build_failure("new", ValueError("no SDPA but eager")) == "not built here: no SDPA"


@pytest.mark.skipif(not HAS_TIMM, reason="make test-timm runs it")
@pytest.mark.parametrize("family", WITH_TIMM)
def test_a_family_whose_tower_timm_has(family):
    assert survey(family).supported


def test_families_that_are_declared_not_to_work_need_not_be_built():
    assert survey("gemma3n").reason.startswith("its layers predict and correct four streams")


def test_the_table_has_every_family():
    assert sorted(ALL_SUPPORTED + ALL_OTHERS) == sorted({*EVERY, *LEFT_OUT})


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_pages_have_the_same_count_as_the_table(page):
    numbers = re.findall(r"(\d+) of the (\d+)\s+image-text-to-text\s+families", (ROOT / page).read_text())
    assert numbers == [(str(len(ALL_SUPPORTED)), str(len(ALL_SUPPORTED + ALL_OTHERS)))]


def test_no_reason_is_an_exception_name():
    for family in OTHERS:
        assert not re.search(r"\w(Error|Exception)\b", ROWS[family]), ROWS[family]


# ------------------------------------------------------------------------------------- detection


def test_an_unpruned_cache_is_detected(monkeypatch):
    # By its name in sys.modules: the package attribute may be a function of the same name.
    monkeypatch.setattr(
        sys.modules["skipvision.reduction"], "compact", lambda cache, keep: compact(cache, keep | True)
    )
    assert "entries, not the" in survey("llava").reason


def test_changed_logits_without_skipping_are_detected(monkeypatch):
    def disturb(model, config):
        model.get_output_embeddings().weight.data += 1e-3
        return attach(model, config)

    monkeypatch.setattr("skipvision.testing.survey.attach", disturb)
    assert survey("llava").reason == "its logits change although nothing is skipped"


def test_missing_images_are_detected(monkeypatch):
    monkeypatch.setattr("skipvision.testing.survey._ROWS", [[3], [5]])
    assert survey("llava").reason == "its images are not found"


def test_a_plan_that_is_not_applied_is_detected(monkeypatch):
    monkeypatch.setattr("skipvision.testing.survey._CONFIG", SkipConfig(retained=1.0, skipped=0))
    assert survey("llava").reason == "no plan is applied to its images"


def test_an_unexpected_error_does_not_end_the_survey(monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError("list index out of range\nsecond line")

    monkeypatch.setattr("skipvision.testing.survey.tiny_batch", fail)
    assert survey("llava") == Finding("llava", "IndexError: list index out of range")


# --------------------------------------------------------------------------------- rejected by structure


@pytest.mark.parametrize("family", sorted(UNSUPPORTED.keys() - NEVER_BUILT))
@pytest.mark.filterwarnings("ignore")
def test_a_family_without_visual_tokens_is_rejected_by_its_structure(family):
    model = AutoModelForImageTextToText.from_config(tiny_config(family))
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(model, SkipConfig())
    assert len(refusal.value.reason) < 60 < len(str(refusal.value))


GEMMA4 = {
    "layers that attend to another layer's KV cache": {
        "text.num_kv_shared_layers": 1,
        "text.layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "experts next to the feed-forward module": {
        "text.enable_moe_block": True,
        "text.num_experts": 4,
        "text.top_k_experts": 2,
        "text.moe_intermediate_size": 32,
    },
}


@pytest.mark.parametrize("reason", GEMMA4)
def test_checkpoints_of_a_supported_family_with_an_unsupported_structure(reason, monkeypatch):
    monkeypatch.setitem(EXCEPTIONS, "gemma4", EXCEPTIONS["gemma4"] | GEMMA4[reason])
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(tiny_model("gemma4"), SkipConfig())
    assert refusal.value.reason == reason


@pytest.mark.skipif("molmo2" in LEFT_OUT, reason="molmo2 came with transformers 5.20")
def test_a_missing_input_of_the_encoder_is_named():
    model = tiny_model("molmo2")
    batch = tiny_batch(model, [["image", 3]])
    del batch["image_grids"]
    with attach(model, SkipConfig()), pytest.raises(InputError, match="get_image_features needs image_grids"):
        model(**batch)


# ------------------------------------------------------------------------------------------ the command


def test_the_command_prints_lines(capsys):
    main(["families", "llava", "mllama"])
    out, progress = capsys.readouterr()
    findings = [survey("llava"), survey("mllama")]
    assert out.splitlines() == [*lines(findings), f"{count(findings)}."]
    assert out.splitlines()[0].startswith("llava   supported: one size, full")
    assert progress.splitlines() == ["1/2 llava", "2/2 mllama"]


def test_the_command_prints_json(capsys):
    main(["families", "qwen2_vl", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["family"] == "qwen2_vl"
    assert found["reason"] is None
    assert found["mrope"] is True
    assert found["images"] == "several sizes"


def test_the_command_prints_the_pages_tables(capsys):
    main(["families", "mllama", "--markdown"])
    assert capsys.readouterr().out == markdown([survey("mllama")])


def test_unknown_names_are_rejected_with_suggestions(capsys):
    with pytest.raises(SystemExit) as end:
        main(["families", "lava", "qwen2_vl", "zzz"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "no family 'lava'" in message
    assert "did you mean llava" in message
    assert "no family 'zzz'" in message
    assert "there are aria" in message
