"""The plug-in of vLLM (≥ 0.32, < 0.34): image pruning by a SkipConfig, for the server and for single requests.

vLLM finds `plugin.register` by the entry point ``vllm.general_plugins`` and loads it in each of its processes.

    request ─ `processing`   resolve the SkipConfig, put as many placeholders as the plan keeps
    worker  ─ `model`        encode, then `reduction` on the projector's output, and position ids by `positions`

`settings` resolves SkipConfigs and refuses what vLLM cannot run. `image_settings` takes an image's settings
from one process to the other. `startup` applies the server's settings before vLLM builds anything. `families` names the
supported models. Only `plugin`, `startup`, `processing`, `model` and the modules of `families` import vLLM.
"""
