"""The images of requests, from data URLs and allowed hosts.

Reading order: `config`, `urls` (strict parsing), `addresses` (which hosts are public or allowed), `fetch`,
`images` (limits, and decoding).
"""
