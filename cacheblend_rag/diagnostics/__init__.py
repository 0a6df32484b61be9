"""Seeing what a blend does and where the time goes."""
