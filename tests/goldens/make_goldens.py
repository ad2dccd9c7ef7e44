"""Makes the reference values that tests/training_math.rs compares with.

    python make_goldens.py                      the committed files, beside this script
    python make_goldens.py --seed N --out DIR   the same from another seed

For each model family (families.py) it writes one directory: a small random model as Hugging Face
saves it (config.json, model.safetensors, tokenizer.json) and in GGUF (model.gguf), `golden.json`
with the calls, their data in the form of the HTTP dialect and their scalar results and what the
adapted model generates greedily, and `golden.safetensors` with the tensors:

    adapter.NAME              LoRA weights before the first step, B not zero
    logits.I                  of sequence I of `golden.json`, [N, vocab]
    CALL.logprobs.I           of datum I of a call
    CALL.top_k_token_ids.I, CALL.top_k_logprobs.I
    CALL.gradient.NAME        of the call's sum S, at the weights before the first step
    step.T.NAME               LoRA weights after T optimiser steps

and in `peft/` the same adapter as PEFT saves it (in float16 for every second family), except of a
mixture of experts.

NAME is PEFT's, without `base_model.model.`. The model is transformers', the adapter PEFT's (on a
mixture of experts families.py's own, because PEFT adapts no single expert), the gradients
autograd's; losses and Adam are written out below from their specification, because no library
has them in this form, and Adam is held against PyTorch's AdamW at each step. Every sequence runs
alone, unpadded, in float32.

Versions: tests/requirements.txt. The values depend on them and on the CPU in their last bits only.
"""

import argparse
import json
import pathlib

import peft
import torch
import transformers
from families import FAMILIES, ExpertLora, generate, has_gguf, make_model, write_gguf
from rounding import hold_as_bf16
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

COMMITTED_SEED = 20261124

ADAM = {
    "learning_rate": 2e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 1.0,
}

# Where weights are bf16. Gradients of two engines differ there by some thousandths, of which a tiny eps makes whole steps
# wherever a gradient is near zero; beside this one, elements of a clipped gradient are small.
BF16_EPS = 0.1

# Optimiser steps: the calls whose gradients they gather, and what differs from ADAM.
STEPS = [
    (["cross_entropy", "importance_sampling"], {}),
    (["cross_entropy_weights"], {"weight_decay": 0.1, "learning_rate": 5e-4}),
    ([], {}),
    (["importance_sampling"], {"grad_clip_norm": 0.01}),
    (["cross_entropy_k", "cross_entropy_sum"], {"grad_clip_norm": 0.0, "eps": 1e-8}),
    (["ppo", "cispo", "dro"], {}),
    (["dppo", "gspo", "stable_reinforce"], {"beta1": 0.8, "beta2": 0.99}),
    (["dpo"], {"weight_decay": 0.01}),
    (["dpo_sum", "stable_reinforce_plain"], {"grad_clip_norm": 0.5}),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=COMMITTED_SEED)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for number, (family, shape) in enumerate(FAMILIES.items()):
        directory = options.out / family
        directory.mkdir(parents=True, exist_ok=True)
        make_family(directory, dict(shape), options.seed + number)


