"""Stage report: write the page."""

from rnp.cli.report import report
from stages.stage import main

if __name__ == "__main__":
    main(report)
