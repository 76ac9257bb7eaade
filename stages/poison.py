"""Stage poison."""

from rnp.cli.poison import poison
from stages.stage import run

if __name__ == "__main__":
    run(poison)
