"""Ray itself: joining or starting a cluster, and what its nodes offer."""
