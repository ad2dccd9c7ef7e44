"""The Python client `baseten-loops`, unmodified, against `lockstep up`."""

import os
import pathlib
import signal
import time
import uuid

import httpx
import pytest
from up import MODEL, TIMEOUT, Up

from baseten.loops import (
    AdamParams,
    CheckpointTarget,
    Datum,
    ModelInput,
    RemoteOpError,
    SamplingParams,
    ServiceClient,
    TensorData,
)

RANK = 4

# Sampler and trainer run one forward; they differ in the order of a batch's rows at most. The
# README promises 1e-4.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    up = Up(tmp_path_factory.mktemp("sdk") / "data")
    yield up
    up.stop()


@pytest.fixture
def service(up):
    return ServiceClient(base_url=up.url)


def make_trainer(service, seed=1):
    return service.create_lora_training_client(
        MODEL, rank=RANK, seed=seed, timeout=TIMEOUT, ready_timeout=TIMEOUT, sampler_timeout=TIMEOUT
    )


@pytest.fixture
def training(service):
    training = make_trainer(service)
    yield training
    training.close()


def datum(tokens, **inputs):
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def floats(values):
    return TensorData(data=list(values), dtype="float32", shape=[len(values)])


def ints(values, shape=None):
    return TensorData(data=list(values), dtype="int64", shape=shape or [len(values)])


SEQUENCES = [[1, 40, 41, 42, 43, 44, 2], [1, 90, 91, 92, 2], [1, 7, 6, 5, 4, 3]]


def batch():
    return [datum(tokens[:-1], target_tokens=ints(tokens[1:])) for tokens in SEQUENCES]


def train(training, steps=1, rate=1e-2):
    losses = []
    for _ in range(steps):
        passed = training.forward_backward(batch())
        stepped = training.optim_step(AdamParams(learning_rate=rate))
        losses.append(passed.result(timeout=TIMEOUT).loss)
        stepped.result(timeout=TIMEOUT)
    return losses


def scores(training, tokens):
    """The trainer's log-probability of each token after the first."""
    result = training.forward([datum(tokens[:-1], target_tokens=ints(tokens[1:]))]).result(timeout=TIMEOUT)
    return result.loss_fn_outputs[0]["logprobs"].tolist()


def furthest(a, b):
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b))


def test_a_loop_learns_and_every_sample_says_its_version(training):
    losses = train(training, steps=6)
    assert losses[-1] < losses[0]
    assert training.policy_version == 6
    sampling = training.save_weights_and_get_sampling_client("learned")
    prompt = [1, 40, 41]
    drawn = sampling.sample(ModelInput.from_ints(prompt), 3, SamplingParams(max_tokens=8, seed=5))
    assert drawn.policy_version == 6
    for sequence in drawn.sequences:
        reported = scores(training, prompt + sequence.tokens)[len(prompt) - 1 :]
        assert furthest(sequence.logprobs, reported) < LOGPROB_TOLERANCE
    again = sampling.sample(ModelInput.from_ints(prompt), 3, SamplingParams(max_tokens=8, seed=5))
    assert [s.tokens for s in again.sequences] == [s.tokens for s in drawn.sequences]
    train(training)
    assert sampling.sample(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=1)).policy_version == 6
    training.save_weights_and_get_sampling_client("later").close()
    assert sampling.sample(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=1)).policy_version == 7
    sampling.close()


REFUSED = {
    "token": ([1, 2, 999], {}, "data[0].model_input"),
    "negative token": ([1, -2], {}, "data[0].model_input.chunks[0].tokens[1]"),
    "target": ([1, 2], {"target_tokens": ints([2, 999])}, "data[0].loss_fn_inputs.target_tokens"),
    "length": ([1, 2], {"target_tokens": ints([2])}, "data[0].loss_fn_inputs.target_tokens"),
    "shape": ([1, 2], {"target_tokens": ints([2, 3], [3])}, "data[0].loss_fn_inputs.target_tokens"),
    "name": ([1, 2], {"target_tokans": ints([2, 3])}, "data[0].loss_fn_inputs.target_tokans"),
    "too long": ([1] * 513, {}, "data[0].model_input"),
}


