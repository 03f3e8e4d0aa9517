"""The REST endpoint on Ray Serve: the protocol of OpenAI's chat completions, images included.

    client ── HTTP ──► Ingress (`api`: keys, media, templates; on CPUs)
                         └─► EngineReplica (`replica`: one engine, in a thread of its own) …, scaled apart

Read in this order: `config`, `schemas`, `replica`, `engine_stream`, `api`, `answers`, `app`; `media`,
`addresses`, `keys`, and `front` inside Ray's proxies, are what stands between the internet and the rest;
`page` is a client of it in the browser.
"""
