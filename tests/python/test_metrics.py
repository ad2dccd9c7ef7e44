"""The page /metrics, and the log as JSON with each request's trace."""

import json
import re

import httpx
import pytest
from up import MODEL, TIMEOUT, Up

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics")
    keys = directory / "keys"
    keys.write_text("ada key-of-ada-0123456789\nbob key-of-bob-0123456789\n")
    up = Up(directory / "data", "--api-keys", str(keys), "--log-format", "json")
    yield up
    up.stop()


def read(up, **headers):
    """The page's values by name and labels."""
    answer = httpx.get(f"{up.url}/metrics", headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def bearer(who):
    return {"Authorization": f"Api-Key key-of-{who}-0123456789"}


@pytest.fixture(scope="module")
def run(up):
    service = ServiceClient(base_url=up.url, api_key="key-of-ada-0123456789")
    training = service.create_lora_training_client(
        MODEL, rank=4, seed=1, timeout=TIMEOUT, ready_timeout=TIMEOUT, sampler_timeout=TIMEOUT
    )
    inputs = {"target_tokens": TensorData(data=[40, 41, 2], dtype="int64", shape=[3])}
    for _ in range(3):
        training.forward_backward([Datum(model_input=ModelInput.from_ints([1, 40, 41]), loss_fn_inputs=inputs)])
        training.optim_step(AdamParams()).result(timeout=TIMEOUT)
    sampling = training.save_weights_and_get_sampling_client("served")
    sampling.sample(ModelInput.from_ints([1]), 2, SamplingParams(max_tokens=3))
    sampling.close(), training.close()
    return training.run_id


def test_the_page_counts_what_was_done(up, run):
    page = read(up)
    of_run = lambda name: page[f'lockstep_run_{name}{{run="{run}"}}']
    assert (of_run("step"), of_run("policy_version"), of_run("queued_operations")) == (3, 3, 0)
    ended = lambda kind: page[f'lockstep_operations_total{{operation="{kind}",outcome="done"}}']
    assert (ended("forward_backward"), ended("optim_step"), ended("save_weights_for_sampler")) == (3, 3, 1)
    assert page["lockstep_trained_tokens_total"] == 9
    assert 1 <= page["lockstep_sampled_tokens_total"] <= 6 and page["lockstep_samples_total"] == 1
    assert page["lockstep_activations_total"] >= 1 and page["lockstep_stage_failures_total"] == 0
    assert (page["lockstep_up"], page["lockstep_nodes"], page["lockstep_runs"]) == (1, 1, 1)
    step = "/v1/loops/runs/{run}/trainer/optim_step"
    assert page[f'lockstep_http_requests_total{{method="POST",route="{step}",status="202"}}'] == 3
    assert page[f'lockstep_http_request_seconds_count{{route="{step}"}}'] == 3
    assert page["lockstep_http_body_bytes"] == 0


def test_each_reader_sees_what_is_theirs(up, run):
    named = f'lockstep_run_step{{run="{run}"}}'
    assert named in read(up, **bearer("ada"))
    assert named not in read(up, **bearer("bob")), "another's run"
    wrong = httpx.get(f"{up.url}/metrics", headers={"Authorization": "Bearer nobody-has-this-key"})
    assert wrong.status_code == 401
    passed_on = httpx.get(f"{up.url}/metrics", headers={"X-Forwarded-For": "203.0.113.9"})
    assert passed_on.status_code == 401, "a proxy's caller is not this machine"


def test_the_log_follows_a_request_into_the_coordinator(up, run):
    url = f"{up.url}/v1/loops/runs/{run}/trainer"
    headers = bearer("ada") | {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    answer = httpx.post(f"{url}/optim_step", json={"adam_params": {}}, headers=headers, timeout=TIMEOUT)
    operation = answer.json()["operation_id"]
    request_id = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", request_id)
    polled = httpx.get(f"{url}/operations/{operation}", headers=bearer("ada"), timeout=TIMEOUT)
    assert polled.json()["status"] == "done" and polled.headers["x-request-id"] != request_id

    lines = [json.loads(line) for line in up.log.read_text().splitlines()]
    assert all(line["level"] and line["timestamp"] for line in lines), "every part writes JSON alone"
    (answered,) = [line for line in lines if line.get("span", {}).get("request_id") == request_id]
    assert answered["span"]["trace_id"] == TRACE and answered["status"] == 202
    assert answered["span"]["route"] == "/v1/loops/runs/{run}/trainer/optim_step"
    (ended,) = [line for line in lines if line.get("trace_id") == TRACE]
    assert ended["target"] == "lockstep::operation" and ended["request_id"] == request_id
    assert (ended["operation"], ended["outcome"], f'{ended["run"]}-op-{ended["seq"]}') == ("optim_step", "done", operation)
