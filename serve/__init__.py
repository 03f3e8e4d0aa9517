"""The REST endpoint on Ray Serve: OpenAI's chat completions, images included.

    client ─ HTTP ─► Ray's proxy (`front` inside)
                       └─► ingress replica: keys, images, templates; on CPUs
                             └─► engine replicas: one engine each, in its own thread; scaled by load

Read in this order: `config`, `chat` (requests and responses), `ingress` (routes, admission, dispatch to
engines), `replica` (the engine's side), `app` (the deployments), `deploy`. `media` fetches images by URL,
`keys` checks API keys, `observe` measures, and `page` is a client in the browser.
"""
