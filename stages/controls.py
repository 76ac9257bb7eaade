"""Stage controls."""

from rnp.cli.controls import controls
from stages.stage import main

if __name__ == "__main__":
    main(controls)
