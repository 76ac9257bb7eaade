"""Stage train."""

from rnp.cli.train import train
from stages.stage import main

if __name__ == "__main__":
    main(train)
