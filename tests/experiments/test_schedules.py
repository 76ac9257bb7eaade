import pytest

from experiments.schedules import COLUMNS, changed, summary
from rnp.errors import UserError


def test_changes_are_parameters_of_the_preset():
    params = changed(
        "demo", ["train.epochs=3", "train.augment.flip=false", "model.arch=resnet18"], seed=2
    )
    assert (
        params["train"]["epochs"] == 3
        and params["train"]["augment"]["flip"] is False
        and params["model"]["arch"] == "resnet18"
    )
    assert (
        params["seed"] == 2 and params["train"]["lr"] == changed("demo", [], seed=0)["train"]["lr"]
    )


@pytest.mark.parametrize(
    "change, named",
    [
        ("train.epoch=3", "epoch"),
        ("train.epochs=many", "epochs"),
        ("trian.lr=1", "trian"),
        ("train.lr=0.1,0.2", "one value"),
    ],
)
def test_a_change_that_no_command_takes_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        changed("demo", [change], seed=0)


def test_the_summary_has_the_most_accurate_first():
    row = dict.fromkeys(COLUMNS, "") | {"attack_success_rate": "1", "core_seconds": "90"}
    rows = [
        row | {"changes": changes, "clean_accuracy": accuracy}
        for changes, accuracy in (("", "0.8"), ("a=1", "0.9"), ("a=1", "0.8"))
    ]
    assert list(summary(rows))[2:] == [
        "| a=1 | 2 | 0.850 | 1.000 | 2 |",
        "| none | 1 | 0.800 | 1.000 | 2 |",
    ]
