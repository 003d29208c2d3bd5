"""Published systems that are more than a formula: a file or a folder each."""
