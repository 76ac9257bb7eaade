"""Stage benign."""

from rnp.cli.benign import benign
from stages.stage import main

if __name__ == "__main__":
    main(benign)
