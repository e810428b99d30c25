"""The cost model of a run. A new stage of PDS has its row in phases.py and assumptions.yaml."""
