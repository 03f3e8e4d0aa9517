"""A box of the overlay covers the pixels of its token, and the fates match the plan."""

from __future__ import annotations

import inspect
import io
import json
import struct

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import skipvision as sv
from skipvision.__main__ import main
from skipvision.analysis import overlay_command, patches_of
from skipvision.anatomy.families import dissect
from skipvision.errors import InputError
from skipvision.testing.families import tiny_model

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
SIZES = [(120, 80), (70, 130), (64, 64)]

CROPPED = CLIPImageProcessorPil(size={"shortest_edge": SIDE + 8}, crop_size=SQUARE)
PADDED = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, do_pad=True)
TILED = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
ANY = {
    "size": {"shortest_edge": SIDE},
    "crop_size": SQUARE,
    "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
}
NATIVE = Qwen2VLImageProcessorPil(size={"shortest_edge": 32**2, "longest_edge": 96**2}, patch_size=8)
CASES = {
    "llava": ("llava", CROPPED),
    "llava, padded": ("llava", PADDED),
    "vipllava": ("vipllava", CROPPED),
    "gemma3": ("gemma3", Gemma3ImageProcessorPil(size=SQUARE)),
    "qwen2_vl": ("qwen2_vl", NATIVE),
    "qwen2_5_vl": ("qwen2_5_vl", NATIVE),
    "qwen3_vl": ("qwen3_vl", NATIVE),
    "qwen3_vl_moe": ("qwen3_vl_moe", NATIVE),
    "idefics3": ("idefics3", Idefics3ImageProcessorPil(**TILED)),
    "smolvlm": ("smolvlm", SmolVLMImageProcessorPil(**TILED)),
    "internvl": ("internvl", GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6)),
    "internvl, uncut": ("internvl", GotOcr2ImageProcessorPil(size=SQUARE)),
    "llava_next": ("llava_next", LlavaNextImageProcessorPil(**ANY)),
    "llava_next_video": ("llava_next_video", LlavaNextImageProcessorPil(**ANY)),
}


def inputs_of(model, processor, image):
    """Inputs of one image between words, with as many placeholders as the model has features."""
    nested = isinstance(processor, (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil))
    outputs = dict(processor([[image]] if nested else [image], return_tensors="pt"))
    outputs.pop("num_patches", None)
    outputs.pop("num_crops", None)
    features = model.base_model.get_image_features(**outputs, return_dict=True).pooler_output
    count = sum(feature.shape[:-1].numel() for feature in features)
    ids = torch.tensor([[20, 21] + [model.config.image_token_id] * count + [22]])
    types = (ids == model.config.image_token_id).long()
    arguments = inspect.signature(model.forward).parameters
    extra = {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in arguments}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **outputs, **extra}


def embeds_of(model, inputs):
    """(N, H) visual tokens that reach the decoder."""
    seen = []
    decoder = dissect(model).decoder
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0][inputs["input_ids"] == model.config.image_token_id]


def without_attention_in_the_tower(model):
    """Disable attention, so that a token only depends on its own pixels."""
    for name, module in model.named_modules():
        if "vis" in name and type(module).__name__.endswith("Attention"):
            module.register_forward_hook(
                lambda module, args, output: (
                    output * 0 if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])
                )
            )
    return model


def overlaps(box, spot, margin):
    return (
        min(box[2], spot[2]) - max(box[0], spot[0]) > margin
        and min(box[3], spot[3]) - max(box[1], spot[1]) > margin
    )


