"""The summary of a population: ROC, false alarms, backdoors named, by hand."""

from benchmarks.population import summary


def rows(kind, values, least, right=()):
    return [{"kind": kind, "gate": "" if kind == "benign" else "true", "detector": "some", "score": str(value),
             "named": str(value >= least).lower(), "label_correct": str(i in right).lower()} for i, value in enumerate(values)]


def test_the_summary_by_hand():
    """Of 2 x 4 pairs 7 are in the right order, three of the four lie above .575; who failed the gate does not count."""
    benign, bad = rows("benign", [0.1, 0.6], 0.5), rows("backdoored", [0.3, 0.7, 0.8, 0.9], 0.5, right=(1, 3))
    failed = rows("backdoored", [0.0], 0.5)[0] | {"gate": "false"}
    _, _, line = summary([*benign, *bad, failed])
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["some", "2", "4", "0.875"] and cells[5:] == ["0.75", "2", "1", "3", "2"]
    low, high = map(float, cells[4].split(" to "))
    assert 0.5 <= low <= 0.875 <= high == 1
