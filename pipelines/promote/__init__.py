"""The promotion job: an MLflow alias moves only if the evidence allows it."""
