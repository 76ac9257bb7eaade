"""Stage prepare: split a data set between attacker, defender and test."""

from rnp.cli.prepare import prepare
from stages.stage import main

if __name__ == "__main__":
    main(prepare, "data", family="datasets")
