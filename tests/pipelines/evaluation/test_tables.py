"""Markdown tables of results have aligned columns and no bars inside cells."""

from pipelines.evaluation.tables import markdown_table


def test_a_table_aligns_its_columns_and_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["task", "score", "verdict"], [["a|b", "1.0", "within"]], left=(0, 2)) == (
        "| task | score | verdict |\n| --- | ---: | --- |\n| a/b | 1.0 | within |"
    )
