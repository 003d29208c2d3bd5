"""Searching a recipe's parameters: which points to try, their merges, what is measured of them, what was found."""
