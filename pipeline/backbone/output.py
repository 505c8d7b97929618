"""The output layer as the model itself applies it, a bounded number of places at a time.

Families do more there than one product: Granite divides logits, Gemma caps them, T5 scales what goes in, BART adds a
bias. So the model's own forward pass runs for it, with its layers passed over. Logits are the largest tensor of a pass
where a vocabulary is large (262,144 entries of float32 are 1 MiB a place), and several copies of them are needed:
therefore only a block of places has logits at a time.

Shapes: n places, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from pipeline.backbone.rows import TokenRows, as_indices

LOGIT_BYTES = 256 * 2**20
"""What the logits of one block may take, copies included."""
_COPIES = 4
"""In float32: the logits, what the softmax keeps, their gradient, and one that comes and goes."""

_most_places: ContextVar[int | None] = ContextVar("most places of any rank", default=None)
_given_hidden: ContextVar[Tensor | None] = ContextVar("hidden states in place of the layers", default=None)


class _LayersOutput(BaseModelOutput):
    """Hidden states alone; whatever else a family's own output has is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logit_bytes(config: Any, places: int) -> int:
    """What the logits of so many places take, copies included."""
    return 4 * _COPIES * places * int(config.get_text_config(decoder=True).vocab_size)


def layers_of(model: Any) -> Any:
    """The part of a model that makes the hidden states of which its forward makes logits; of two parts, the decoder."""
    parts = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next(part for part in parts if part is not None and part is not model)  # by whichever name a family has


