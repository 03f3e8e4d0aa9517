"""The cost of a captioning job per row does not depend on the number of its rows: memory, metadata, reads."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import tracemalloc

import pyarrow.parquet as pq
import pytest

from pipelines.caption import keys, manifest
from pipelines.caption.config import InputSection, ScalingSection
from pipelines.caption.folder import FILES_AT_ONCE, CaptionShards
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.caption.rows import MANIFEST_SCHEMA, Caption
from pipelines.caption.stream import packed, streamed


@pytest.fixture
def small_pieces(monkeypatch):
    """Hashes are spilled, and manifests divided, after a few rows."""
    monkeypatch.setattr(keys, "_RUN", 200)
    monkeypatch.setattr(manifest, "_PART_SHARDS", 3)


def write_rows(folder, names):
    lines = (json.dumps({"id": name, "image": f"{number}.png"}) for number, name in enumerate(names))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return InputSection(source=str(folder / "rows.jsonl"))


@pytest.mark.slow
def test_the_memory_of_listing_does_not_depend_on_the_number_of_rows(small_pieces, tmp_path):
    def peak(rows):
        settings = write_rows(tmp_path, (f"row {number}" for number in range(rows)))
        gc.collect()
        tracemalloc.start()
        try:
            write_manifest(settings, tmp_path / "manifest", 50, print)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(500)  # imports and caches
    # Threads of earlier tests allocate now and then, and are traced, too.
    few, many = (min(peak(rows) for _ in range(3)) for rows in (3000, 9000))
    assert many - few < 20 * 2**10  # hashes in memory would be 48 KB


def test_a_shard_of_a_larger_manifest_is_read_with_as_little_metadata(small_pieces, tmp_path):
    write_manifest(write_rows(tmp_path, map(str, range(100))), tmp_path / "manifest", 10, print)
    listed = Manifest(tmp_path / "manifest")
    assert [row.key for row in listed.shard(7, 1)] == [str(number) for number in range(70, 80)]
    parts = sorted((tmp_path / "manifest").glob("*.parquet"))
    assert [pq.read_metadata(part).num_row_groups for part in parts] == [3, 3, 3, 1]


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    write_manifest(write_rows(tmp_path, map(str, range(25))), tmp_path / "manifest", 10, print)
    table = pq.read_table(tmp_path / "manifest/000000.parquet", schema=MANIFEST_SCHEMA)
    pq.write_table(table, tmp_path / "manifest.parquet", row_group_size=10)
    old, new = Manifest(tmp_path / "manifest.parquet"), Manifest(tmp_path / "manifest")
    assert (old.rows, old.shards, old.rows_in(2)) == (new.rows, new.shards, new.rows_in(2)) == (25, 3, 5)
    assert old.shard(2, 1) == new.shard(2, 1)


def test_repeated_keys_are_found_among_those_on_the_disk(small_pieces, tmp_path):
    names = [*(f"row {number}" for number in range(1500)), "row 3", "row 1400", "row 3", "row 3#2"]
    facts = write_manifest(write_rows(tmp_path, names), tmp_path / "manifest", 50, print)
    rows = list(Manifest(tmp_path / "manifest").all_rows(1))
    assert [row.key for row in rows[:1500]] == names[:1500]
    assert [row.key for row in rows[1500:]] == ["row 3#3", "row 1400#2", "row 3#4", "row 3#2"]
    assert facts.problems == {"duplicate key": 3}
    assert not {"runs", "sorted", "again"} & {path.name for path in (tmp_path / "manifest").iterdir()}


def test_a_start_reads_no_texts_of_finished_captions(tmp_path):
    shards = CaptionShards(tmp_path, "parquet")
    shards.write(0, [Caption(f"row {number}", "a long text " * 50, output_tokens=2) for number in range(9)])
    read = shards.read(0, ("error_kind", "output_tokens"))
    assert read.column_names == ["error_kind", "output_tokens"]
    shutil.copy(shards.path(0), shards.path(2))
    assert shards.missing(4) == [1, 3]
    assert (shards.tally(4).rows, shards.tally(4).tokens["output_tokens"]) == (18, 36)


def test_a_start_waits_for_several_files_at_once(tmp_path):
    together = threading.Barrier(FILES_AT_ONCE)

    class OnSlowStorage(CaptionShards):
        def read(self, shard, columns=None):
            together.wait(20)  # breaks if the files are read one after the other
            return super().read(shard, columns)

    shards = OnSlowStorage(tmp_path, "parquet")
    for shard in range(2 * FILES_AT_ONCE):
        shards.write(shard, [Caption(f"row {shard}", "a text", output_tokens=2)])
    assert shards.tally(2 * FILES_AT_ONCE).rows == 2 * FILES_AT_ONCE


class Same:
    def __init__(self, work):
        self.work = work

    def __call__(self, batch):
        return batch


def twenty_blocks(batch):
    for number in range(20):
        yield packed((batch["shard"][0].as_py(), number))


@pytest.mark.slow
def test_the_job_keeps_nothing_of_blocks_that_are_done(local_ray):
    """Ray Data would keep statistics of each, 2 KB in the end: 12 GB for 10⁸ rows."""
    scaling = ScalingSection(workers=1, readers=1)

    stream = streamed(range(12), twenty_blocks, (Same, None), scaling, {"CPU": 1, "GPU": 0}, 4)
    counts, values = {}, set()
    for value in stream:
        values.add(value)
        if len(values) in (80, 200):
            gc.collect()
            counts[len(values)] = len(gc.get_objects())
    assert len(values) == 240
    assert counts[200] - counts[80] < 2 * 120  # the values themselves, and less than one object for each
