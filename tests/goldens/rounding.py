"""What `--dtype bf16` computes, in PyTorch: weights and what they are multiplied with are rounded to bf16.

Sums stay float32, and so does everything else: adapters, norms, attention, the router, losses.
"""

import types

import torch
from torch.nn import functional


class Rounded(torch.autograd.Function):
    """`W x` of a frozen W, and `Wᵀ dy` as its gradient, with x and dy rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return functional.linear(x.bfloat16().float(), weight)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return dy.bfloat16().float() @ weight, None


@torch.no_grad()
def hold_as_bf16(model):
    """Rounds every matrix (norms and biases stay as they are), and what linear layers and experts multiply.

    Of the layers that an adapter may change the rounded weight is kept aside, and zero left in its place: what is
    found there is the adapter's share, which is multiplied with unrounded inputs.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.bfloat16().float())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.frozen = module.weight.detach().clone()
            # The head may be the embedding.
            module.is_changed = not name.endswith("lm_head")
            if module.is_changed:
                module.weight.zero_()
            module.forward = types.MethodType(linear, module)
        elif type(module).__name__.endswith("Experts"):
            module.frozen = [module.gate_up_proj.detach().clone(), module.down_proj.detach().clone()]
            module.gate_up_proj.zero_()
            module.down_proj.zero_()
            module.forward = types.MethodType(experts, module)


def linear(self, x):
    y = Rounded.apply(x, self.frozen) if self.bias is None else Rounded.apply(x, self.frozen) + self.bias
    return y + functional.linear(x, self.weight) if self.is_changed else y


def experts(self, hidden, chosen, weights):
    """As transformers has it, expert by expert; but rows are weighed before the last product, as Lockstep does it:
    what is rounded there is then another number.
    """
    result = torch.zeros_like(hidden)
    gate_up, down = self.gate_up_proj, self.down_proj
    for expert in chosen.unique().tolist():
        rows, places = torch.where(chosen == expert)
        x = hidden[rows]
        both = Rounded.apply(x, self.frozen[0][expert]) + functional.linear(x, gate_up[expert])
        gate, up = both.chunk(2, dim=-1)
        x = self.act_fn(gate) * up * weights[rows, places, None]
        y = Rounded.apply(x, self.frozen[1][expert]) + functional.linear(x, down[expert])
        result = result.index_add(0, rows, y)
    return result
