"""What several jobs share: configuration, paths, job folders, files and signals."""
