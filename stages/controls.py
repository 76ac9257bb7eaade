"""Stage controls: run the control experiments."""

from rnp.cli.controls import controls
from stages.stage import main

if __name__ == "__main__":
    main(controls, "controls", prefixed=("unlearn", "recover", "prune"))
