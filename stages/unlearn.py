"""Stage unlearn."""

from rnp.cli.unlearn import unlearn
from stages.stage import run

if __name__ == "__main__":
    run(unlearn)
