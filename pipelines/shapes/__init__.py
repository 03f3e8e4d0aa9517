"""The shapes data set and the small base model trained on it."""
