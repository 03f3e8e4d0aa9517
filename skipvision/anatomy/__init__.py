"""What differs between Hugging Face model families: where images, masks, positions and layers are."""
