"""PEFT directories of any type: config and header, and the base's names for the changed tensors."""
