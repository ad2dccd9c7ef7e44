"""The package `tinker` that `baseten-loops-tinker` provides, unmodified, against `lockstep up`: a loop as its
users write it."""

import asyncio

import pytest
from up import MODEL, TIMEOUT, Up

tinker = pytest.importorskip("tinker")

WANTED = list(range(60, 90))
STEPS = 20


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    up = Up(tmp_path_factory.mktemp("tinker") / "data")
    yield up
    up.stop()


def datum(prompt, sequence, advantage):
    tokens = prompt + sequence.tokens
    zeros = [0.0] * (len(prompt) - 1)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "logprobs": tinker.TensorData(
                data=zeros + sequence.logprobs, dtype="float32", shape=[len(tokens) - 1]
            ),
            "advantages": tinker.TensorData(
                data=zeros + [advantage] * len(sequence.tokens), dtype="float32", shape=[len(tokens) - 1]
            ),
        },
    )


async def reinforce(url, steps):
    """The mean reward and the version of each step."""
    service = tinker.ServiceClient(base_url=url)
    training = await service.create_lora_training_client_async(MODEL, rank=8, seed=3, timeout=TIMEOUT)
    prompt, seen = [1, 40, 41], []
    for step in range(steps):
        sampling = await training.save_weights_and_get_sampling_client_async(f"step-{step}")
        drawn = await sampling.sample_async(
            prompt=tinker.ModelInput.from_ints(prompt),
            num_samples=96,
            sampling_params=tinker.SamplingParams(max_tokens=4, temperature=1.0, seed=1000 * step),
        )
        rewards = [sum(t in WANTED for t in s.tokens) / len(s.tokens) for s in drawn.sequences]
        mean = sum(rewards) / len(rewards)
        seen.append((mean, drawn.policy_version))
        data = [datum(prompt, s, r - mean) for s, r in zip(drawn.sequences, rewards)]
        passed = await training.forward_backward_async(data, "importance_sampling")
        stepped = await training.optim_step_async(tinker.AdamParams(learning_rate=3e-2))
        await passed.result_async(timeout=TIMEOUT)
        await stepped.result_async(timeout=TIMEOUT)
    saved = training.save_state("end").result(timeout=TIMEOUT)
    resumed = service.create_training_client_from_state_with_optimizer(saved.path)
    assert resumed.policy_version == steps
    return seen


def test_a_reinforcement_loop_raises_its_reward(up):
    seen = asyncio.run(reinforce(up.url, STEPS))
    assert [version for _, version in seen] == list(range(STEPS))
    first, last = (sum(reward for reward, _ in part) / 3 for part in (seen[:3], seen[-3:]))
    # 30 of 259 tokens are wanted, so chance is about 0.12.
    assert last > first + 0.2, seen
