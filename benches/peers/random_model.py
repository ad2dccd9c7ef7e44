"""Writes a model of a well-known shape with random bf16 weights, for measurements where no checkpoint is at hand.

    python random_model.py --shape qwen3-1.7b DIR

A Hugging Face directory with a tokenizer of one token a byte: what it says means nothing, how fast it says it is what
the real one's speed is. `tiny` is for trying a script out.
"""

import argparse
import json
import pathlib

import torch
import transformers

# hidden, intermediate, layers, heads, key heads, head width, vocabulary, tied embeddings
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def write_tokenizer(directory: pathlib.Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {"<|endoftext|>": 0} | {character: 1 + byte for byte, character in enumerate(byte_characters())}
    special = {"id": 0, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
                 "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                 "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", choices=SHAPES, required=True)
    ap.add_argument("directory", type=pathlib.Path)
    args = ap.parse_args()
    hidden, intermediate, layers, heads, key_heads, width, vocabulary, tied = SHAPES[args.shape]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=width, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, eos_token_id=0, bos_token_id=None)
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(args.directory)
    write_tokenizer(args.directory)
    print(f"{args.directory}: {sum(weight.numel() for weight in model.parameters()):,} weights")


if __name__ == "__main__":
    main()
