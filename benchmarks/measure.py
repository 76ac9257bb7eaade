"""What one process measures: `python -m benchmarks.measure NAME '{"argument": ...}'` prints its
numbers as JSON on the last line.

Loading is not timed; `peak` is the most memory of the whole process and `loaded` what it had before
the work, in bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarks import poison as poisoning
from benchmarks.measure_defenses import defense, detector, rnp_ours
from benchmarks.measure_published import rnp_published
from benchmarks.measure_scaling import scale_prune, scale_recover, scale_subject, scale_unlearn
from benchmarks.measure_training import train_ours, train_plain, training_steps
from benchmarks.subprocesses import Result
from rnp.training.malloc import keep_freed_pages


def poison(name: str) -> Result:
    keep_freed_pages()
    return poisoning.measure(name)


MEASURES: dict[str, Callable[..., Result]] = {
    measure.__name__: measure
    for measure in (
        train_plain,
        train_ours,
        training_steps,
        rnp_ours,
        rnp_published,
        defense,
        detector,
        poison,
        scale_subject,
        scale_unlearn,
        scale_recover,
        scale_prune,
    )
}


if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))))
