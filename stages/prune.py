"""Stage prune: prune the neurons whose masks stayed low."""

from rnp.cli.prune import prune
from stages.stage import main

if __name__ == "__main__":
    main(prune, "prune")
