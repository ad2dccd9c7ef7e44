"""The model families of the goldens: their shapes, random weights, and the same weights in GGUF.

A shape's `lora` is the adapter that the goldens put on it, `dtype` what its weights are held as (absent:
f32), `calls` names those that are kept of
the goldens' calls (absent: all); the rest goes to transformers' configuration class. Names and metadata of the GGUF files are those that the gguf package, which
llama.cpp's converter uses, gives them.
"""

import copy
import math

import gguf
import torch
import transformers

# Losses don't know families: beside two families with all of them, these show the rest.
FEW_CALLS = ["cross_entropy", "cross_entropy_weights", "importance_sampling", "dpo"]

FAMILIES = {
    "llama_tied": {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "lora": {"rank": 4, "alpha": 8.0, "targets": "q k v o gate up down"},
    },
    # Three query heads a key/value head, heads wider than the hidden state, another frequency
    # and epsilon, an adapter on some layers only.
    "llama_untied": {
        "model_type": "llama",
        "vocab_size": 80,
        "hidden_size": 36,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "lora": {"rank": 3, "alpha": 6.0, "targets": "q v o down"},
    },
    # Llama 3.1's frequencies: with theta 50 and 16 original positions the four pairs of a head
    # have waves of 6, 17, 44 and 118 positions: below, between and above the limits 8 and 32.
    "llama3": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
        "calls": FEW_CALLS,
        "lora": {"rank": 2, "alpha": 4.0, "targets": "q k v o gate up down"},
    },
    # Biases, and linear scaling.
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        "tie_word_embeddings": False,
        "calls": FEW_CALLS,
        "lora": {"rank": 3, "alpha": 6.0, "targets": "q k v o gate up down"},
    },
    # Norms of heads; queries twice as wide as the hidden state.
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "calls": FEW_CALLS,
        "lora": {"rank": 3, "alpha": 6.0, "targets": "q k v o gate up down"},
    },
    # Two of four experts, whose weights sum to one: what llama.cpp computes, too.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "calls": FEW_CALLS,
        "lora": {"rank": 2, "alpha": 4.0, "targets": "q k v o gate up down"},
    },
    # Three of five, weights as the softmax gives them; of four layers the second has experts.
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 32,
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "calls": FEW_CALLS,
        "lora": {"rank": 2, "alpha": 4.0, "targets": "k o gate up down"},
    },
}

# The same as `--dtype bf16` computes it (rounding.py): stored as they are, rounded by whoever loads them.
FAMILIES["llama_bf16"] = FAMILIES["llama_untied"] | {
    "dtype": "bf16",
    "calls": FEW_CALLS,
    "lora": {"rank": 3, "alpha": 6.0, "targets": "q k v o gate up down"},
}
FAMILIES["qwen3_moe_bf16"] = FAMILIES["qwen3_moe"] | {"dtype": "bf16", "tie_word_embeddings": True}

