"""Stage prune."""

from rnp.cli.prune import prune
from stages.stage import main

if __name__ == "__main__":
    main(prune)
