"""Search a recipe's parameters: choose points, merge them, measure them, and report the best."""
