"""Class-incremental learning: an adapter for each task of a growing sequence, kept in a bank, retrieved (MOS)."""
