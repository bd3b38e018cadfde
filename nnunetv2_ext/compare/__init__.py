"""Comparison of finished trainings: scores, paired differences, learning curves, the cases that differ most."""
