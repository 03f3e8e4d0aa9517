"""The HTTP replica.

request ─► middleware (body limit, log) ─► guard (keys, open requests) ─► routes ─► ingress
             ingress ─► catalogue (which model?) ─► preparation (images, template) ─► dispatch (an engine)

Reading order: `routes` (with `head` and `invalid_body`), `middleware`, `guard`, `ingress`, `catalogue`,
`preparation` (with `rendering`, the chat template), `dispatch`, `health`.
"""
