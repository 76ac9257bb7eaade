"""How well each rule chooses what to prune: its effectiveness against that of an oracle, for one finished run.

Run it in the folder of a finished `dvc repro evaluate`; rows are added to the table. Every rule sees the defence set alone and
works on the same masks. The oracle goes down the ranking and takes the point with the highest DER on test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rnp.cli.check import read_params
from rnp.cli.evaluate import head
from rnp.cli.rows import machine, written
from rnp.io import load_defence_set, load_images, load_mask, load_model, put_rows, read_json
from rnp.masks import prune, ranking
from rnp.metrics import Scores, defence_effectiveness, score
from rnp.prune import Prune, grid
from rnp.types import ImageSet

RULES = ("skip", "val_drop", "knee", "outlier", "number")
COLUMNS = ("preset", "attack", "seed", "gate", "rule", "clean_accuracy_before", "attack_success_rate_before", "clean_accuracy",
           "attack_success_rate", "der", "regret", "neurons_pruned", "neurons", "n_clean", "n_triggered", "device", "torch")
KEY = ("preset", "attack", "seed", "rule")
FEW = 1000  # test images, and as many triggered ones, on which the oracle looks for its point


def rows(folder: Path) -> list[dict[str, object]]:
    params = read_params(folder / "params.yaml")
    victim, _, _ = load_model(folder / "models/backdoored.safetensors")
    mask, clean = load_mask(folder / "models/recovered/mask.safetensors"), load_defence_set(folder / "data/defence").both
    tests, attacked = load_images(folder / "data/test"), load_images(folder / "data/triggered/test")
    attack = read_json(folder / "data/triggered/attack.json")

    some = head(tests, FEW), head(attacked, FEW)

    def measure(model: torch.nn.Module, images: tuple[ImageSet, ImageSet] = (tests, attacked)) -> Scores:
        return score(model, *images, attack["target_label"], precision="auto")

    before, order = measure(victim), ranking(mask)
    most = int(params["prune"]["max_fraction"] * len(order))
    few = measure(victim, some)
    counts = {n: defence_effectiveness(few, measure(prune(victim, order[:n]), some)) for n in grid(most)}
    best = max(counts, key=counts.__getitem__)
    found = {"oracle": (measure(prune(victim, order[:best])), best)}
    for rule in RULES:
        pruned = Prune(**params["prune"] | {"rule": rule, "precision": "auto"})(victim, mask, clean)
        found[rule] = measure(pruned.model), pruned.chosen.pruned
    effect = {rule: defence_effectiveness(before, after) for rule, (after, _) in found.items()}
    common = {"preset": params["preset"], "attack": params["poison"]["attack"], "seed": params["seed"],
              "gate": str(attack["gate"]).lower(), "neurons": sum(map(len, mask.values())), "n_clean": len(tests),
              "n_triggered": len(attacked), "device": machine(), "torch": torch.__version__,
              "clean_accuracy_before": before.clean_accuracy.value, "attack_success_rate_before": before.attack_success_rate.value}
    return [written(common | {"rule": rule, **after.flat(), "der": effect[rule], "regret": effect["oracle"] - effect[rule],
                              "neurons_pruned": count}, COLUMNS) for rule, (after, count) in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file that takes the rows, in place of older ones of the same run")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    new = rows(arguments.folder)
    put_rows(arguments.table, new, COLUMNS, KEY)
    for row in new:
        print(f"{row['rule']:10} CA {row['clean_accuracy']}  ASR {row['attack_success_rate']}  DER {row['der']}  regret {row['regret']}"
              f"  {row['neurons_pruned']} neurons")


if __name__ == "__main__":
    main()
