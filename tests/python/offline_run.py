"""Reads what Weights & Biases leaves on disk with WANDB_MODE=offline."""

import json
import pathlib
import struct

from wandb.proto import wandb_internal_pb2


def records(directory):
    """The records of the one offline run below a directory: LevelDB's log format behind a header of 7 bytes. A record is
    cut into chunks (CRC u32, length u16, kind u8: whole, first, middle, last) that never cross a
    block of 32 KiB."""
    (log,) = pathlib.Path(directory).glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts = log.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def rows(directory):
    """What was logged, a dictionary for each call of `log`."""
    history = (record.history for record in records(directory) if record.WhichOneof("record_type") == "history")
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row.item} for row in history]
