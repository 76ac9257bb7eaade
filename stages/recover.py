"""Stage recover."""

from rnp.cli.recover import recover
from stages.stage import main

if __name__ == "__main__":
    main(recover)
