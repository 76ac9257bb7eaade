"""Stage poison: make the trigger and poison the training set."""

from rnp.cli.poison import poison
from stages.stage import main

if __name__ == "__main__":
    main(poison, family="attacks")