def make_family(directory, shape, seed):
    random = torch.Generator().manual_seed(seed)
    lora, kept, dtype = shape.pop("lora"), shape.pop("calls", None), shape.pop("dtype", "f32")
    base = make_model(shape, random)
    base.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    characters = [chr(code) for code in range(ord("!"), ord("!") + shape["vocab_size"] - 1)] + ["Ġ"]
    make_tokenizer(characters).save(str(directory / "tokenizer.json"), pretty=False)
    if has_gguf(base.config):
        write_gguf(directory / "model.gguf", base, characters)
    if dtype == "bf16":
        hold_as_bf16(base)

    model, parameters = make_adapter(base, lora, random)
    tensors = {f"adapter.{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    golden = {
        "seed": seed,
        "dtype": dtype,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "lora": {"rank": lora["rank"], "alpha": lora["alpha"], "seed": 0, "targets": projections(lora)},
        "sequences": [tokens(n, shape["vocab_size"], random) for n in (1, 7, 26)],
    }
    if not isinstance(model, ExpertLora):
        save_as_peft(model, directory / "peft", half=seed % 2 == 1)
    for i, sequence in enumerate(golden["sequences"]):
        tensors[f"logits.{i}"] = model(torch.tensor([sequence])).logits[0].detach().clone()

    golden["generation"] = generate(model, shape["vocab_size"], torch.Generator().manual_seed(seed))

    calls = make_calls(model, shape["vocab_size"], random)
    calls = {name: call for name, call in calls.items() if kept is None or name in kept}
    for name, call in calls.items():
        result = evaluate(model, parameters, call)
        call["expected"] = {key: result[key] for key in ("loss", "loss_size", "active", "metrics")}
        tensors |= {f"{name}.{key}": value for key, value in result["outputs"].items()}
        tensors |= {f"{name}.gradient.{key}": value for key, value in result["gradients"].items()}
    golden["calls"] = calls

    golden["steps"] = []
    optimizer = Adam(parameters)
    steps = [(names, changes) for names, changes in STEPS if all(name in calls for name in names)]
    for number, (names, changes) in enumerate(steps, 1):
        adam = ADAM | changes
        if dtype == "bf16":
            adam["eps"] = BF16_EPS
        results = [evaluate(model, parameters, calls[name]) for name in names]
        norm = optimizer.step(results, adam)
        golden["steps"].append({"calls": names, "adam": adam, "grad_norm": norm})
        tensors |= {f"step.{number}.{key}": value.detach().clone() for key, value in parameters.items()}

    (directory / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "golden.safetensors")


def make_tokenizer(characters):
    """A tokenizer that only has to load: single characters, as a byte-level model spells them."""
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def projections(lora):
    targets = lora["targets"].split()
    return [target if target == "lm_head" else f"{target}_proj" for target in targets]


def make_adapter(base, lora, random):
    if base.config.model_type == "qwen3_moe":
        model = ExpertLora(base, projections(lora), lora, random)
        return model, model.parameters
    config = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=projections(lora),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).eval()
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default.", ".")
            bound = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.05
            with torch.no_grad():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=random) - 1) * bound)
            parameters[short] = parameter
    return model, parameters


def save_as_peft(model, directory, half):
    # Else it would save a head that carries an adapter as a whole, too.
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    if half:
        path = directory / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    # A set: its order changes from run to run.
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=1) + "\n")


