"""Stage evaluate."""

from rnp.cli.evaluate import evaluate
from stages.stage import run

if __name__ == "__main__":
    run(evaluate)
