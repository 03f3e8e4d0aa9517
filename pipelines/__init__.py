"""The jobs on Ray and MLflow, one room per job, and rooms for what jobs share."""
