"""Stage train: train the backdoored model."""

from rnp.cli.train import train
from stages.stage import main

if __name__ == "__main__":
    main(train, "model", "train")
