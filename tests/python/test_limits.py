"""What a key may have at once, as the Python client meets it."""

import time

import httpx
import pytest
from up import MODEL, TIMEOUT, Up

from baseten.loops import AdamParams, Datum, ModelInput, RemoteOpError, ServiceClient, TensorData

KEY = "key-of-{}-0123456789"


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    directory = tmp_path_factory.mktemp("limits")
    keys = directory / "keys"
    lines = [f"ada {KEY.format('ada')} disk=100KiB", f"bob {KEY.format('bob')} queued=2"]
    keys.write_text("\n".join(lines) + "\n")
    up = Up(directory / "data", "--api-keys", str(keys), "--limits", "runs=2")
    yield up
    up.stop()


def service(up, who):
    return ServiceClient(base_url=up.url, api_key=KEY.format(who))


def make(service):
    return service.create_lora_training_client(
        MODEL, rank=4, seed=1, timeout=TIMEOUT, ready_timeout=TIMEOUT, sampler_timeout=TIMEOUT
    )


def raw(up, who):
    return httpx.Client(headers={"Authorization": f"Api-Key {KEY.format(who)}"}, timeout=TIMEOUT)


def refused_at_once(call):
    begun = time.monotonic()
    with pytest.raises((httpx.HTTPStatusError, RemoteOpError)) as refused:
        call()
    assert time.monotonic() - begun < 20, "a refusal is not retried"
    return refused.value


def test_a_key_has_as_many_runs_as_it_may_and_deletes_one_for_another(up):
    ada = service(up, "ada")
    first, second = make(ada), make(ada)
    refused = refused_at_once(lambda: make(ada))
    assert refused.response.status_code == 403 and "2 runs" in str(refused)
    with raw(up, "ada") as client:
        listed = client.get(f"{up.url}/v1/loops/runs").json()["runs"]
        assert [run["id"] for run in listed] == [first.run_id, second.run_id]
        foreign = raw(up, "bob").delete(f"{up.url}/v1/loops/runs/{second.run_id}")
        assert foreign.status_code == 404, "another's"
        gone = [client.delete(f"{up.url}/v1/loops/runs/{second.run_id}").status_code for _ in range(2)]
        assert gone == [200, 404]
    third = make(ada)
    assert third.run_id not in (first.run_id, second.run_id)

    # 100 KiB have room for a state of rank 4 (its adapter with two moments), and not for many.
    saved = 0
    def save():
        nonlocal saved
        for saved in range(100):
            first.save_state(f"state-{saved}").result(timeout=TIMEOUT)
    refused = refused_at_once(save)
    assert saved > 0 and "`quota`: your checkpoints take" in str(refused)
    kept = ada.list_checkpoints(first.run_id)
    assert len(kept) == saved and sum(c.size_bytes for c in kept) <= 100 << 10
    first.close(), second.close(), third.close()


def test_operations_over_the_limit_wait_their_turn(up):
    training = make(service(up, "bob"))
    data = [
        Datum(
            model_input=ModelInput.from_ints([1, 40, 41]),
            loss_fn_inputs={"target_tokens": TensorData(data=[40, 41, 2], dtype="int64", shape=[3])},
        )
    ]
    futures = []
    for _ in range(6):
        futures += [training.forward_backward(data), training.optim_step(AdamParams())]
    for future in futures:
        future.result(timeout=TIMEOUT)
    assert training.policy_version == 6
    training.close()


@pytest.mark.parametrize("limits, named", [("runs=x", "`runs`"), ("bodies=1MiB", "48MiB"), ("a=1", '"a"')])
def test_a_wrong_limit_is_refused_at_start(tmp_path, limits, named):
    import os
    import subprocess

    command = [os.environ["LOCKSTEP"], "up", "--data-dir", str(tmp_path), "--limits", limits]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode != 0 and named in said.stderr
