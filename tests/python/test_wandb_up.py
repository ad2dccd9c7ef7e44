"""`lockstep up --wandb-project`: what the Python client trains reaches Weights & Biases, read back from the
offline run."""

import os
import pathlib
import subprocess
import sys
import time

import httpx
import pytest
from up import MODEL, TIMEOUT, Up

pytest.importorskip("wandb")
from offline_run import records, rows  # noqa: E402

from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData  # noqa: E402


def children(up):
    """The Python processes that log."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found += [entry.name] if parent == up.process.pid and b"wandb.init" in (entry / "cmdline").read_bytes() else []
        except (OSError, IndexError, ValueError):
            pass
    return found


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert true()


def test_what_any_client_trains_is_streamed_until_its_run_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    up = Up(tmp_path / "data", "--wandb-project", "lockstep", "--wandb-entity", "team")
    try:
        service = ServiceClient(base_url=up.url)
        training = service.create_lora_training_client(
            MODEL, rank=4, seed=1, timeout=TIMEOUT, ready_timeout=TIMEOUT, sampler_timeout=TIMEOUT
        )
        inputs = {"target_tokens": TensorData(data=[40, 41, 2], dtype="int64", shape=[3])}
        data, losses = [Datum(model_input=ModelInput.from_ints([1, 40, 41]), loss_fn_inputs=inputs)], []
        for _ in range(3):
            losses.append(training.forward_backward(data).result(timeout=TIMEOUT).loss)
            training.optim_step(AdamParams(learning_rate=1e-3)).result(timeout=TIMEOUT)
        wait_until(lambda: children(up))
        training.close()
        wait_until(lambda: len([row for row in rows(tmp_path) if "step" in row]) == 3 if logs(tmp_path) else False)
        assert httpx.delete(f"{up.url}/v1/loops/runs/{training.run_id}", timeout=TIMEOUT).status_code == 200
        wait_until(lambda: not children(up))
    finally:
        up.stop()
    logged = rows(tmp_path)
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx(losses, rel=1e-6)
    steps = [row for row in logged if "step" in row]
    assert [row["policy_version"] for row in steps] == [1, 2, 3]
    assert all(row["learning_rate"] == 1e-3 and row["tokens_per_second"] > 0 for row in steps)
    kinds = {record.WhichOneof("record_type"): record for record in records(tmp_path)}
    assert (kinds["run"].run.project, kinds["run"].run.entity) == ("lockstep", "team")
    assert kinds["run"].run.run_id.endswith(training.run_id)
    assert kinds["exit"].exit.exit_code == 0, "the run was finished"


def logs(directory):
    return list(directory.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_the_package_the_service_says_so_at_once(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    command = [os.environ["LOCKSTEP"], "up", "--data-dir", str(tmp_path / "data"), "--http", "127.0.0.1:0"]
    command += ["--model", f"{MODEL}={os.environ['LOCKSTEP_TINY_MODEL']}", "--wandb-project", "lockstep"]
    without = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(command, env=without, capture_output=True, text=True, timeout=60)
    assert said.returncode != 0 and "pip install wandb" in said.stderr
