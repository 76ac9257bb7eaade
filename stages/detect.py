"""Stage detect: recover triggers, detect the target label and triggered images."""

from rnp.cli.detect_stage import detect
from stages.stage import main

if __name__ == "__main__":
    main(detect, "detect", prefixed=("unlearn",))
