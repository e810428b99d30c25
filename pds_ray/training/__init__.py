"""Training with torch: one deterministic loop, and the retrieval model that evaluation trains on
it.
"""
