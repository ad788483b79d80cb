"""Token ids given directly."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from awqc.calibration import all_tokens, load_tokens
from awqc.errors import CalibrationError

ROWS = torch.arange(24).view(4, 6)


@pytest.mark.parametrize(
    "calib",
    [
        ROWS,
        ROWS.to(torch.int32),
        ROWS.numpy().astype(np.uint16),
        ROWS.tolist(),
        list(ROWS),
        {"input_ids": ROWS},
        [{"input_ids": row} for row in ROWS.tolist()],
        [{"input_ids": ROWS[:2], "attention_mask": torch.ones(2, 6)}, {"input_ids": ROWS[2:]}],
        (row for row in ROWS),
        DataLoader([{"input_ids": row} for row in ROWS], batch_size=2),
    ],
    ids=[
        "tensor",
        "int32",
        "numpy",
        "lists",
        "rows",
        "dict",
        "records",
        "batches",
        "generator",
        "DataLoader",
    ],
)
def test_rows_of_one_length_stay_what_they_are(calib):
    found = load_tokens(calib, max_calib_seq_len=8)
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, ROWS)
    assert (found.samples, found.seq_len, found.tokens, found.dropped) == (4, 6, 24, 0)


def test_one_row_is_one_sample():
    for calib in (ROWS[0], ROWS[0].tolist()):
        assert torch.equal(load_tokens(calib).ids, ROWS[:1])


def test_rows_of_different_lengths_are_joined_and_cut():
    found = load_tokens([[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]], max_calib_seq_len=4)
    assert found.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert found.dropped == 2
    assert found.notes == (
        "3 rows were joined and cut into blocks of 4 tokens",
        "2 blocks of 4 tokens instead of 128: there are 10 tokens",
        "2 of 10 tokens were not used",
    )


def test_rows_longer_than_a_block_are_cut():
    found = load_tokens(ROWS, max_calib_seq_len=3, max_calib_samples=8)
    assert torch.equal(found.ids, ROWS.view(8, 3))
    assert found.notes == ("4 rows were joined and cut into blocks of 3 tokens",)


def test_padding_is_left_out():
    batch = {
        "input_ids": torch.tensor([[7, 8, 0, 0], [0, 4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]),
    }
    assert load_tokens(batch, max_calib_seq_len=5).ids.tolist() == [[7, 8, 4, 5, 6]]


def test_rows_beyond_those_asked_for_are_not_read():
    def endless():
        while True:
            yield torch.arange(6)

    found = load_tokens(endless(), max_calib_samples=3, max_calib_seq_len=6)
    assert found.ids.shape == (3, 6)
    assert found.notes == ("only 3 rows were read",)


def test_first_rows_are_taken_of_one_tensor():
    found = load_tokens(ROWS, max_calib_samples=2, max_calib_seq_len=8)
    assert torch.equal(found.ids, ROWS[:2])
    assert found.tokens + found.dropped == 18
    assert found.notes == ("only 3 rows were read", "6 of 18 tokens were not used")


def test_fingerprint_depends_on_ids_and_shape_only():
    first = load_tokens(ROWS)
    assert first.sha256 == load_tokens(ROWS.tolist()).sha256
    assert first.sha256 != load_tokens(ROWS.view(6, 4)).sha256
    assert first.sha256 != load_tokens(ROWS + 1).sha256
    assert first.sha256 == hashlib.sha256(b"4x6:" + struct.pack("<24q", *range(24))).hexdigest()


def test_all_tokens_joins_rows():
    assert torch.equal(all_tokens(ROWS), torch.arange(24))
    assert torch.equal(all_tokens(ROWS, max_tokens=7), torch.arange(7))


@pytest.mark.parametrize(
    ("calib", "options", "message"),
    [
        (
            [[1] * 5, [1] * 70],
            {"limit": 64, "max_calib_seq_len": 64},
            "calibration row 1 has 70 tokens, longer than the model's limit of 64: "
            "cut it into rows of at most 64 tokens",
        ),
        (
            ROWS,
            {"limit": 64},
            "max_calib_seq_len=512 is longer than the model's limit of 64 tokens: "
            "give max_calib_seq_len=64 or less",
        ),
        (
            ROWS,
            {"vocab_size": 20},
            "token id 20 in calibration row 3 is outside the model's vocabulary of 20 tokens: "
            "use the tokenizer that belongs to the model",
        ),
        (
            ROWS - 1,
            {},
            "token id -1 in calibration row 0 is negative: use the tokenizer that belongs to the model",
        ),
        (
            ROWS.float(),
            {},
            "item 0 of the Tensor given as calib holds torch.float32 values: token ids are integers",
        ),
        (
            ROWS.view(2, 2, 6),
            {},
            "item 0 of the Tensor given as calib has shape (2, 2, 6): "
            "token ids are (seq_len,) or (samples, seq_len)",
        ),
        (
            {"input_ids": ROWS, "attention_mask": ROWS[0]},
            {},
            "attention_mask of item 0 of the dict given as calib has shape (6,), its input_ids (4, 6)",
        ),
        ([ROWS[0], "text"], {}, "the list given as calib mixes token ids and text: give one or the other"),
        (ROWS, {"max_calib_samples": 0}, "max_calib_samples=0: give a positive number"),
        (ROWS, {"max_calib_seq_len": -1}, "max_calib_seq_len=-1: give a positive number"),
        (
            ROWS,
            {"split": "train"},
            "split='train': the Tensor given as calib has no splits, only a data set of the hub has",
        ),
        (
            ROWS,
            {"column": "text"},
            "column='text': item 0 of the Tensor given as calib is of type Tensor and has no columns",
        ),
        (
            torch.empty(0, 6, dtype=torch.int64),
            {},
            "no calibration tokens: the Tensor given as calib is empty; "
            "give text or token ids, or calib='self'",
        ),
        (
            [[]],
            {},
            "no calibration tokens: the list given as calib is empty; "
            "give text or token ids, or calib='self'",
        ),
        (
            [],
            {},
            "no calibration tokens: the list given as calib is empty; "
            "give text or token ids, or calib='self'",
        ),
    ],
)
def test_refused(calib, options, message):
    with pytest.raises(CalibrationError) as error:
        load_tokens(calib, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("calib", [None, 3, b"bytes", [None], [3.5], [[3.5]]])
def test_unknown_forms_are_named(calib):
    with pytest.raises(CalibrationError, match=r"(of type|is None|torch\.float32)"):
        load_tokens(calib)
