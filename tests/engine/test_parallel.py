"""How the rows of a global batch are divided among processes. Real runs are in tests/test_train_ddp.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from config.schema import TrainConfig
from engine.parallel import SingleProcess

SIZES = st.integers(1, 48)


def rows_of(rank, world, batch_size, accumulation):
    process = SingleProcess()
    process.rank, process.world_size = rank, world
    return process.rows(
        TrainConfig(dataset_path=[("a", "b")], batch_size=batch_size, max_steps=9, warmup_iters=1,
                    gradient_accumulation_steps=accumulation)
    )  # fmt: skip


@given(SIZES, SIZES, st.integers(1, 8))
def test_every_row_is_computed_once(batch_size, accumulation, world):
    if batch_size * accumulation % world:
        with pytest.raises(UserError, match=f"= {batch_size * accumulation}, does not divide by {world}"):
            rows_of(0, world, batch_size, accumulation)
        return
    computed = []
    for rank in range(world):
        rows = rows_of(rank, world, batch_size, accumulation)
        assert 1 <= rows.step <= batch_size and len(rows) * rows.step == rows.stop - rows.start
        computed += [first + i for first in rows for i in range(rows.step)]
    assert computed == list(range(batch_size * accumulation))


def test_one_process_takes_the_micro_batches_as_configured():
    assert list(rows_of(0, 1, 12, 3)) == [0, 12, 24]


def test_the_micro_batch_is_as_large_as_it_may_be():
    assert rows_of(1, 2, 12, 1) == range(6, 12, 6)
    assert rows_of(1, 2, 12, 3) == range(18, 36, 9)
