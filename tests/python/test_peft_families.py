"""The adapters that Lockstep exports for each model family, loaded by the real PEFT.

The test `adapters_survive_their_export` of tests/training_math.rs writes, in
LOCKSTEP_PEFT_FAMILIES, a directory a family: `adapter/` and `logprobs.json` (the model's
directory, tokens, and what Lockstep gives for them).
"""

import json
import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "goldens"))
from rounding import hold_as_bf16  # noqa: E402

ROOT = pathlib.Path(os.environ["LOCKSTEP_PEFT_FAMILIES"])
FAMILIES = sorted(path.parent.name for path in ROOT.glob("*/logprobs.json"))


@pytest.fixture(params=FAMILIES)
def family(request):
    return ROOT / request.param


@pytest.fixture
def report(family):
    return json.loads((family / "logprobs.json").read_text())


@pytest.fixture
def adapted(family, report):
    base = AutoModelForCausalLM.from_pretrained(report["model"], dtype=torch.float32)
    if report["dtype"] == "bf16":
        hold_as_bf16(base)
    if getattr(base.config, "mlp_only_layers", None):
        # It takes every gate_proj, up_proj and down_proj of this architecture for an expert's.
        pytest.skip("PEFT cannot adapt the MLP of a layer without experts beside layers with them")
    return PeftModel.from_pretrained(base, family / "adapter").eval()


def logprobs(model, tokens):
    """The log-probability of tokens[1:], each given those before it."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    return scores[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


def test_there_is_a_family():
    assert FAMILIES


def test_every_adapter_tensor_is_used(family, adapted):
    """PEFT only warns about tensors whose names it does not know."""
    saved = load_file(family / "adapter" / "adapter_model.safetensors")
    names = {name.replace(".default.", ".") for name, _ in adapted.named_parameters() if "lora_" in name}
    if adapted.config.model_type == "qwen3_moe":
        # Those of the experts are fused as they are loaded: three matrices A and B of each expert
        # become two of all experts.
        names = {name for name in names if ".mlp." not in name}
        saved = {name: tensor for name, tensor in saved.items() if ".mlp." not in name}
    assert names == set(saved)


def test_logprobs_agree(report, adapted):
    """f32 in two engines, three layers: what differs is rounding, 1e-6 of numbers near 5."""
    ours = np.array(report["logprobs"], dtype=np.float64)
    np.testing.assert_allclose(ours, logprobs(adapted, report["tokens"]), atol=2e-5, rtol=0)


def test_the_adapter_changes_the_model(report, adapted):
    """So that agreement is not that of two untouched base models."""
    with adapted.disable_adapter():
        plain = logprobs(adapted, report["tokens"])
    assert np.abs(plain - logprobs(adapted, report["tokens"])).max() > 0.01
