"""Stage evaluate: measure every model."""

from rnp.cli.evaluate import evaluate
from stages.stage import main

if __name__ == "__main__":
    main(evaluate, "evaluate")
