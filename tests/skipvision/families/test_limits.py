"""What transformers itself cannot do; a limit that has gone makes its test fail, and leaves the tables."""
