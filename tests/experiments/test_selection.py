"""The summary of the rules of selection, by hand."""

from experiments.selection import COLUMNS, summary


def row(rule, attack, regret, gate="true"):
    numbers = dict.fromkeys(COLUMNS, "0") | {
        "clean_accuracy_before": "0.9",
        "clean_accuracy": "0.88",
        "attack_success_rate": "0.1",
    }
    return numbers | {"rule": rule, "attack": attack, "gate": gate, "regret": str(regret)}


def test_the_summary_by_hand():
    """The half width of the interval of two values is 12.706 times half of what lies between
    them.
    """
    bad, good = (
        [row("a", "x", 0.1), row("a", "y", 0.3)],
        [row("b", "x", -0.1), row("b", "z", 0.9, gate="false")],
    )
    _, _, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in summary([*bad, *good])
    )
    assert first[:3] == ["b", "1", "0.020"] and first[5:7] == ["-0.100 ± 0.000", "-0.100"]
    assert second[:4] == ["a", "2", "0.020", "0.100"] and second[5:7] == ["0.200 ± 1.271", "0.300"]
