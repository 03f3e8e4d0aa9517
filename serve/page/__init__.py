"""The page at ``/``: a client of the API in the browser, made of static files that `routes` serves.

Reading order: ``index.html``, ``page.js`` (events), ``settings.js``, ``api.js`` (requests), ``answer.js`` and
``overlay.js`` (one answer and its patches).
"""