@pytest.mark.parametrize("tokens, inputs, field", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_submit_by_its_place(training, tokens, inputs, field):
    begun = time.monotonic()
    with pytest.raises(httpx.HTTPStatusError) as refused:
        training.forward_backward([datum(tokens, **inputs)]).result(timeout=TIMEOUT)
    assert refused.value.response.status_code == 422
    assert f"`{field}`" in str(refused.value)
    assert refused.value.response.headers["X-Baseten-Error-Source"] == "06"
    assert time.monotonic() - begun < 10, "a refusal is not retried"
    assert training.policy_version == 0
    train(training)


def test_one_key_is_one_operation(up, training):
    headers = {"Idempotency-Key": uuid.uuid4().hex, "X-Run-Id": training.run_id}
    url = f"{up.url}/v1/loops/runs/{training.run_id}/trainer"
    with httpx.Client(headers=headers, timeout=TIMEOUT) as raw:
        body = {"adam_params": {"learning_rate": 0.0}, "run_id": training.run_id}
        first, second = (raw.post(f"{url}/optim_step", json=body) for _ in range(2))
        assert (first.status_code, second.json()) == (202, first.json())
        other = raw.post(f"{url}/optim_step", json={"adam_params": {"learning_rate": 1.0}})
        assert other.status_code == 422 and "`key`" in other.json()["error"]
        done = raw.get(f"{url}/operations/{first.json()['operation_id']}").json()
        assert done["status"] == "done" and done["result"]["metrics"]["step"] == 1
    assert training.policy_version == 1


def test_a_retried_sample_gets_the_first_answer(up, training):
    train(training)
    training.save_weights_and_get_sampling_client("served").close()
    url = f"{up.url}/v1/loops/samplers/{training.run_id}/serve/sample"
    body = {"prompt": [1, 40], "n": 2, "max_tokens": 8, "temperature": 1.5}
    with httpx.Client(headers={"X-Min-Policy-Version": "1"}, timeout=TIMEOUT) as raw:
        draw = lambda key: raw.post(url, json=body, headers={"Idempotency-Key": key})
        first, second = draw("a"), draw("a")
        assert first.status_code == 200 and first.headers["x-trainers-policy-version"] == "1"
        assert second.content == first.content
        others = {draw(f"b{i}").content for i in range(4)}
        assert len(others | {first.content}) > 1, "without a seed another request draws anew"
        changed = raw.post(url, json=body | {"n": 1}, headers={"Idempotency-Key": "a"})
        assert changed.status_code == 422


def test_a_version_that_is_not_there_is_waited_for_and_then_asked_again(up, training):
    url = f"{up.url}/v1/loops/samplers/{training.run_id}/serve/sample"
    begun = time.monotonic()
    answer = httpx.post(
        url, json={"prompt": [1], "max_tokens": 1}, headers={"X-Min-Policy-Version": "1"}, timeout=60.0
    )
    assert answer.status_code == 408 and "X-Baseten-Error-Source" not in answer.headers
    assert 20 < time.monotonic() - begun < 32


def test_checkpoints_are_listed_and_downloaded(service, training, tmp_path):
    train(training, steps=2)
    training.save_state("whole").result(timeout=TIMEOUT)
    training.save_weights_for_sampler("adapter").result(timeout=TIMEOUT)
    listed = {(c.checkpoint_id, c.target) for c in service.list_checkpoints(training.run_id)}
    assert listed == {("whole", CheckpointTarget.trainer), ("adapter", CheckpointTarget.sampler)}
    got = training.download_checkpoint(
        name="adapter", target=CheckpointTarget.sampler, dest_dir=str(tmp_path / "adapter")
    )
    files = sorted(p.name for p in pathlib.Path(got.dest_dir).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]

    page = training.get_checkpoint_archive_url(name="adapter", target=CheckpointTarget.sampler)
    file = next(f for f in page.presigned_urls if f.relative_file_name.endswith(".safetensors"))
    whole = httpx.get(file.url)
    assert len(whole.content) == file.size_bytes
    part = httpx.get(file.url, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, whole.content[8:16])
    assert part.headers["Content-Range"] == f"bytes 8-15/{file.size_bytes}"
    beyond = httpx.get(file.url, headers={"Range": f"bytes={file.size_bytes}-"})
    assert beyond.status_code == 416
    forged = httpx.URL(file.url)
    for change in ({"signature": "0" * 64}, {"expires": "99999999999"}):
        assert httpx.get(forged.copy_merge_params(change)).status_code == 403
    assert httpx.get(forged.copy_with(path=forged.path.replace("model.safe", "x.safe"))).status_code == 403


def test_a_run_begins_where_another_was_saved(service, training):
    train(training, steps=3)
    path = training.save_state("half").result(timeout=TIMEOUT).path
    want = scores(training, SEQUENCES[0])
    for make, version in [
        (service.create_training_client_from_state, 0),
        (service.create_training_client_from_state_with_optimizer, 3),
    ]:
        other = make(path)
        assert (other.policy_version, other.run_id != training.run_id) == (version, True)
        assert furthest(scores(other, SEQUENCES[0]), want) < LOGPROB_TOLERANCE
        other.close()


def test_a_lost_coordinator_is_a_delay(up, training):
    train(training)
    os.kill(up.parts()["coordinator"], signal.SIGKILL)
    losses = train(training, steps=3)
    assert len(losses) == 3 and training.policy_version == 4
    sampling = training.save_weights_and_get_sampling_client("after")
    os.kill(up.parts()["coordinator"], signal.SIGKILL)
    drawn = sampling.sample(ModelInput.from_ints([1, 40]), 1, SamplingParams(max_tokens=4))
    assert drawn.policy_version == 4
    sampling.close()


def test_a_restarted_service_knows_everything(up, service, training):
    train(training, steps=2)
    sampling = training.save_weights_and_get_sampling_client("kept")
    draw = lambda: sampling.sample(ModelInput.from_ints([1, 40]), 2, SamplingParams(max_tokens=6, seed=3))
    before = draw()
    page = training.get_checkpoint_archive_url(name="kept", target=CheckpointTarget.sampler)
    # In flight while everything dies.
    passed, stepped = training.forward_backward(batch()), training.optim_step(AdamParams())
    up.kill()
    up.start()
    passed.result(timeout=TIMEOUT)
    stepped.result(timeout=TIMEOUT)
    assert training.policy_version == 3
    after = draw()
    assert (after.policy_version, [s.tokens for s in after.sequences]) == (
        2,
        [s.tokens for s in before.sequences],
    )
    assert httpx.get(page.presigned_urls[0].url).status_code == 200, "signed by a key that is kept"
    assert [c.checkpoint_id for c in service.list_checkpoints(training.run_id)] == ["kept"]
    sampling.close()


def test_a_failed_operation_is_raised_with_its_class(training):
    with pytest.raises(RemoteOpError) as failed:
        training.load_state(f"bt://loops:{training.run_id}/weights/absent").result(timeout=TIMEOUT)
    assert failed.value.error_class == "KeyError"
    assert "absent" in str(failed.value)


def test_local_mode_needs_no_control_plane(up):
    service = ServiceClient.local(trainer_url=up.url, sampler_url=up.url)
    training = service.create_lora_training_client(MODEL, rank=RANK, timeout=TIMEOUT, ready_timeout=TIMEOUT)
    train(training, steps=2)
    assert training.policy_version == 2
    fresh = service.create_lora_training_client(MODEL, rank=RANK + 1, timeout=TIMEOUT, ready_timeout=TIMEOUT)
    assert fresh.policy_version == 0 and fresh.get_info().lora_rank == RANK + 1
    training.close(), fresh.close()
    sampling = service.create_sampling_client(base_model=MODEL, timeout=TIMEOUT, ready_timeout=TIMEOUT)
    assert len(sampling.compute_logprobs(ModelInput.from_ints([1, 2, 3]))) == 3
    sampling.close()


def test_foreign_pages_and_unknown_routes_are_refused(up):
    assert httpx.get(f"{up.url}/v1/loops/capabilities", headers={"Host": "evil.example"}).status_code == 403
    page = httpx.post(f"{up.url}/v1/loops/sessions", headers={"Origin": "https://evil.example"})
    assert page.status_code == 403
    for method, path in [
        ("GET", "/v1/loops/runs/run-9999/trainer/policy_version"),
        ("POST", "/v1/loops/runs/nothing/trainer/optim_step"),
        ("GET", "/v1/loops/runs/run-1/trainer/operations/0123456789abcdef"),
        ("GET", "/v1/loops/checkpoints/checkpoint-99/files"),
    ]:
        answer = httpx.request(method, up.url + path, json={} if method == "POST" else None)
        assert answer.status_code == 404, path
        assert answer.headers["X-Baseten-Error-Source"] == "06", f"{path} would be retried for an hour"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keyed")
    keys = directory / "keys"
    keys.write_text("# who may train here\nada key-of-ada-0123456789\nbob key-of-bob-0123456789\n")
    up = Up(directory / "data", "--api-keys", str(keys))
    yield up
    up.stop()


def test_each_key_has_runs_and_checkpoints_of_its_own(keyed):
    with pytest.raises(httpx.HTTPStatusError) as refused:
        ServiceClient(base_url=keyed.url, api_key="key-of-eve-0123456789")
    assert refused.value.response.status_code == 401
    assert httpx.get(f"{keyed.url}/v1/loops/capabilities").status_code == 401
    assert httpx.get(f"{keyed.url}/policy_version").status_code == 404, "no local mode with keys"

    ada, bob = (ServiceClient(base_url=keyed.url, api_key=f"key-of-{who}-0123456789") for who in ("ada", "bob"))
    training = make_trainer(ada)
    train(training)
    sampling = training.save_weights_and_get_sampling_client("mine")
    state = training.save_state("state").result(timeout=TIMEOUT).path
    assert sampling.sample(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1)).policy_version == 1
    page = training.get_checkpoint_archive_url(name="mine", target=CheckpointTarget.sampler)
    assert httpx.get(page.presigned_urls[0].url).status_code == 200, "signed, so without a key"

    assert bob.list_checkpoints(training.run_id) == []
    with pytest.raises(ValueError):
        bob.create_training_client_from_state(state)
    other = make_trainer(bob)
    with pytest.raises((RemoteOpError, httpx.HTTPStatusError)):
        other.load_state(state).result(timeout=TIMEOUT)
    mine = [c.id for c in ada.list_checkpoints(training.run_id)]
    headers = {"Authorization": "Bearer key-of-bob-0123456789"}
    run, sampler = (f"{keyed.url}/v1/loops/{kind}" for kind in ("runs", "samplers"))
    with httpx.Client(headers=headers, timeout=TIMEOUT) as raw:
        body = {"prompt": [1], "max_tokens": 1}
        for answer in (
            raw.get(f"{run}/{training.run_id}/trainer/policy_version"),
            raw.post(f"{run}/{training.run_id}/trainer/optim_step", json={}),
            raw.get(f"{run}/{training.run_id}/trainer/operations/{training.run_id}-op-1"),
            raw.get(f"{keyed.url}/v1/loops/checkpoints/{mine[0]}/files"),
            raw.delete(f"{keyed.url}/v1/loops/checkpoints/{mine[0]}"),
        ):
            assert answer.status_code == 404, answer.url
        assert raw.post(f"{sampler}/{training.run_id}/serve/sample", json=body).status_code == 422
        path = {"X-Checkpoint-Path": f"bt://loops:{training.run_id}/sampler_weights/mine"}
        url = f"{sampler}/{other.run_id}/serve/sample"
        assert raw.post(url, json=body, headers=path).status_code == 422
        assert raw.post(url, json=body).status_code == 200, "a sampler of one's own"
        foreign = raw.post(
            f"{keyed.url}/v1/loops/trainers",
            json={"session_id": ada.session_id, "base_model": MODEL, "lora_rank": 2},
        )
        assert foreign.status_code == 422, "another's session"
    other.close(), training.close(), sampling.close()


def test_a_checkpoint_is_deleted_when_asked_and_when_its_time_is_up(up, service, training):
    train(training)
    for name, ttl in (("kept", None), ("gone", None), ("short", 2)):
        training.save_state(name, ttl_seconds=ttl).result(timeout=TIMEOUT)
    names = lambda: {c.checkpoint_id for c in service.list_checkpoints(training.run_id)}
    gone = next(c.id for c in service.list_checkpoints(training.run_id) if c.checkpoint_id == "gone")
    url = f"{up.url}/v1/loops/checkpoints/{gone}"
    assert [httpx.delete(url).status_code for _ in range(2)] == [200, 404]
    assert "gone" not in names()
    deadline = time.monotonic() + 20
    while "short" in names() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert names() == {"kept"}
