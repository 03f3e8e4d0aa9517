"""Parts of `benchmarks.engines` and of `benchmarks.gpu` that compare engines.

    workload ──> folder with model, prompts and images
                   │
    processes ──> worker ──> native_engine | vllm_engine | openvino_engine

Each engine runs in a process of its own, by the Python of its own environment. `worker` and the modules of
engines import nothing of this project that the engine's environment may lack.
"""
