"""The benchmarks of merging and bytes measure whole rounds; rows of other versions stay."""

import pandas as pd
import pytest

from benchmarks import merge_rate, round_bytes
from benchmarks.versioned_rows import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_rows_of_other_versions_stay(tmp_path):
    path = tmp_path / "rows.csv"
    for version, value in (("before", 1), ("after", 2), ("after", 3)):
        write_rows(path, pd.DataFrame({"version": [version], "value": [value]}))
    rows = pd.read_csv(path)
    assert dict(zip(rows["version"], rows["value"], strict=True)) == {"before": 1, "after": 3}


def test_a_cache_spares_only_what_did_not_change(tmp_path):
    kept, sent = (
        round_bytes.Federation("HAPT MLP", 4, 3, folder, evaluation=True).run()
        for folder in (tmp_path, None)
    )
    assert kept[0]["must"] <= sent[0]["must"]
    assert sum(row["must"] for row in kept[1:]) < sum(row["must"] for row in sent[1:])
    assert all(row["surplus"] == 0 for row in [*kept, *sent])


def test_all_replies_are_merged_and_all_ways_are_timed_on_the_same_bytes():
    rows = merge_rate.measure_rates(replies=3, distinct=2, repetitions=2, features=64)
    assert {row["measure"] for row in rows} == {"ECLM", *merge_rate.MARKS}
    for row in rows:
        megabytes = row["replies"] * row["reply_mb"]
        assert row["mb_per_second"] * row["seconds"] == pytest.approx(megabytes)