def make_calls(model, vocab, random):
    """Calls by name. Their data covers what the losses specify, see the comments."""

    def text(n, **inputs):
        return datum(tokens(n, vocab, random), **inputs)

    def targets(*shape):
        return torch.randint(vocab, shape, generator=random)

    no_target = targets(11)
    no_target[[0, 4, 10]] = -100
    several = targets(9, 3)
    several[2, 1] = several[5] = -100
    weights_k = normal((9, 3), random)
    weights_k[3] = 0
    weights_k[4, 0] = 0

    def near(sequence, target, distance):
        """The log-probabilities of a policy near the model's."""
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0]
        n = len(sequence)
        return logits.log_softmax(-1)[torch.arange(n), target] + distance * normal((n,), random)

    def sampled(n, advantages, distance=0.3, **inputs):
        sequence, target = tokens(n, vocab, random), targets(n)
        scores = near(sequence, target, distance)
        return datum(sequence, target_tokens=target, logprobs=scores, advantages=advantages, **inputs)

    def sampled_batch(distance=0.3, **inputs):
        """Advantages of both signs and zero; mask; weights; one advantage for all."""
        some = normal((13,), random)
        some[[0, 5]] = 0
        return [
            sampled(13, some, distance, **{name: make(13) for name, make in inputs.items()}),
            sampled(8, normal((8,), random), distance, mask=(torch.rand(8, generator=random) > 0.4).float()),
            sampled(6, torch.tensor([1.25]), distance, weights=torch.tensor([1, 0, 0.5, 1, -1, 1.0])),
        ]

    def preference(n, **inputs):
        sequence, target = tokens(n, vocab, random), targets(n)
        return datum(sequence, target_tokens=target, ref_logprobs=near(sequence, target, 0.3), **inputs)

    def continuation(n):
        """Targets are the next tokens; the reference's score of the last one is never read."""
        sequence = tokens(n, vocab, random)
        scores = near(sequence, torch.tensor(sequence[1:] + [0]), 0.3)
        scores[-1] = torch.nan
        return datum(sequence, ref_logprobs=scores)

    some_zero = normal((12,), random)
    some_zero[[1, 2, 7]] = 0
    calls = {
        # No inputs: targets are the next tokens. One sequence has a single token.
        "cross_entropy": call(
            "cross_entropy", [text(5), text(1), text(23), text(1, target_tokens=targets(1))], top_k_logprobs=3
        ),
        # No target at some positions; weights that are zero, negative, fractional.
        "cross_entropy_weights": call(
            "cross_entropy",
            [
                text(11, target_tokens=no_target),
                text(8, target_tokens=targets(8), weights=torch.tensor([0, 0, 0, 1, 0.25, -0.5, 2, 1.0])),
                text(17, weights=(torch.rand(17, generator=random) > 0.5).float()),
                text(4, target_tokens=targets(4), weights=torch.zeros(4)),
            ],
        ),
        # Three targets a position.
        "cross_entropy_k": call(
            "cross_entropy",
            [text(9, target_tokens=several, weights=weights_k), text(6, target_tokens=targets(6, 3))],
            skip_token_normalization=True,
        ),
        # Advantages per position (some zero), one for all, none at all; mask; weights.
        "importance_sampling": call(
            "importance_sampling",
            [
                sampled(12, some_zero),
                sampled(7, torch.tensor([-0.75])),
                sampled(9, torch.zeros(9)),
                sampled(19, normal((19,), random), mask=(torch.rand(19, generator=random) > 0.4).float()),
                sampled(6, normal((6,), random), weights=torch.tensor([1, 0, 0.5, 1, -1, 1.0])),
            ],
        ),
        "cross_entropy_sum": call(
            "cross_entropy",
            [text(14, weights=normal((14,), random)), text(3)],
            skip_token_normalization=True,
        ),
    }
    # Below, the data are drawn in this order: a new call goes to the end, and leaves the others as
    # they are.
    low, high = (lambda n: torch.full((n,), 0.9)), (lambda n: 1.1 + torch.rand(n, generator=random))
    calls["ppo"] = call("ppo", sampled_batch(clip_low_threshold=low, clip_high_threshold=high))
    calls["cispo"] = call(
        "cispo", sampled_batch(), config={"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}
    )
    calls["dro"] = call("dro", sampled_batch(), config={"beta": 0.4, "score_inactive": 1})
    # Probabilities are near 0.01 here, and move less.
    calls["dppo"] = call(
        "dppo",
        sampled_batch(),
        config={"dppo_mask_high": 0.001, "dppo_mask_low": 0.002, "adv_tau": 0.5, "kl_tau": 0.05},
    )
    counted = lambda n: (torch.rand(n, generator=random) > 0.5).float()
    calls["gspo"] = call(
        "gspo",
        sampled_batch(sequence_ratio_mask=counted) + [sampled(4, torch.ones(4), sequence_ratio_mask=torch.zeros(4))],
        config={"clip_low_threshold": 0.95, "clip_high_threshold": 1.02},
    )
    calls["stable_reinforce"] = call("stable_reinforce", sampled_batch(0.8), config={"kl_coeff": 0.1})
    calls["stable_reinforce_plain"] = call("stable_reinforce", sampled_batch(0.8), skip_token_normalization=True)
    # Weights; next tokens as targets; a pair of which nothing is active.
    calls["dpo"] = call(
        "dpo",
        [
            preference(12, weights=(torch.arange(12) > 4).float()),
            preference(9, weights=normal((9,), random)),
            continuation(7),
            continuation(15),
            preference(3, weights=torch.zeros(3)),
            preference(5, weights=torch.zeros(5)),
        ],
        config={"beta": 0.5, "label_smoothing": 0.1},
    )
    calls["dpo_sum"] = call("dpo", [preference(6), preference(11)], skip_token_normalization=True)
    return calls


def call(loss_fn, data, skip_token_normalization=False, top_k_logprobs=0, config=None):
    loss = {"loss_fn": loss_fn, "config": config or {}}
    loss |= {"skip_token_normalization": skip_token_normalization, "top_k_logprobs": top_k_logprobs}
    return {"loss": loss, "data": data}


def datum(sequence, **inputs):
    wire = {
        name: {
            # NaN travels as null, as from the Python clients.
            "data": [None if value != value else value for value in tensor.flatten().tolist()],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for name, tensor in inputs.items()
    }
    chunks = [{"type": "encoded_text", "tokens": sequence}]
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": wire}


DEFAULTS = {
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "dro": {"beta": 0.05},
    "dppo": {"dppo_mask_high": 0.2, "dppo_mask_low": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "stable_reinforce": {"kl_coeff": 0.0},
}


def evaluate(model, parameters, call):
    """Loss, outputs and the gradient of S = Σ ℓ over active positions (of dpo: pairs)."""
    loss_fn = call["loss"]["loss_fn"]
    config = DEFAULTS.get(loss_fn, {}) | call["loss"]["config"]
    read, outputs = [], {}
    for i, example in enumerate(call["data"]):
        sequence = example["model_input"]["chunks"][0]["tokens"]
        inputs = {name: read_tensor(tensor) for name, tensor in example["loss_fn_inputs"].items()}
        log_probabilities = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        read.append(read_datum(loss_fn, config, log_probabilities, sequence, inputs))
        outputs[f"logprobs.{i}"] = read[-1]["reported"]
        if k := call["loss"]["top_k_logprobs"]:
            best = log_probabilities.detach().topk(k)
            outputs[f"top_k_token_ids.{i}"] = best.indices
            outputs[f"top_k_logprobs.{i}"] = best.values
    if loss_fn == "dpo":
        terms, active, metrics = preferences(config, read)
    else:
        parts = [position_losses(loss_fn, config, datum) for datum in read]
        terms = torch.cat([losses[datum["is_active"]] for datum, (losses, _) in zip(read, parts)])
        active = sum(int(datum["is_active"].any(1).sum()) for datum in read)
        metrics = {}
        if loss_fn != "cross_entropy":
            metrics = policy_gap(torch.cat([d["difference"][d["is_active"]] for d in read]).detach().double())
            metrics["entropy"] = float(torch.cat([d["entropy"][d["is_active"]] for d in read]).mean())
        for side in ("low", "high"):
            if all(side in sides for _, sides in parts):
                clipped = sum(int((sides[side] & d["is_active"]).sum()) for d, (_, sides) in zip(read, parts))
                metrics[f"clip_{side}_fraction"] = clipped / max(active, 1)
    total = terms.double().sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients)
    }
    is_sum = call["loss"]["skip_token_normalization"]
    divisor = 1 if is_sum else max(active, 1)
    return {
        "loss": total.item() / divisor,
        # Σ|ℓ|: what rounding errors are in proportion to. Terms of both signs cancel in Σℓ.
        "loss_size": terms.detach().double().abs().sum().item() / divisor,
        "active": active,
        "metrics": metrics,
        "outputs": outputs,
        "gradients": gradients,
        "is_sum": is_sum,
    }


def read_tensor(tensor):
    data = [float("nan") if value is None else value for value in tensor["data"]]
    return torch.tensor(data, dtype=getattr(torch, tensor["dtype"])).reshape(tensor["shape"])


def read_datum(loss_fn, config, log_probabilities, sequence, inputs):
    """What the losses are functions of; [N, K], K = 1 except for cross_entropy."""
    n = len(sequence)
    if "target_tokens" in inputs:
        target = inputs["target_tokens"].reshape(n, -1)
        has_target = target != -100
        shape = inputs["target_tokens"].shape
    else:
        target = torch.tensor(sequence[1:] + [0]).reshape(n, 1)
        has_target = torch.tensor([True] * (n - 1) + [False]).reshape(n, 1)
        shape = (n,)
    datum = {name: inputs[name].reshape(n, 1) for name in ("clip_low_threshold", "clip_high_threshold") if name in inputs}
    datum["lp"] = log_probabilities.gather(1, target.clamp(min=0))
    scores = log_probabilities.detach()
    datum["entropy"] = -(scores.exp() * scores).sum(1, keepdim=True)
    datum["weights"] = inputs.get("weights", torch.ones(shape)).reshape(target.shape)
    datum["is_active"] = has_target & (datum["weights"] != 0)
    q = inputs.get("ref_logprobs" if loss_fn == "dpo" else "logprobs", torch.zeros(n)).reshape(n, 1)
    # What is not read must not poison anything; torch would multiply it by zero.
    datum["q"] = torch.where(has_target, q, 0.0)
    datum["difference"] = datum["lp"] - datum["q"]
    scored = has_target
    if loss_fn not in ("cross_entropy", "dpo"):
        datum["advantages"] = inputs["advantages"].expand(n).reshape(n, 1)
        mask = inputs.get("mask", torch.ones(n)).reshape(n, 1)
        datum["is_active"] &= (datum["advantages"] != 0) & (mask > 0)
    if loss_fn == "gspo":
        counted = inputs["sequence_ratio_mask"].reshape(n, 1) != 0 if "sequence_ratio_mask" in inputs else datum["is_active"]
        datum["is_counted"] = has_target & counted
        scored = datum["is_active"] | datum["is_counted"]
    elif loss_fn != "cross_entropy" and not config.get("score_inactive"):
        scored = datum["is_active"]
    # −100: no target, NaN. No target at the end, or not scored: 0.
    is_ignored = (target == -100) & ("target_tokens" in inputs)
    reported = torch.where(scored, datum["lp"].detach(), torch.where(is_ignored, torch.nan, 0.0))
    datum["reported"] = reported.reshape(shape)
    return datum


def position_losses(loss_fn, config, datum):
    """ℓ of every position, and where a bound on the ratio took effect."""
    lp, q, w, difference = (datum[name] for name in ("lp", "q", "weights", "difference"))
    if loss_fn == "cross_entropy":
        return -w * lp, {}
    a, r = datum["advantages"], difference.exp()
    low = datum.get("clip_low_threshold", config.get("clip_low_threshold"))
    high = datum.get("clip_high_threshold", config.get("clip_high_threshold"))
    if loss_fn == "importance_sampling":
        return -w * r * a, {}
    if loss_fn == "dro":
        return -w * (lp * a - config["beta"] / 2 * difference**2), {}
    if loss_fn in ("ppo", "gspo"):
        if loss_fn == "gspo":
            counted = difference[datum["is_counted"]]
            ratio = counted.mean().exp().detach() if len(counted) else torch.ones(())
            # The value of the sequence's ratio, the gradient of each position's own.
            r = ratio * (lp - lp.detach()).exp()
        clipped = torch.clamp(r, min=torch.as_tensor(low), max=torch.as_tensor(high))
        binds = r * a > clipped * a
        sides = {"low": binds & (r < low), "high": binds & (r > high)}
        return -w * torch.where(binds, (clipped * a).detach(), r * a), sides
    if loss_fn == "cispo":
        clipped = torch.clamp(r, min=torch.as_tensor(low), max=torch.as_tensor(high)).detach()
        return -w * clipped * lp * a, {"low": r < low, "high": r > high}
    if loss_fn == "dppo":
        moved = (lp.exp() - q.exp()).detach()
        sides = {
            "low": (a <= 0) & (moved < -config["dppo_mask_low"]),
            "high": (a > 0) & (moved > config["dppo_mask_high"]),
        }
        k = (~(sides["low"] | sides["high"])).float()
        return w * (-k * config["adv_tau"] * a * r + config["kl_tau"] * difference**2), sides
    assert loss_fn == "stable_reinforce"
    clipped = torch.clamp(r, max=2).detach()
    penalty = config["kl_coeff"] / 2 * difference**2
    return w * (penalty - clipped * lp * a), {"low": torch.zeros_like(r) > 0, "high": r > 2}


def preferences(config, read):
    """ℓ of every pair, their number, and metrics."""
    terms, rewards = [], []
    for chosen, rejected in zip(read[::2], read[1::2], strict=True):
        if not (chosen["is_active"].any() or rejected["is_active"].any()):
            continue
        pair = [(d["weights"] * d["difference"])[d["is_active"]].sum() for d in (chosen, rejected)]
        x = config["beta"] * (pair[0] - pair[1])
        smoothing = config["label_smoothing"]
        log_sigmoid = torch.nn.functional.logsigmoid
        terms.append(-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x))
        rewards.append([config["beta"] * float(p.detach()) for p in pair])
    rewards = torch.tensor(rewards)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "reward_chosen": float(rewards[:, 0].mean()),
        "reward_rejected": float(rewards[:, 1].mean()),
        "reward_margin": float(margins.mean()),
        "reward_accuracy": float((margins > 0).float().mean()),
    }
    return torch.stack(terms), len(terms), metrics


