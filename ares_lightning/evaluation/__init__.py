"""Robustness evaluation: evaluators, the verdict of every sample, what follows from them, and the report."""
