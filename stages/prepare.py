"""Stage prepare."""

from rnp.cli.prepare import prepare
from stages.stage import main

if __name__ == "__main__":
    main(prepare)
