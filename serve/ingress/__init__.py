"""The HTTP replica.

request ─► middleware (body limit, log) ─► guard (keys, open requests) ─► routes ─► ingress
             ingress ─► catalogue (which model?) ─► preparation (images, template) ─► dispatch (an engine)
"""
