"""Skip-Vision: vision-language models that stop paying for redundant visual tokens.

    image + prompt
      └ vision tower + projector (unmodified)      N visual tokens per image
         └ select   which tokens stay on the full path             ┐
           merge    the rest becomes a few skipped tokens          ├ one TokenPlan
           summary  K tokens that summarise each group             ┘
            └ decoder layers (unmodified): skipped tokens bypass the FFN
               └ KV cache: skipped tokens leave after prefill
                  └ text

Read the mechanisms first: `tokens`, `plan`, `select`, `merge`, `summary`, `skip_ffn`, `kv_cache`. `planning`
and `layout` make a plan; `arrival`, `reduction` and `attach` run a model with it; `cost` predicts FLOPs and
bytes; `baselines` are simpler methods of equal cost. `distillation` lets
the full-token model teach, `adapters` saves and loads adapters, `engine` answers many requests at once, and
`exporting` makes one folder for other programs. `registry` explains how another package adds a criterion or a
merge.

Method: "Skip-Vision: Efficient and Scalable Acceleration of Vision-Language Models via Adaptive
Token Skipping", ICCV 2025, https://arxiv.org/abs/2503.21817.
"""

from skipvision.adapters.files import read_adapter
from skipvision.adapters.save_load import load_adapter, save_adapter
from skipvision.anatomy.checks import DECODED_KEYWORD
from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.cost.flops import measure_flops
from skipvision.cost.predict import Cost, predict_cost
from skipvision.distillation import SoftTargets, as_teacher
from skipvision.engine import Completion, Engine, Request, Sampling
from skipvision.errors import (
    AdapterError,
    ConfigError,
    DataError,
    GenerationError,
    InputError,
    ResourceError,
    SkipVisionError,
    UnsupportedModelError,
)
from skipvision.exporting.load import from_exported
from skipvision.exporting.write import export
from skipvision.merge import register_merge
from skipvision.plan import TokenPlan, TokenRole
from skipvision.select import register_criterion

__all__ = [
    "DECODED_KEYWORD",
    "AdapterError",
    "Attachment",
    "Completion",
    "ConfigError",
    "Cost",
    "DataError",
    "Engine",
    "GenerationError",
    "InputError",
    "Request",
    "ResourceError",
    "Sampling",
    "SkipConfig",
    "SkipVisionError",
    "SoftTargets",
    "TokenPlan",
    "TokenRole",
    "UnsupportedModelError",
    "as_teacher",
    "attach",
    "attachment_of",
    "export",
    "from_exported",
    "load_adapter",
    "measure_flops",
    "predict_cost",
    "read_adapter",
    "register_criterion",
    "register_merge",
    "save_adapter",
]
