"""What `tests/client.rs` streamed to Weights & Biases, read back from the offline run."""

import json
import os
import pathlib
import struct

import pytest

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2  # noqa: E402

if "LOCKSTEP_WANDB" not in os.environ:
    pytest.skip("tests/run sets LOCKSTEP_WANDB", allow_module_level=True)
PROOF = pathlib.Path(os.environ["LOCKSTEP_WANDB"])


def records():
    """The records of an offline run: LevelDB's log format behind a header of 7 bytes. A record is
    cut into chunks (CRC u32, length u16, kind u8: whole, first, middle, last) that never cross a
    block of 32 KiB."""
    (log,) = PROOF.glob("wandb/offline-run-*/run-*.wandb")
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


def test_the_offline_run_has_every_loss_and_version():
    expected = json.loads((PROOF / "expected.json").read_text())
    rows, config, finished = [], {}, False
    for record in records():
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert (record.run.project, record.run.display_name) == ("lockstep", "proof")
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif kind == "exit":
            finished = record.exit.exit_code == 0
    assert config["run"] == expected["run"]
    assert config["lora"]["rank"] == 4
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(expected["losses"], rel=1e-6)
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3]
    assert finished, "the run was not finished"
