"""Training with torch: one deterministic loop, and the retrieval model of evaluations on it."""
