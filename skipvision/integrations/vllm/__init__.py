"""The plug-in of vLLM (≥ 0.32, < 0.34): images pruned by a SkipConfig of the server or of the request.

vLLM finds `plugin.register` by the entry point ``vllm.general_plugins`` and runs it in all its processes.

    request ─ `processing`   resolve the SkipConfig, put as many placeholders as the plan keeps
    worker  ─ `model`        encode, reduce (`reduction`), and set position ids (`positions`)

`settings` resolves SkipConfigs and refuses those that vLLM cannot run; `equal_cost` replaces skipped tokens
by retained ones. `structure` decides which models of vLLM's Transformers backend can
be pruned. `image_settings` takes an image's settings from one process to the other. `startup` applies the
server's settings before vLLM builds anything. `families` has the model classes. Only `plugin`, `startup`,
`processing`, `model`, `_compat` and the modules of `families` import vLLM.
"""
