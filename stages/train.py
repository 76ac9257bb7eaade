"""Stage train."""

from rnp.cli.train import train
from stages.stage import run

if __name__ == "__main__":
    run(train)
