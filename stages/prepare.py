"""Stage prepare."""

from rnp.cli.prepare import prepare
from stages.stage import run

if __name__ == "__main__":
    run(prepare)
