"""Stage report."""

from rnp.cli.report import report
from stages.stage import run

if __name__ == "__main__":
    run(report)
