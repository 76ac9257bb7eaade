"""Stage report."""

from rnp.cli.report import report
from stages.stage import main

if __name__ == "__main__":
    main(report)
