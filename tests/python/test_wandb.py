"""What `tests/client.rs` streamed to Weights & Biases, read back from the offline run."""

import json
import os
import pathlib

import pytest

pytest.importorskip("wandb")
from offline_run import records  # noqa: E402

if "LOCKSTEP_WANDB" not in os.environ:
    pytest.skip("tests/run sets LOCKSTEP_WANDB", allow_module_level=True)
PROOF = pathlib.Path(os.environ["LOCKSTEP_WANDB"])


def test_the_offline_run_has_every_loss_and_version():
    expected = json.loads((PROOF / "expected.json").read_text())
    rows, config, finished = [], {}, False
    for record in records(PROOF):
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
