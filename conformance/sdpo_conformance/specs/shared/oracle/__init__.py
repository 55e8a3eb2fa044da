"""Formulas that several specs share, in float64, each with its derivative beside it."""
