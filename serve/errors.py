"""What a client can do wrong, or meet, beyond the library's errors."""
