"""Columns of the training set, made of whole Arrow arrays and not row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def lists(values: pa.Array, length: int) -> pa.Array:
    """`values` in lists of `length`."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), values)


def conversations(prompts: pa.Array, answers: pa.Array) -> pa.Array:
    """Each prompt's messages with its answer, the assistant's, behind them."""
    import pyarrow as pa

    messages = prompts.flatten()
    roles = pa.array(["assistant"]).take(pa.array(np.zeros(len(answers), dtype=np.int8)))
    said = pa.StructArray.from_arrays([roles, answers], ["role", "content"])
    ends = (prompts.value_lengths().fill_null(0).to_numpy() + 1).cumsum(dtype=np.int32)
    is_answer = np.zeros(len(messages) + len(said), dtype=bool)
    is_answer[ends - 1] = True
    order = np.empty(len(is_answer), dtype=np.int64)
    order[is_answer] = len(messages) + np.arange(len(said))
    order[~is_answer] = np.arange(len(messages))
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays([messages, said]).take(pa.array(order)))


def where(mask: NDArray[np.bool_], batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of `batch` where `mask`; the batch itself, not a copy, where that is all of them."""
    import pyarrow as pa

    return batch if mask.all() else batch.filter(pa.array(mask))
