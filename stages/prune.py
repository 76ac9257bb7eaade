"""Stage prune."""

from rnp.cli.prune import prune
from stages.stage import run

if __name__ == "__main__":
    run(prune)
