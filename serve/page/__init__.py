"""The page at ``/``: a client of the API in the browser, made of static files that `routes` serves."""