# An adapter on the head, which is the embedding, too, or one of its own; alone, and beside all others.
FAMILIES["llama_head"] = FAMILIES["llama_tied"] | {
    "calls": FEW_CALLS,
    "lora": {"rank": 4, "alpha": 8.0, "targets": "q k v o gate up down lm_head"},
}
FAMILIES["qwen2_head"] = FAMILIES["qwen2"] | {"lora": {"rank": 3, "alpha": 6.0, "targets": "lm_head"}}

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def make_model(shape, random):
    shape = dict(shape)
    config_class, model_class = CLASSES[shape.pop("model_type")]
    config = config_class(
        **shape, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, attn_implementation="eager"
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:  # norms: near one, so that a missing one shows
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


class ExpertLora:
    """LoRA on a mixture of experts, where PEFT has no adapters of single experts.

    transformers holds a layer's experts in one tensor, gates above ups. Here each expert's gate,
    up and down has matrices A and B of its own, under the name of the linear layer that it was
    before (and is on disk); the model runs with `W + alpha / rank · B A` in the place of every W.
    """

    def __init__(self, base, targets, lora, random):
        self.base, self.scale = base.requires_grad_(False), lora["alpha"] / lora["rank"]
        self.parameters = {}
        for name, (out_features, in_features) in self.linear_layers():
            if name.rsplit(".", 1)[1] in targets:
                for matrix, shape, bound in [
                    ("lora_A", (lora["rank"], in_features), in_features**-0.5),
                    ("lora_B", (out_features, lora["rank"]), 0.05),
                ]:
                    values = (2 * torch.rand(shape, generator=random) - 1) * bound
                    self.parameters[f"{name}.{matrix}.weight"] = values.requires_grad_()

    def linear_layers(self):
        for name, weight in self.base.named_parameters():
            experts = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
            if name.endswith("experts.gate_up_proj"):
                count, both, hidden = weight.shape
                for part in ("gate_proj", "up_proj"):
                    yield from ((f"{experts}.{i}.{part}", (both // 2, hidden)) for i in range(count))
            elif name.endswith("experts.down_proj"):
                yield from ((f"{experts}.{i}.down_proj", weight.shape[1:]) for i in range(weight.shape[0]))
            elif name.endswith("_proj.weight"):
                yield name.removesuffix(".weight"), weight.shape

    def delta(self, name, shape):
        if f"{name}.lora_A.weight" not in self.parameters:
            return torch.zeros(shape)
        a, b = (self.parameters[f"{name}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
        return self.scale * (b @ a)

    def weights(self):
        """Every adapted weight of the base model."""
        deltas = {name: self.delta(name, shape) for name, shape in self.linear_layers()}
        weights = {}
        for name, weight in self.base.named_parameters():
            experts = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
            if name.endswith("experts.gate_up_proj"):
                both = [
                    torch.cat([deltas[f"{experts}.{i}.gate_proj"], deltas[f"{experts}.{i}.up_proj"]])
                    for i in range(weight.shape[0])
                ]
                weights[name] = weight + torch.stack(both)
            elif name.endswith("experts.down_proj"):
                down = [deltas[f"{experts}.{i}.down_proj"] for i in range(weight.shape[0])]
                weights[name] = weight + torch.stack(down)
            elif name.endswith("_proj.weight"):
                weights[name] = weight + deltas[name.removesuffix(".weight")]
        return weights

    def __call__(self, tokens):
        return torch.func.functional_call(self.base, self.weights(), (tokens,))

    @property
    def generation_config(self):
        return self.base.generation_config

    @torch.no_grad()
    def generate(self, *arguments, **options):
        merged = copy.deepcopy(self.base)
        for name, weight in self.weights().items():
            merged.get_parameter(name).copy_(weight)
        return merged.generate(*arguments, **options)


def generate(model, vocab, random):
    """Greedy generation, as transformers does it.

    `margin` is the smallest distance between the two largest logits on the way: a prompt whose
    margin is small would tell rounding apart, not models, and is drawn again.
    """
    while True:
        prompt = torch.randint(vocab, (1, 5), generator=random)
        model.generation_config.eos_token_id = None
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(whole.logits).topk(2).values
        margin = (best[..., 0] - best[..., 1]).min().item()
        if margin > 1e-3:
            tokens = whole.sequences[0, prompt.shape[1] :].tolist()
            return {"prompt": prompt[0].tolist(), "tokens": tokens, "margin": margin}


def has_gguf(config):
    """llama.cpp has experts in every layer or in none, and makes their weights sum to one."""
    return not getattr(config, "mlp_only_layers", None) and getattr(config, "norm_topk_prob", True)


def write_gguf(path, model, characters):
    """The model as llama.cpp's convert_hf_to_gguf.py would write it, in float32."""
    config = model.config
    architecture = config.model_type.replace("_", "")
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        divisors = llama3_divisors(config.rope_parameters, head_dim)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if architecture == "llama" else "qwen2")
    # A merge, because a list without entries is not written.
    writer.add_token_list(characters[:-1] + ["!!"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(characters))
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(config.eos_token_id)
    for name, tensor in split_experts(model.state_dict()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensor.detach()
        if architecture == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = permute(tensor, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_experts(state):
    """The experts' gates and ups apart, as on disk and in GGUF."""
    for name, tensor in state.items():
        if name.endswith(".experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1)):
                yield name.replace("gate_up_proj", f"{part}.weight"), half
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


def permute(weight, heads):
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(rope, head_dim):
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    divisors = []
    for frequency in frequencies:
        wave = 2 * math.pi / frequency
        if wave < context / high:
            divisors.append(1.0)
        elif wave > context / low:
            divisors.append(rope["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(divisors, dtype=torch.float32)
