"""Stage recover."""

from rnp.cli.recover import recover
from stages.stage import run

if __name__ == "__main__":
    run(recover)