def policy_gap(difference):
    """Metrics of the trainer's policy p against the sampler's q, from lp − q."""
    ratio = difference.exp()
    return {
        "kl_k1": float(-difference.mean()),
        "kl_k2": float((difference**2 / 2).mean()),
        "kl_k3": float((ratio - 1 - difference).mean()),
        "ratio": float(ratio.mean()),
        "ess_fraction": float(ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)),
        "max_token_gap": float(difference.abs().max()),
    }


class Adam:
    """Decoupled weight decay, bias correction, clipping by global norm, float32 state.

    Every step is also taken by PyTorch's own AdamW and clip_grad_norm_, on a copy.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        self.torch = torch.optim.AdamW(self.copies.values())
        self.m = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, results, adam):
        self.t += 1
        assert len({result["is_sum"] for result in results}) <= 1, "kinds never mix"
        count = max(sum(r["active"] for r in results), 1) if results and not results[0]["is_sum"] else 1
        g = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for result in results:
            for name, gradient in result["gradients"].items():
                g[name] += gradient
        g = {name: value / count for name, value in g.items()}
        norm = float(torch.cat([value.flatten() for value in g.values()]).double().norm())
        self.step_of_torch(g, adam)
        clip = adam["grad_clip_norm"]
        scale = clip / norm if clip > 0 and norm > clip else 1.0
        b1, b2 = adam["beta1"], adam["beta2"]
        for name, theta in self.parameters.items():
            m, v, grad = self.m[name], self.v[name], g[name] * scale
            m.mul_(b1).add_(grad, alpha=1 - b1)
            v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
            m_hat, v_hat = m / (1 - b1**self.t), v / (1 - b2**self.t)
            update = m_hat / (v_hat.sqrt() + adam["eps"]) + adam["weight_decay"] * theta
            theta -= adam["learning_rate"] * update
            # Its clipping divides by norm + 1e-6; and it decays the weights before the step.
            torch.testing.assert_close(theta, self.copies[name], rtol=1e-4, atol=1e-6)
        return norm

    def step_of_torch(self, gradients, adam):
        for name, copy in self.copies.items():
            copy.grad = gradients[name].clone()
        if adam["grad_clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(self.copies.values(), adam["grad_clip_norm"])
        self.torch.param_groups[0] |= {
            "lr": adam["learning_rate"],
            "betas": (adam["beta1"], adam["beta2"]),
            "eps": adam["eps"],
            "weight_decay": adam["weight_decay"],
        }
        with torch.enable_grad():
            self.torch.step()


def tokens(n, vocab, random):
    return torch.randint(vocab, (n,), generator=random).tolist()


def normal(shape, random):
    return torch.randn(shape, generator=random)


if __name__ == "__main__":
    main()
