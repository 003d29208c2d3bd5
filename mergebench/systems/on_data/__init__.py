"""What models do on texts, for the merge methods that read it: made once, or for one merge."""

from mergebench.systems.on_data.statistics import make_statistics

__all__ = ["make_statistics"]
