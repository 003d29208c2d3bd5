"""Kinds of deltas to train that belong to no system: one file a kind."""
