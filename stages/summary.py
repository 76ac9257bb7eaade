"""What `dvc repro` prints at its end."""

from __future__ import annotations

from pathlib import Path

PAGE = Path("reports/report.html")
SCORES = {
    "clean accuracy": "clean_accuracy",
    "attack success rate": "attack_success_rate",
    "robust accuracy": "robust_accuracy",
}


def summary(seconds: dict[str, float], work: str, scores: dict) -> None:
    """Print the scores before and after, the cost, and where the report is.

    `seconds` are those of each stage, `work` the passes of an image that RNP took, in words.
    """
    if scores:
        print_scores(scores)
    print(f"\nseconds     {', '.join(f'{stage} {value:.1f}' for stage, value in seconds.items())}")
    if work:
        print(f"RNP         {work} passes of an image")
    print(f"report      {PAGE}")


def print_scores(scores: dict) -> None:
    print(f"\n{'':22}{'before':>8}{'after':>8}")
    for title, key in SCORES.items():
        print(f"{title:22}{percent(scores[f'{key}_before'])}{percent(scores[key])}")
    print(f"{'DER':22}{'':8}{scores['der']:8.3f}")
    print(f"{'neurons pruned':22}{'':8}{scores['neurons_pruned']:8} of {scores['neurons']}")
    if not scores["gate"]:
        print(
            f"\n!!! the backdoor is NOT real: {scores['gate_reason']}; the numbers above say"
            " nothing about the defense !!!"
        )


def percent(share: float) -> str:
    return f"{share:8.1%}"
