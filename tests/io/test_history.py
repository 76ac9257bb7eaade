"""A history is flushed row by row, read back the same, and shown to listeners."""

from rnp.io.history import History, read_trajectory
from rnp.types import Epoch

ROWS = [
    Epoch(
        epoch=i // 2,
        step=i,
        loss=-0.5 * i,
        accuracy=0.25,
        learning_rate=1e-3,
        gradient_norm=0.0,
        extra={"share/0": 0.5, "share/1": 0.25 * i},
    )
    for i in range(3)
]


def test_every_row_is_flushed_and_read_back(path):
    with History(path) as history:
        for i, row in enumerate(ROWS):
            history(row)
            assert len(path.read_text().splitlines()) == i + 2, "flushed at once"
    assert read_trajectory(path) == ROWS
    assert isinstance(read_trajectory(path)[0].step, int)


def test_listeners_get_every_row_also_without_a_file(monkeypatch):
    rows = []
    monkeypatch.setattr(History, "listeners", [rows.append])
    with History(None) as history:
        for row in ROWS:
            history(row)
    assert rows == [row.row() for row in ROWS]
