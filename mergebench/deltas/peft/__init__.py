"""PEFT's directories, whatever their type: config and header, and the base's names for what they change."""
