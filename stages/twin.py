"""Stage twin."""

from rnp.cli.twin import twin
from stages.stage import run

if __name__ == "__main__":
    run(twin)
