"""Baselines, costs, metrics and reports of the held-out comparison."""
