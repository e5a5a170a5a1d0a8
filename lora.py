"""LoRA: fine-tune a model by learning two thin matrices beside each of its weight matrices, and nothing else.

    y = W x + B A x        W (out, in) is frozen; A (R, in) and B (out, R) learn, and B starts at 0
    W + B A                is a matrix of W's shape: merged, the model costs what it did before

A rank R of 8 trains 7 % of the default model's parameters, and of a large one's a thousandth: gradients and
the optimizer's moments shrink with them. `python sft.py --lora 8` uses it.

Left out: a scale alpha / R (it is part of the learning rate), dropout, quantised weights under it (QLoRA).
Paper: Hu 2021 (LoRA, section 4.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRA(nn.Module):
    """A linear layer with adapters: W x + B A x (Hu 2021, eq. 3)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.normal_(self.A, std=linear.in_features ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)  # (..., out)


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model and put adapters beside its matrices, save a head that is the embedding too."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not (child is model.head and model.config.tied):
                setattr(parent, name, LoRA(child, rank))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add B A to the weights, and take the adapters away: the model has its old shape again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRA):
                child.linear.weight += child.B @ child.A
                setattr(parent, name, child.linear)
    model.requires_grad_(True)