def let_layers_be_passed_over(model: Any) -> None:
    """Prepare a model for `own_logits`: its layers return given hidden states while there are some."""
    model.partitioned = False  # until it is
    layers = layers_of(model)
    usual = layers.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _given_hidden.get()
        return usual(*args, **kwargs) if hidden is None else _LayersOutput(last_hidden_state=hidden)

    layers.forward = forward


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[n, V]` of last hidden states `[n, H]`."""
    row = hidden[None]
    token = _given_hidden.set(row)
    try:
        if model.config.is_encoder_decoder:
            start = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            encoded = _LayersOutput(last_hidden_state=row)  # nothing looks at it
            output = model(encoder_outputs=encoded, decoder_input_ids=start, use_cache=False)
        else:
            output = model(inputs_embeds=row, use_cache=False)
    finally:
        _given_hidden.reset(token)
    logits: Tensor = output.logits[0]
    return logits


def token_nll(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """-log P of tokens `[n]`, each predicted from its hidden state `[n, H]`: `[n]` float32."""
    return _place_losses(model, _block_nll, hidden, tokens)


def label_token_nll(model: Any, hidden: Tensor, tokens: Tensor, place_of_token: np.ndarray) -> Tensor:
    """-log P of tokens `[n]`, each predicted from the hidden state `[m, H]` whose number stands in `place_of_token`.

    `[n]` float32, without a gradient. Every label of a row has its first token at one place, whose logits are made and
    summed over the vocabulary once for all of them.
    """
    order = np.argsort(place_of_token, kind="stable")
    first = np.searchsorted(place_of_token[order], np.arange(len(hidden) + 1))  # of each place's tokens in that order
    nll = hidden.new_empty(len(tokens), dtype=torch.float32)
    for of_places, numbers in _blocks(model, hidden, torch.arange(len(hidden))):
        logits = own_logits(model, of_places).float()
        start, end = int(numbers[0]), int(numbers[-1]) + 1
        here = order[first[start] : first[end]]
        place, among = as_indices(place_of_token[here] - start, hidden), as_indices(here, hidden)
        nll[among] = logits.logsumexp(-1)[place] - logits[place, tokens[among]]
    return nll


def token_distillation(model: Any, hidden: Tensor, tokens: Tensor, taught: Tensor, shares: Tensor) -> Tensor:
    """`(1 - share) * -log P(token) + share * KL(teacher || model)` at each place: `[n]` float32.

    hidden: `[n, H]`, tokens: `[n]`. taught: `[n, H]`, what the same output layer makes the teacher's distribution over
    the vocabulary of, without a gradient. shares: `[n]`.
    """
    return _place_losses(model, _block_distillation, hidden, tokens, taught, shares)


def target_of_token(targets: TokenRows) -> np.ndarray:
    """`[N]`: for each of the N tokens of all targets, the number of its target."""
    return np.repeat(np.arange(len(targets)), [len(target) for target in targets])


def summed(nll: Tensor, of_target: np.ndarray, targets: int) -> Tensor:
    """Sums `[targets]` of tokens' losses `[n]`, each of the target whose number stands in `of_target` `[n]`."""
    return nll.new_zeros(targets).index_add(0, as_indices(of_target, nll), nll)


def best_tokens(model: Any, hidden: Tensor) -> Tensor:
    """The most likely token `[n]` after each hidden state `[n, H]`."""
    return torch.cat([own_logits(model, h).argmax(-1) for (h,) in _blocks(model, hidden)])[: len(hidden)]


def _block_nll(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(own_logits(model, hidden).float(), tokens, reduction="none")


def _block_distillation(model: Any, hidden: Tensor, tokens: Tensor, taught: Tensor, shares: Tensor) -> Tensor:
    student = own_logits(model, hidden).float().log_softmax(-1)
    with torch.no_grad():
        teacher = own_logits(model, taught).float().log_softmax(-1)
    nll = functional.nll_loss(student, tokens, reduction="none")
    kl = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (1 - shares) * nll + shares * kl


def _place_losses(model: Any, of_block: "_BlockLoss", hidden: Tensor, *others: Tensor) -> Tensor:
    """`[n]`: each place's loss of its hidden state `[n, H]` and of what else there is of it, block by block."""
    # Where the output layer itself is trained, autograd has to see it.
    frozen = not any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    if torch.is_grad_enabled() and hidden.requires_grad and frozen:
        losses: Tensor = _PlaceLosses.apply(model, of_block, hidden, *others)
        return losses
    return torch.cat([of_block(model, *block) for block in _blocks(model, hidden, *others)])[: len(hidden)]


def _blocks(model: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The places in blocks; a rank that has fewer blocks than another gives its last place again for each."""
    # Hidden states are two-dimensional, and each kind of them has logits of its own.
    kinds = sum(tensor.dim() == 2 for tensor in tensors)
    total, places = len(tensors[0]), max(1, LOGIT_BYTES // (kinds * logit_bytes(model.config, 1)))
    blocks = -(-total // places)
    if model.partitioned:
        # Each block gathers the output layer, and all ranks must gather alike.
        blocks = _most_blocks(blocks, places, tensors[0])
    for start in range(0, blocks * places, places):
        first = min(start, total - 1)
        yield tuple(tensor[first : max(first + 1, start + places)] for tensor in tensors)


def _most_blocks(blocks: int, places: int, like: Tensor) -> int:
    """The blocks of the rank that has most of them."""
    known = _most_places.get()
    if known is not None:
        assert -(-known // places) >= blocks, "more places than was told"
        return -(-known // places)
    most = torch.tensor(blocks, device=like.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@contextmanager
def most_places(places: int) -> Iterator[None]:
    """Within it no rank has more places than this, so that ranks need not ask each other: a GPU would be waited for."""
    token = _most_places.set(places)
    try:
        yield
    finally:
        _most_places.reset(token)


_BlockLoss = Callable[..., Tensor]
"""`(model, hidden [n, H], others [n, ...] ...) -> losses [n]` of one block of places."""


class _PlaceLosses(torch.autograd.Function):
    """Each block's gradient is computed with its loss, while its logits are there.

    A place's loss depends on its own hidden state alone, so the gradient of the sum is each place's own.
    """

    @staticmethod
    def forward(ctx: Any, model: Any, of_block: _BlockLoss, hidden: Tensor, *others: Tensor) -> Tensor:
        losses, gradients = list[Tensor](), list[Tensor]()
        for of_places, *own in _blocks(model, hidden.detach(), *others):
            with torch.enable_grad():
                leaf = of_places.requires_grad_()
                loss = of_block(model, leaf, *own)
                gradients += torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients)[: len(hidden)])
        return torch.cat(losses)[: len(hidden)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        rest = len(ctx.needs_input_grad) - 3
        return None, None, (grads[0].unsqueeze(-1) * gradient).to(gradient.dtype), *[None] * rest
