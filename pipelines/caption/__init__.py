"""The captioning job on Ray Data: inputs, stages, output shards, resume and report."""
