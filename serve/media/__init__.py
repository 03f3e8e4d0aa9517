"""The images of requests, from data URLs and allowed hosts."""
