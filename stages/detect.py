"""Stage detect."""

from rnp.cli.detect import detect
from stages.stage import run

if __name__ == "__main__":
    run(detect)
