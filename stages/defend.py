"""Stage defend."""

from rnp.cli.defend import defend
from stages.stage import run

if __name__ == "__main__":
    run(defend)
