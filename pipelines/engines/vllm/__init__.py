"""vLLM as an engine of jobs and replicas, with the plug-in that prunes visual tokens.

`settings` translates the project's settings into vLLM's, and `pruning` tells which SkipConfigs it can run.
`awaited` is the engine in an event loop, and `threaded` offers it to the threads of a job. `prompts`
processes images, `answers` converts outputs, and `meter` counts.
"""
