"""Images of requests, from data URLs and allowed hosts."""
