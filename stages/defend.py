"""Stage defend: repair the backdoored model by another defense."""

from rnp.cli.defend import defend
from stages.stage import main

if __name__ == "__main__":
    main(defend, family="defenses")
