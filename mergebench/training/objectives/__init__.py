"""Objectives that belong to no system: one file an objective."""
