"""Give saved weights the names that both transformers and vLLM read.

transformers 5.16 to 5.23 save a CLIP or SigLIP tower as ``vision_tower.…``. The checkpoints on the hub and
vLLM 0.32 have ``vision_tower.vision_model.…``, which transformers also loads.
The names of all other parts are the same on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})
_SAVED, _SHARED = "vision_tower.", "vision_tower.vision_model."
_INDEX = "model.safetensors.index.json"


def rename_weights(folder: Path, config: PretrainedConfig) -> None:
    """Rename the weights that ``save_pretrained`` wrote, where vLLM expects other names."""
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", None) not in _TOWERS:
        return
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), list(opened.keys())
        if any(shared_name(name) != name for name in names):
            renamed = file.with_suffix(".renamed")  # the weights are mapped from the file, not copied
            save_file(
                {shared_name(name): weight for name, weight in load_file(file).items()}, renamed, metadata
            )
            renamed.replace(file)
    index = folder / _INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {shared_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")


def needs_other_names(names: Iterable[str], config: PretrainedConfig) -> bool:
    """Return whether `rename_weights` would rename weights with these names."""
    vision = getattr(config, "vision_config", None)
    towers = getattr(vision, "model_type", None) in _TOWERS
    return towers and any(shared_name(name) != name for name in names)


def shared_name(name: str) -> str:
    """Return the name that both sides read of a weight of a model with a CLIP or SigLIP tower."""
    if not name.startswith(_SAVED) or name.startswith(_SHARED):
        return name
    return _SHARED + name.removeprefix(_SAVED)
