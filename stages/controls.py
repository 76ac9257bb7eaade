"""Stage controls."""

from rnp.cli.controls import controls
from stages.stage import run

if __name__ == "__main__":
    run(controls)
