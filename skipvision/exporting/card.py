"""The model card of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from skipvision.cost.predict import predict_cost
from skipvision.errors import SkipVisionError
from skipvision.exporting.read import Exported

_PACKAGES = ("torch", "transformers", "peft")
_TEXT_TOKENS, _NEW_TOKENS = 64, 32


def model_card(
    base: str,
    adapter: Path | None,
    config: PretrainedConfig,
    exported: Exported,
    numbers: Mapping[str, object],
) -> str:
    """Return the ``README.md`` of an exported model.

    Args:
        base: folder or Hugging Face id of the base model. Of a folder, only the name is shown.
        adapter: folder of the adapter.
        config: of the model.
        exported: what its ``config.json`` says about Skip-Vision.
        numbers: results by their names.
    """
    on_hub = not Path(base).exists()
    name = base if on_hub else Path(base).resolve().name
    head: dict[str, Any] = {
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "tags": ["skip-vision"],
    }
    if on_hub:
        head["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name} with Skip-Vision\n",
        _summary(name, adapter, exported),
        _LOADING,
        _settings(exported),
        _costs(config, exported),
        _table("Results", ("result", "value"), numbers),
        _table("Versions", ("package", "version"), {name: version(name) for name in _PACKAGES}),
    ]
    return "\n".join(part for part in parts if part)


_LOADING = """## Use

With full tokens, in any program that loads transformers models:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
```

With Skip-Vision attached as it was tuned:

```python
import skipvision as sv

model = sv.from_exported("FOLDER")
```
"""


def _summary(name: str, adapter: Path | None, exported: Exported) -> str:
    tuned = f"{name}, with an adapter merged into its weights." if adapter is not None else f"{name}."
    if exported.skip is None:
        return f"{tuned} It was tuned with full tokens, so its `config.json` names no SkipConfig.\n"
    how = "it was tuned with" if adapter is not None else "was chosen for it, without tuning"
    pruned = f"Its `config.json` names the SkipConfig that {how}"
    layer = f", and `{exported.summary_file}` is its summary layer" if exported.summary_file else ""
    return f"{tuned} {pruned}{layer}.\n"


def _settings(exported: Exported) -> str:
    if exported.skip is None:
        return ""
    return f"## SkipConfig\n\n```yaml\n{exported.skip.to_yaml()}```\n"


def _costs(config: PretrainedConfig, exported: Exported) -> str:
    """Return the predicted costs as fractions of full tokens; "" where they cannot be predicted."""
    if exported.skip is None:
        return ""
    try:
        cost = predict_cost(
            config, exported.skip, text_tokens=_TEXT_TOKENS, new_tokens=_NEW_TOKENS, training=False
        )
    except SkipVisionError:
        return ""
    ratio = cost.ratio_to_full
    rows = {
        "prefill FLOPs": ratio.prefill_flops,
        "decode FLOPs": ratio.decode_flops,
        "KV cache bytes": ratio.kv_bytes,
    }
    shown = {name: f"{100 * value:.1f} %" for name, value in rows.items()}
    title = f"Predicted cost of one image, {_TEXT_TOKENS} text tokens and {_NEW_TOKENS} new tokens"
    return _table(title, ("", "of full tokens"), shown)


def _table(title: str, heads: tuple[str, str], rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", f"| {heads[0]} | {heads[1]} |", "| --- | ---: |", *lines, ""])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
