"""One step of training all weights: the same examples for any number of ranks, divided among them."""

from dataclasses import dataclass

import torch

from pipeline.backbone import prompted
from pipeline.backbone.rows import TokenRows
from pipeline.lab.full_weights.pieces import TrainedModel
from pipeline.tuning.batches import RowCost, plan_rows
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size


@dataclass(frozen=True)
class Examples:
    """The examples of one step, over all ranks."""

    inputs: TokenRows
    targets: TokenRows

    @property
    def tokens(self) -> int:
        return sum(map(len, self.inputs)) + sum(map(len, self.targets))


def loss_and_gradient(model: TrainedModel, examples: Examples, token_budget: int) -> float:
    """The loss, in nats a target token; the model keeps its gradient for `update`.

    Micro-batches have at most `token_budget` tokens a rank. Every rank must call this with the same examples, and gets
    the same loss.
    """
    backbone = model.backbone
    weight = 1.0 / sum(map(len, examples.targets))
    costs = [RowCost(0, 0, len(x) + len(y)) for x, y in zip(examples.inputs, examples.targets, strict=True)]
    plan = plan_rows(costs, world_size(), token_budget, backbone.pads_rows)
    loss = torch.zeros(1, device=backbone.device)
    for place, shares in enumerate(plan):
        # A rank without a share runs another's first row at weight zero: all gather weights together.
        mine = shares[rank()] or shares[0][:1]
        rows = prompted.Rows([backbone.no_prompt()], [0] * len(mine), [examples.inputs[i] for i in mine])
        nll = backbone.run(prompted.target_nll, rows, [examples.targets[i] for i in mine])
        part = nll.sum() * (weight if shares[rank()] else 0.0)
        loss += part.detach()
        model.backward(part, last=place == len(plan) - 1)
    return float(sum_over_ranks(loss))
