"""`python -m mergebench`."""

from mergebench.cli import command

if __name__ == "__main__":
    command()
