"""Let torchvision be imported where its build is for CUDA but torch's is for CPUs: `make test-vllm`.

vLLM imports torchvision, which describes its operators to torch. Those of the other build do not load, so the
import fails. It is enough to declare these two, which nothing here calls. Python imports this file when it
starts, in vLLM's processes as well.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators before it is imported, and finds no module itself."""

    library: Any = None
    """Keeps the declarations: they disappear with their library."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            self._declare()

    def _declare(self) -> None:
        import torch

        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None or torch.version.cuda is not None:
            return
        if "+cu" in Path(spec.origin).with_name("version.py").read_text():
            DeclareOperators.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                DeclareOperators.library.define(signature)


sys.meta_path.insert(0, DeclareOperators())
