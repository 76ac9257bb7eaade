"""Stage recover: minimize it again, one mask per neuron."""

from rnp.cli.recover import recover
from stages.stage import main

if __name__ == "__main__":
    main(recover, "recover")