@pytest.mark.parametrize("case", CASES)
def test_a_bright_spot_changes_only_the_tokens_whose_boxes_it_touches(case):
    family, processor = CASES[case]
    model = without_attention_in_the_tower(tiny_model(family))
    for size in SIZES:
        dark = Image.new("RGB", size)
        inputs = inputs_of(model, processor, dark)
        with sv.attach(model, sv.SkipConfig.full()) as skip, torch.no_grad():
            model(**inputs)
            [overlay] = patches_of(skip.plan, inputs, [size], processor, model.config)
        before = embeds_of(model, inputs)
        found = 0
        for x, y in [(4, 4), (size[0] // 2, size[1] // 3), (size[0] - 12, size[1] - 12)]:
            spot = (x, y, x + 8, y + 8)
            bright = dark.copy()
            ImageDraw.Draw(bright).rectangle((x, y, x + 7, y + 7), fill="white")
            after = embeds_of(model, inputs_of(model, processor, bright))
            changed = ((after - before).abs().amax(dim=1) > 1e-5).tolist()
            for patch, differs in zip(overlay.patches, changed, strict=True):
                if patch.box is None:
                    assert not differs
                elif overlaps(patch.box, spot, 1.5):
                    assert differs, (size, spot, patch)
                    found += 1
                elif differs:
                    # Resizing mixes a pixel with its neighbours.
                    assert overlaps(patch.box, spot, -2.5 * max(1, *size) / SIDE), (size, spot, patch)
        assert found


@pytest.fixture(scope="module")
def tiny_folder(request):
    # `tiny_model` is a function in this module, so the fixture needs another name.
    return request.getfixturevalue("tiny_model")


CONFIGS = [
    sv.SkipConfig(retained=0.25, skipped=0.25),
    sv.SkipConfig(retained=3, skipped=2, merge="drop", layout="grouped"),
    sv.SkipConfig(retained=2, skipped=3, merge="pool", summary_tokens=0, drop_after=0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_fates_match_the_plan_with_several_images_in_a_batch(config):
    model = tiny_model("llava")
    token = model.config.image_token_id
    images = [Image.new("RGB", size) for size in SIZES]
    pixels = CROPPED(images, return_tensors="pt")["pixel_values"]
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[9] * 17 + [20] + [token] * 16 + [21], [20] + [token] * 32 + [22] * 2])
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    with sv.attach(model, config) as skip, torch.no_grad():
        model(**inputs)
        plan = skip.plan
    overlays = patches_of(plan, inputs, SIZES, CROPPED, model.config)
    retained, skipped, _ = config.counts(16)
    begins = [(0, 18), (1, 1), (1, 17)]
    for overlay, size, (row, begin) in zip(overlays, SIZES, begins, strict=True):
        assert overlay.size == size
        assert overlay.drop_after == overlay.as_json().get("drop_after") == config.drop_after
        assert overlay.counts["retained"] == retained
        assert overlay.counts["skipped"] == skipped
        assert overlay.counts["dropped" if config.merge == "drop" else "merged"] == 16 - retained - skipped
        for number, patch in enumerate(overlay.patches):
            into = int(plan.merged_into[row, begin + number])
            if patch.fate == "dropped":
                assert into == -1
                continue
            host = number if patch.into is None else patch.into
            assert int(plan.source[row, into]) == begin + host
            role = plan.roles[row, into]
            if patch.fate == "merged":
                assert patch.into != number
                assert overlay.patches[patch.into].fate in ("retained", "skipped")
            else:
                assert sv.TokenRole(int(role)).name.lower() == patch.fate


def overlay_of_noise(config):
    model = tiny_model("llava")
    image = Image.effect_noise((120, 80), 90).convert("RGB")
    inputs = inputs_of(model, CROPPED, image)
    with sv.attach(model, config) as skip, torch.no_grad():
        model(**inputs)
        [overlay] = patches_of(skip.plan, inputs, [image.size], CROPPED, model.config)
    return image, overlay


def test_the_drawing_hides_dropped_patches_and_shows_retained_ones():
    image, overlay = overlay_of_noise(sv.SkipConfig(retained=4, skipped=0, merge="drop"))
    drawing = overlay.draw(image, side=480)
    assert drawing.width == 480
    plain = image.resize((480, 320))
    for patch in overlay.patches:
        left, top, right, bottom = (round(edge * 4) for edge in patch.box)
        inside = (left + 6, top + 6, right - 6, bottom - 6)
        difference = ImageChops.difference(drawing.crop(inside), plain.crop(inside)).convert("L")
        changed = difference.getextrema()[1] > 40
        assert changed == (patch.fate == "dropped")


def test_the_json_form_has_every_patch():
    _, overlay = overlay_of_noise(sv.SkipConfig(retained=4, skipped=4))
    again = json.loads(json.dumps(overlay.as_json()))
    assert again["size"] == [120, 80]
    assert [(view["rows"], view["columns"]) for view in again["views"]] == [(4, 4)]
    for patch, read in zip(overlay.patches, again["patches"], strict=True):
        assert (patch.fate, patch.into, list(patch.box)) == (read["fate"], read["into"], read["box"])


def test_tiles_and_the_whole_image_are_drawn_in_two_panels():
    family, processor = CASES["idefics3"]
    model = tiny_model(family)
    image = Image.new("RGB", SIZES[0], "gray")
    inputs = inputs_of(model, processor, image)
    with sv.attach(model, sv.SkipConfig(retained=4, skipped=4)) as skip, torch.no_grad():
        model(**inputs)
        [overlay] = patches_of(skip.plan, inputs, SIZES[:1], processor, model.config)
    assert len(overlay.views) == 7
    assert overlay.draw(image, side=120).width == 248


def test_inputs_that_do_not_fit_are_rejected():
    image, overlay = overlay_of_noise(sv.SkipConfig(retained=4, skipped=4))
    with pytest.raises(sv.InputError, match="side=0"):
        overlay.draw(image, side=0)
    with pytest.raises(sv.InputError, match=r"\(10, 10\) pixels, but the overlay is for \(120, 80\)"):
        overlay.draw(Image.new("RGB", (10, 10)))
    model = tiny_model("llava")
    inputs = inputs_of(model, CROPPED, image)
    with sv.attach(model, sv.SkipConfig(retained=4, skipped=4)) as skip, torch.no_grad():
        model(**inputs)
    plan, config = skip.plan, model.config
    with pytest.raises(sv.InputError, match="inputs of the call that produced the plan"):
        patches_of(plan, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, [(120, 80)], CROPPED, config)
    with pytest.raises(sv.InputError, match="but the prompt has 16"):
        patches_of(plan, inputs, [(120, 80)] * 3, CROPPED, config)
    other = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    with pytest.raises(sv.UnsupportedModelError, match="but its settings say"):
        patches_of(plan, inputs, [(120, 80)], other, config)
    with pytest.raises(sv.UnsupportedModelError, match="not known for janus"):
        patches_of(plan, inputs, [(120, 80)], CROPPED, tiny_model("janus").config)


def test_the_command_draws_and_counts(tiny_folder, tmp_path, capsys):
    source, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.effect_noise((120, 80), 90).save(source)
    options = ["--retained", "4", "--skipped", "0.25", "--select", "norm", "--side", "240"]
    main(["overlay", "--model", str(tiny_folder), *options, str(source), "-o", str(output)])
    assert "retained 4, skipped 4, merged 8, dropped 0" in capsys.readouterr().out
    with Image.open(output) as drawing:
        assert drawing.width == 240
    main(["overlay", "--model", str(tiny_folder), "--json", str(source), "-o", str(output)])
    assert len(json.loads(capsys.readouterr().out)["patches"]) == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--retained", "1.5"], "retained=1.5"),
        (["--model", "{folder}"], "cannot be loaded"),
        (["--adapter", "{folder}"], "not a Skip-Vision adapter"),
        (["-o", "{folder}/out.xyz"], "'.xyz' is not an image format"),
        (["-o", "{folder}/none/out.png"], "does not exist"),
        (["--prompt", "two <image>"], "the processor rejects"),
        (["{folder}/in.txt"], "cannot be read as an image"),
    ],
)
def test_the_command_reports_errors(changed, message, tiny_folder, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("not an image")
    Image.new("RGB", (120, 80)).save(tmp_path / "in.png")
    changed = [text.format(folder=tmp_path) for text in changed]
    image = [] if len(changed) == 1 else [str(tmp_path / "in.png")]
    with pytest.raises(SystemExit) as ended:
        main(["overlay", "--model", str(tiny_folder), "-o", str(tmp_path / "out.png"), *image, *changed])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def with_exif(block):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]


TURN = b"II*\0" + struct.pack("<LHHHLHH", 8, 1, 0x0112, 3, 1, 6, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("block", "size"),
    [
        (TURN, (8, 12)),
        (TURN[:20], (8, 12)),
        (b"none", (12, 8)),
        (b"II*\0" + b"\xff" * 20, (12, 8)),
        (b"", (12, 8)),
    ],
    ids=["sound", "cut off", "no header", "directory after the end", "empty"],
)
def test_the_command_opens_photographs_with_damaged_exif_blocks(block, size, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(with_exif(block))
    assert overlay_command._open(tmp_path / "photo.jpg").size == size


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(40), with_exif(TURN)[:200], b""])
def test_every_damaged_image_is_one_error(data, tmp_path):
    (tmp_path / "photo").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as an image"):
        overlay_command._open(tmp_path / "photo")
