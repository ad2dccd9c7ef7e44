"""Reinforcement learning over HTTP, with nothing but `pip install baseten-loops` (Python 3.12):

    lockstep up --data-dir DATA            # prints: ready http://127.0.0.1:8000
    python examples/python/reinforcement.py http://127.0.0.1:8000

The reward is the share of tokens with an even id. Nobody needs that, but it can be checked
without a tokenizer, it begins at about one half with any model, and it can be learned.
"""

import argparse
import statistics

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="where `lockstep up` is ready")
    parser.add_argument("--model", help="by default the first that is offered")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="samples a prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def reward(tokens):
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def datum(prompt, sequence, advantage):
    """Predicts each token from those before it; only the sampled ones have an advantage."""
    tokens = prompt + sequence.tokens
    before = len(prompt) - 1

    def per_position(values, dtype):
        return TensorData(data=values, dtype=dtype, shape=[len(values)])

    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": per_position(tokens[1:], "int64"),
            "logprobs": per_position([0.0] * before + sequence.logprobs, "float32"),
            "advantages": per_position([0.0] * before + [advantage] * len(sequence.tokens), "float32"),
        },
    )


def main():
    args = arguments()
    service = ServiceClient(base_url=args.url)
    model = args.model or service.get_server_capabilities().supported_models[0].model_name
    training = service.create_lora_training_client(model, rank=args.rank, seed=1)
    prompts = [[10 + p, 20 + p, 30 + p] for p in range(args.prompts)]
    params = SamplingParams(max_tokens=args.max_tokens)

    for step in range(args.steps):
        sampling = training.save_weights_and_get_sampling_client("policy")
        data, rewards, versions = [], [], set()
        for prompt in prompts:
            drawn = sampling.sample(ModelInput.from_ints(prompt), args.group, params)
            group = [reward(sequence.tokens) for sequence in drawn.sequences]
            baseline = statistics.mean(group)
            data += [datum(prompt, s, r - baseline) for s, r in zip(drawn.sequences, group)]
            rewards += group
            versions.add(drawn.policy_version)
        assert versions == {step}, f"sampled from version {versions} at step {step}"
        passed = training.forward_backward(data, "importance_sampling")
        stepped = training.optim_step(AdamParams(learning_rate=args.learning_rate))
        norm = stepped.result().metrics["grad_norm"]
        print(f"version {step:3}  reward {statistics.mean(rewards):.3f}  loss {passed.result().loss:+.4f}  grad {norm:.3f}")
        sampling.close()

    training.save_state("trained").result()
    print(f"policy version {training.policy_version}, saved as bt://loops:{training.run_id}/weights/trained")
    training.close()


if __name__ == "__main__":
    main()
