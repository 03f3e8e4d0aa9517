from __future__ import annotations

from pipelines.data.rows import TrainingRow, pick_rows


def test_tasks_get_equal_shares_of_the_picked_rows():
    rows = [TrainingRow(f"{task}{i}", (), (), task) for task in "abc" for i in range(10)]
    assert [row.key for row in pick_rows(rows, 6)] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert len(pick_rows(rows, 100)) == 30
    assert pick_rows(rows, 0) == []
