"""Stage benign: train a benign model."""

from rnp.cli.benign import benign
from stages.stage import main

if __name__ == "__main__":
    main(benign, "model", "train")
