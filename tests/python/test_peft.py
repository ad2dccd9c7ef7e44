"""The adapter that Lockstep exports, loaded by the real PEFT over the real transformers.

`examples/export_adapter.rs` trains SmolLM2-135M a little and writes, in LOCKSTEP_PEFT_PROOF,
`adapter/`, `merged/` (a Hugging Face directory, out of the GGUF and the adapter) and `logprobs.json` (tokens, and
what Lockstep's sampler and trainer give for them).
"""

import json
import os
import pathlib

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROOF = pathlib.Path(os.environ["LOCKSTEP_PEFT_PROOF"])


@pytest.fixture(scope="module")
def report():
    return json.loads((PROOF / "logprobs.json").read_text())


@pytest.fixture(scope="module")
def base(report):
    gguf = pathlib.Path(report["model"])
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def adapted(base):
    return PeftModel.from_pretrained(base, PROOF / "adapter").eval()


def logprobs(model, tokens):
    """The log-probability of tokens[1:], each given those before it."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    scores = torch.log_softmax(logits.double(), dim=-1)
    return scores[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


def test_every_adapter_tensor_is_used(adapted):
    """PEFT only warns about tensors whose names it does not know."""
    from safetensors.torch import load_file

    saved = load_file(PROOF / "adapter" / "adapter_model.safetensors")
    names = {name.replace(".default.", ".") for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == set(saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["sampler_logprobs", "trainer_logprobs"])
def test_logprobs_agree(report, adapted, kind):
    """f32 in two engines, 30 layers: rounding of about 1e-5 per log-probability; 1e-4 is the
    bound that the project promises between its own trainer and sampler."""
    for sequence in report["sequences"]:
        ours = sequence[kind]
        # The sampler's first entry has no token before it; the trainer's last has no target.
        ours = np.array(ours[1:] if kind == "sampler_logprobs" else ours["data"][:-1], dtype=np.float64)
        theirs = logprobs(adapted, sequence["tokens"])
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_the_adapter_changes_the_model(report, adapted):
    """So that agreement is not that of two untouched base models."""
    tokens = report["sequences"][0]["tokens"]
    with adapted.disable_adapter():
        plain = logprobs(adapted, tokens)
    assert np.abs(plain - logprobs(adapted, tokens)).max() > 0.1


def test_the_merged_model_is_the_adapted_one(report):
    """Read by transformers alone, without PEFT and without the GGUF: the bound is that of the adapter."""
    merged = AutoModelForCausalLM.from_pretrained(PROOF / "merged").eval()
    assert merged.dtype == torch.float32
    for sequence in report["sequences"]:
        ours = np.array(sequence["sampler_logprobs"][1:], dtype=np.float64)
        np.testing.assert_allclose(ours, logprobs(merged, sequence["tokens"]), atol=1e-4, rtol=0)


def test_the_merged_model_brings_its_tokenizer(report):
    """Made from the GGUF's metadata; transformers' own reading of the same file is the reference."""
    gguf = pathlib.Path(report["model"])
    ours = AutoTokenizer.from_pretrained(PROOF / "merged")
    theirs = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for sequence in report["sequences"]:
        text = theirs.decode(sequence["tokens"])
        assert ours(text)["input_ids"] == sequence["tokens"]
    assert ours.eos_token == theirs.eos_token
    chat = [{"role": "user", "content": "What is 7 + 6?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
