"""Model folders that try to run code, and a program that loads each by every way that the project has.

``yes y | python -m tests.security.folders FOLDER …`` prints one JSON object for each folder: the outcome by
way of loading. Each folder's code creates the file that the environment variable SKIPVISION_TEST_RAN names.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RAN = "SKIPVISION_TEST_RAN"
CODE = f"""
import os, pathlib
pathlib.Path(os.environ["{RAN}"]).touch()
from transformers import PretrainedConfig, LlavaForConditionalGeneration, LlavaConfig, LlavaProcessor
from transformers import PreTrainedTokenizerFast
class Config(LlavaConfig):
    model_type = "hostile"
class Model(LlavaForConditionalGeneration):
    config_class = Config
class Processor(LlavaProcessor): pass
class Tokenizer(PreTrainedTokenizerFast): pass
class Images: pass
"""


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os, pathlib; pathlib.Path(os.environ['{RAN}']).touch()",)


def _edit(file: Path, **fields: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **fields}))


def _unknown_type(folder: Path) -> None:
    _edit(
        folder / "config.json",
        model_type="hostile",
        architectures=["Model"],
        auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"},
    )


def _unknown_model_class(folder: Path) -> None:
    _edit(folder / "config.json", model_type="llama", auto_map={"AutoModelForImageTextToText": "code.Model"})


def _unknown_processor(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        _edit(folder / name, processor_class="Processor", auto_map={"AutoProcessor": "code.Processor"})


def _unknown_processor_in_config(folder: Path) -> None:
    (folder / "processor_config.json").unlink(missing_ok=True)
    _edit(folder / "config.json", processor_class="Processor", auto_map={"AutoProcessor": "code.Processor"})


def _unknown_tokenizer(folder: Path) -> None:
    _edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
    )


def _unknown_images(folder: Path) -> None:
    images = {"image_processor_type": "Images", "auto_map": {"AutoImageProcessor": "code.Images"}}
    _edit(folder / "processor_config.json", image_processor=images)
    _edit(folder / "preprocessor_config.json", **images)


def _unknown_text_type(folder: Path) -> None:
    inner = {"model_type": "hostile", "auto_map": {"AutoConfig": "code.Config"}}
    _edit(folder / "config.json", text_config=inner)


def _elsewhere(folder: Path) -> None:
    """The code is another repository's, here that of a second folder."""
    other = folder.with_name(f"{folder.name}-code")
    other.mkdir()
    (other / "code.py").write_text(CODE)
    _edit(folder / "config.json", model_type="hostile", auto_map={"AutoConfig": f"{other}--code.Config"})


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))


def _pickled_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}})
    )
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(pickle.dumps(Pickled()))


def _pickles_in_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "weights.bin"}})
    )
    (folder / "weights.bin").write_bytes(pickle.dumps(Pickled()))


def _weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / f"{folder.name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": f"../{folder.name}.safetensors"}})
    )


def _attention_from_the_hub(folder: Path) -> None:
    _edit(
        folder / "config.json", _attn_implementation="attacker/kernel", attn_implementation="attacker/kernel"
    )


def _custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE + "def generate(model, **_): pass\n")


# The value is a part of the message that refuses the folder; None: the folder loads without its code.
HOSTILE: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "unknown model type": (_unknown_type, "Python code from its own folder"),
    "unknown model class": (_unknown_model_class, "Python code from its own folder"),
    "unknown processor class": (_unknown_processor, "Python code from its own folder"),
    "unknown processor class in config.json": (_unknown_processor_in_config, "image processor"),
    "unknown tokenizer class": (_unknown_tokenizer, None),
    "unknown image processor": (_unknown_images, "Python code from its own folder"),
    "unknown text model": (_unknown_text_type, "hostile"),
    "code of another repository": (_elsewhere, "Python code from its own folder"),
    "pickled weights": (_pickled, "pickled"),
    "pickled shards": (_pickled_shards, "pickled"),
    "pickles in the index": (_pickles_in_the_index, "must be .safetensors files of the same folder"),
    "weights outside the folder": (_weights_elsewhere, "must be .safetensors files of the same folder"),
    "an attention of the hub": (_attention_from_the_hub, "whose code is never run"),
    "a generate function": (_custom_generate, None),
}


def hostile_folder(kind: str, sound: Path, parent: Path) -> Path:
    """Copy a sound model folder and make it hostile."""
    folder = parent / kind.replace(" ", "-")
    shutil.copytree(sound, folder)
    (folder / "code.py").write_text(CODE)
    HOSTILE[kind][0](folder)
    return folder


# --------------------------------------------------------------------------------------- ways of loading


def _job(folder: str) -> None:
    import torch

    import skipvision as sv
    from pipelines.engines.model import EngineModel, check_model, load_engine
    from pipelines.shared.sections import EngineSection

    model = EngineModel(folder, folder, None, None, sv.SkipConfig.full(), "float32", "sdpa")
    check_model(model)
    load_engine(model, EngineSection(), torch.device("cpu")).close()


def _finetuning(folder: str) -> None:
    from pipelines.finetune.checks import check_model
    from pipelines.finetune.config import FinetuneConfig

    check_model(
        FinetuneConfig.model_validate({"name": "x", "model": {"path": folder}, "data": {"train": "x.json"}})
    )


def _tradeoff(folder: str) -> None:
    from pipelines.tradeoff.points import model_config

    model_config(SimpleNamespace(path=folder))  # type: ignore[arg-type]


def _endpoint(folder: str) -> None:
    from serve.app import build

    build({"model": folder})


def _ingress(folder: str) -> None:
    from serve.config import ModelSection
    from serve.ingress.catalogue import ServedModel

    ServedModel(ModelSection(path=folder), None, template_seconds=2.0)  # type: ignore[arg-type]


def _overlay(folder: str) -> None:
    from PIL import Image

    from skipvision.analysis import overlay_command

    image = Path(folder).parent / "image.png"
    Image.new("RGB", (56, 56)).save(image)
    parser = argparse.ArgumentParser()
    overlay_command.add_options(parser)
    overlay_command.run(parser.parse_args([str(image), "-o", f"{image}.out.png", "--model", folder]))


def _lmms_eval(folder: str) -> None:
    from skipvision.integrations.lmms_eval.answering import load_engine

    load_engine(folder, device="cpu").close()


WAYS: dict[str, Callable[[str], None]] = {
    "job": _job,
    "fine-tuning": _finetuning,
    "trade-off": _tradeoff,
    "endpoint": _endpoint,
    "ingress": _ingress,
    "overlay": _overlay,
    "lmms-eval": _lmms_eval,
}


@contextmanager
def _outcome(found: dict[str, str], way: str) -> Iterator[None]:
    from skipvision.errors import SkipVisionError

    ran = Path(os.environ[RAN])
    ran.unlink(missing_ok=True)
    try:
        yield
        found[way] = "loaded"
    except SkipVisionError as error:
        found[way] = f"refused: {error}"
    except Exception as error:
        found[way] = f"crashed: {type(error).__name__}: {error}"
    if ran.exists():
        found[way] = f"RAN THE CODE, {found[way]}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        outcomes: dict[str, str] = {}
        for name, load in WAYS.items():
            with _outcome(outcomes, name):
                load(argument)
        print(json.dumps(outcomes), flush=True)
