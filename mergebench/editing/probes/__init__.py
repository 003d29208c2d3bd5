"""Probes: a linear classifier that reads a behaviour from a model's states."""
