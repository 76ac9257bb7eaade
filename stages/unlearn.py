"""Stage unlearn: maximize the model's error on the defense set."""

from rnp.cli.unlearn import unlearn
from stages.stage import main

if __name__ == "__main__":
    main(unlearn, "unlearn")
