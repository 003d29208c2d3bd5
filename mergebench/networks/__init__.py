"""A model in memory: built from its files, given texts in batches, its states read."""
