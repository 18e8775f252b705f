"""Scores of trained models, and the simple baselines they are to beat."""
