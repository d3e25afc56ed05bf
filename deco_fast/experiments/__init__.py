"""Ablations: many trainings of equal seeds and budget, evaluated alike, in one table."""
