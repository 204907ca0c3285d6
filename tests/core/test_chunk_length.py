"The length of a chunk follows from the caches that Linux describes."

import pytest

from sgd_sai.internals.chunks import chunk_for_cache, last_level_cache


def describe(folder, caches):
    "Write what Linux writes: `caches` has (level, size, cores that share it)."
    for level, size, cores in caches:
        for core in cores:
            cache = folder / f"cpu{core}" / "cache" / f"index{level}"
            cache.mkdir(parents=True)
            (cache / "level").write_text(f"{level}\n")
            (cache / "size").write_text(f"{size}\n")
            (cache / "shared_cpu_list").write_text(",".join(map(str, cores)) + "\n")


def test_two_groups_of_cores_have_two_caches(tmp_path):
    private = [(2, "1024K", [core]) for core in range(4)]
    describe(tmp_path, [*private, (3, "32768K", [0, 1]), (3, "16M", [2, 3])])
    assert last_level_cache({0, 1, 2, 3}, tmp_path) == (32 + 16) * 2**20
    assert last_level_cache({1}, tmp_path) == 32 * 2**20


def test_a_range_of_cores_counts_once(tmp_path):
    describe(tmp_path, [(3, "8192K", [0, 1, 2])])
    for core in range(3):
        (tmp_path / f"cpu{core}" / "cache" / "index3" / "shared_cpu_list").write_text("0-2\n")
    assert last_level_cache({0, 1, 2}, tmp_path) == 8 * 2**20


@pytest.mark.parametrize("content", [None, "", "unknown", "3"])
def test_a_system_that_does_not_say(tmp_path, content):
    if content is not None:
        describe(tmp_path, [(3, content, [0])])
    assert last_level_cache({0}, tmp_path) is None


@pytest.mark.parametrize(
    "cache, cores, threads, entries",
    [
        (2**25, 2, 2, 2**21),  # a quarter of 32 MB at four bytes
        (2**23, 4, 4, 2**20),  # shorter ones would cost more calls than the cache saves
        (2**25, 2, 1, 2**20),  # half of the cores, half of the cache
        (2**25, 2, 8, 2**21),  # more threads than cores have no more cache
        (48 * 2**20, 8, 8, 2**21),  # rounded down to a power of two
        (2**30, 64, 64, 2**24),  # no longer than this
        (None, 8, 8, 2**21),
    ],
)
def test_a_quarter_of_the_share_of_the_cache(cache, cores, threads, entries):
    assert chunk_for_cache(cache, cores, threads) == entries
