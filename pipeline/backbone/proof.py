"""Choose how a model's rows run, by proof: the fastest way that gives what the model itself gives.

No list says which families are supported. When a model is loaded, two short rows behind two prompts run in every way
that is known, fastest first, and alone, from token ids, through the model's own forward pass. A prompt whose vectors
are the embeddings of known tokens must give the likelihood that those tokens give, and the gradient that it has alone.

Shapes: P prompt tokens, H hidden, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbone import decoder_only, encoder_decoder, padded
from pipeline.backbone.embedding import embed_words
from pipeline.backbone.packed import Rule
from pipeline.backbone.rows import Rows, as_indices
from pipeline.backbone.unpadded import RelativeAttention

Way = Literal["packed", "shared", "padded"]
"""How rows run: all in one row, behind prompts that they share or, before an encoder, each with its own; some in a row
behind one prompt, by a mask of tokens by tokens; or each in a row of its own with its own prompt."""

_TARGET = 3
"""Tokens of the target of each row that is tried."""
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""The types of layers, as transformers names them, whose tokens meet in attention alone."""

Run = Callable[..., Any]
"""Calls a function of the model, as `Backbone.run` does."""


@dataclass(frozen=True)
class Difference:
    """Between a way and the rows alone; infinite where the way cannot run the model at all."""

    likelihood: float
    """Nats a token, of the row that is farthest off."""
    gradient: float
    """Size of the difference of the prompts' gradients, as a part of the gradients' own size."""
    leak: float
    """Nats by which a token changes with what it must not see: another row, or what stands behind it."""
    reason: str = ""
    """Why the way cannot run the model."""

    def within(self, limits: "Difference") -> bool:
        """Whether each part is at most that of `limits`."""
        return self.likelihood <= limits.likelihood and self.gradient <= limits.gradient and self.leak <= limits.leak

    def __str__(self) -> str:
        leak = f", {self.leak:.1e} nats by what must not be seen" if self.leak else ""
        return self.reason or f"{self.likelihood:.1e} nats a token and {self.gradient:.1e} of the gradient off{leak}"


@dataclass(frozen=True)
class Proof:
    way: Way | None
    """The fastest way that is exact; None if there is none."""
    differences: dict[str, Difference]
    """Of every way that was tried."""
    keeps_rows: bool = False
    """Whether a decoder's padded rows may go on, token by token, from the family's own cache of what ran."""
    keeps_prompts: bool = False
    """Whether a decoder's padded rows may go on from the state of a prompt that ran once; without gradients."""


@dataclass(frozen=True)
class _Probe:
    """Two rows, each behind its prompt."""

    prompts: Sequence[np.ndarray]
    """Token ids whose embeddings are the prompts."""
    prompts_of_ids: Sequence[np.ndarray]
    """The same to the model as token ids and as embeddings."""
    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]

    def of_ids(self) -> "_Probe":
        return replace(self, prompts=self.prompts_of_ids)

    def with_another_neighbour(self) -> "_Probe":
        first, second = self.inputs
        return replace(self, inputs=[first[::-1].copy(), second])


def prove(
    run: Run,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> Proof:
    """Try the ways in turn. Under ZeRO-3 every rank calls this, and `agree` tells whether all ranks say yes.

    `run` calls functions of the model; `model` itself is asked about its parts alone.
    """
    probe, limits = _probe(model), _limits(model, dtype)
    differences: dict[str, Difference] = {}
    try:
        differences["alone"] = _alone_from_ids(run, probe.of_ids(), device)
    except Exception as error:  # a family may ask for more than tokens, or make its embeddings in a way of its own
        differences["alone"] = Difference(np.inf, np.inf, np.inf, _reason(error))
    if not agree(differences["alone"].within(limits)):
        return Proof(None, differences)
    prompts = _prompts(run, probe, device)
    wanted = _losses(run, _alone, prompts, probe, gradients)
    for way, together in _ways(model):
        try:
            found = _losses(run, together, prompts, probe, gradients)
            with torch.no_grad():
                plain, beside = (run(together, prompts, of)[1:] for of in (probe, probe.with_another_neighbour()))
            leak = _farthest(plain.float().cpu(), beside.float().cpu())
            differences[way] = Difference(_farthest(found[0], wanted[0]), _relative(found[1], wanted[1]), leak)
        except Exception as error:  # whatever a family's layers raise when they are not run as they are used to
            differences[way] = Difference(np.inf, np.inf, np.inf, _reason(error))
        if agree(differences[way].within(limits)):
            if together is _packed or model.config.is_encoder_decoder:
                return Proof(way, differences)
            keeps = [agree(_agrees(run, partial(of, probe), prompts, dtype)) for of in (_grown, _behind_prompts)]
            return Proof(way, differences, *keeps)
    return Proof(None, differences)


def _alone_from_ids(run: Run, probe: _Probe, device: torch.device) -> Difference:
    """Of rows by themselves from embeddings to the model's own forward pass from token ids."""
    from_ids = run(_from_ids, probe, device)
    with torch.no_grad():
        alone = run(_alone, _prompts(run, probe, device), probe)
    return Difference(_farthest(alone.float().cpu(), from_ids), 0.0, float(run(_seen_ahead, probe, device)))


def _agrees(run: Run, function: Callable[..., Tensor], prompts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether hidden states are the same when what ran is kept in the family's own cache as when it runs again."""
    try:
        with torch.no_grad():
            again, kept = (run(function, prompts, kept) for kept in (False, True))
    except Exception:  # the family's cache is asked what it may not know
        return False
    most = 1e-3 if dtype == torch.float32 else 1e-2
    return float((again - kept).norm() / again.norm()) <= most


def _grown(probe: _Probe, model: Any, prompts: Sequence[Tensor], kept: bool) -> Tensor:
    """Hidden states `[2, T, H]` of rows that grow by their targets, token by token."""
    first, step = padded.growing_rows(model, Rows(prompts, range(2), probe.inputs), kept)
    tokens = torch.as_tensor(np.stack(probe.targets), device=first.device)
    return torch.stack([first, *(step(of_rows) for of_rows in tokens.T)], 1)


def _behind_prompts(probe: _Probe, model: Any, prompts: Sequence[Tensor], kept: bool) -> Tensor:
    """Hidden states `[3, H]` at the ends of rows, two of them behind the first prompt."""
    rows = [*probe.inputs, probe.inputs[0]]
    hidden = padded.hidden_states(model, prompts, [0, 1, 0], rows, kept)
    ends = [len(prompts[s]) + len(x) - 1 for s, x in zip([0, 1, 0], rows, strict=True)]
    return hidden[torch.arange(3), torch.tensor(ends)]


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    if Rule.__name__ in first and isinstance(error, TypeError | AttributeError):
        return "its attention does not go through transformers' interface"
    return f"{type(error).__name__}: {first}"


def _ways(model: Any) -> list[tuple[Way, Callable[..., Tensor]]]:
    """The ways that a model may run, the fastest first."""
    if model.config.is_encoder_decoder:
        relative = any(isinstance(module, RelativeAttention) for module in model.modules())
        ways: list[Way] = ["packed", "padded"] if relative else ["padded"]
        return [(way, partial(_encoder_decoder, way)) for way in ways]
    # Llama 4 scales queries by their place in the packed row, from 8,192 on.
    if getattr(model.config, "attn_temperature_tuning", False):
        return [("padded", _padded)]
    # State-space layers, linear attention and their convolutions would run over the packed row as a whole.
    others = set(getattr(model.config, "layer_types", None) or ()) - _ATTENTION
    if others or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return [("padded", _padded)]
    # A window that the family applies by itself would count places of a shared row; two short rows do not show it.
    windowed = any("window" in name or "chunk" in name for name, value in vars(model.config).items() if value)
    shared: list[tuple[Way, Callable[..., Tensor]]] = [] if windowed else [("shared", _shared)]
    return [("packed", _packed), *shared, ("padded", _padded)]


def _limits(model: Any, dtype: torch.dtype) -> Difference:
    """The most that an exact way may differ."""
    if dtype == torch.float32:
        return Difference(1e-3, 2e-2, 5e-5)
    # In 16 bits the same sums in another order differ in their third digit, and a deep model amplifies that: SmolLM2 is
    # 0.07 nats and 6 % of the gradient off in bfloat16, and 9e-6 nats in float32. But what must not be seen changes
    # nothing, in passes of one shape, unless an expert gets another number of tokens with it.
    experts = any("expert" in name for name, _ in model.named_modules())
    return Difference(0.4, 0.5, 0.1 if experts else 5e-5)


def _probe(model: Any) -> _Probe:
    rng = np.random.default_rng(0)
    text = model.config.get_text_config(decoder=True)
    # Special tokens may stand for an image, or for the beginning of a row.
    special = {value for key, value in text.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)}
    usual = np.setdiff1d(np.arange(min(text.vocab_size, 2**15)), list(special))

    def some(tokens: int) -> np.ndarray:
        return rng.choice(usual, tokens, replace=False)

    prompts, rows, targets = [some(4), some(3)], [some(5), some(2)], [some(_TARGET), some(_TARGET)]
    plain = prompts
    if decoder_only.asks_for_tokens(model):
        # Such a family's layers ask for tokens, too, and a prompt's rows are the padding token there.
        plain = [np.full(len(prompt), decoder_only.pad_token(model)) for prompt in prompts]
    return _Probe(prompts, plain, rows, targets)


def _prompts(run: Run, probe: _Probe, device: torch.device) -> list[Tensor]:
    """Prompts `[P, H]` whose vectors are their tokens' embeddings."""
    ids = [torch.as_tensor(prompt, device=device) for prompt in probe.prompts]
    with torch.no_grad():
        return [run(embed_words, of).float() for of in ids]


def _losses(
    run: Run, losses: Callable[..., Tensor], prompts: Sequence[Tensor], probe: _Probe, gradients: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Losses `[2]`, and the prompts' gradients `[P, H]`."""
    with torch.set_grad_enabled(gradients):
        leaves = [prompt.detach().clone().requires_grad_(gradients) for prompt in prompts]
        nll = run(losses, leaves, probe)
        found = torch.autograd.grad(nll.sum(), leaves) if gradients else []
    return nll.detach().float().cpu(), [gradient.float().cpu() for gradient in found]


# The losses of the probe's rows `[2]`: as the model itself computes them, and in each way.


def _from_ids(model: Any, probe: _Probe, device: torch.device) -> Tensor:
    """Each target's tokens one by one, from what stands before each alone."""
    losses = []
    with torch.no_grad():
        for prompt, x, y in zip(probe.prompts, probe.inputs, probe.targets, strict=True):
            before = np.concatenate([prompt, x])
            logits = [_logits(model, before, y, place, device)[-1] for place in range(len(y))]
            losses.append(-sum(float(of.log_softmax(-1)[token]) for of, token in zip(logits, y, strict=True)))
    return torch.tensor(losses)


@torch.no_grad()
def _seen_ahead(model: Any, probe: _Probe, device: torch.device) -> Tensor:
    """Nats by which a token changes with the one behind it: 0 of a model that does not look ahead."""
    # Passes of one shape are alike to the last bit where nothing is seen, however little the likelihood shows it.
    before, (first, second, last) = np.concatenate([probe.prompts[0], probe.inputs[0]]), probe.targets[0]
    one, other = (
        _logits(model, before, np.array(target), 2, device)[-2].log_softmax(-1)
        for target in ([first, second, last], [first, last, last])
    )
    return (one - other).abs().max()  # a tensor: DeepSpeed looks into what a pass returns


def _logits(model: Any, before: np.ndarray, target: np.ndarray, place: int, device: torch.device) -> Tensor:
    """Logits `[T, V]` up to those of the target's token at `place`, through the model's own forward pass."""
    if model.config.is_encoder_decoder:
        decoder = encoder_decoder.decoder_inputs(model, [target], device)[:, : place + 1]
        ids = torch.as_tensor(before, device=device)[None]
        output = model(input_ids=ids, decoder_input_ids=decoder, use_cache=False)
    else:
        ids = torch.as_tensor(np.concatenate([before, target[:place]]), device=device)[None]
        output = model(input_ids=ids, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits.float()


def _alone(model: Any, prompts: Sequence[Tensor], probe: _Probe) -> Tensor:
    """Each row by itself, from embeddings, through the model's own forward pass."""
    losses = []
    for prompt, x, y in zip(prompts, probe.inputs, probe.targets, strict=True):
        if model.config.is_encoder_decoder:
            words = embed_words(model, as_indices(x, prompt))
            logits = model(
                inputs_embeds=torch.cat([prompt.to(words.dtype), words])[None],
                decoder_input_ids=encoder_decoder.decoder_inputs(model, [y], prompt.device),
                use_cache=False,
            ).logits
            losses.append(functional.cross_entropy(logits[0].float(), as_indices(y, prompt), reduction="sum"))
            continue
        ids = as_indices(np.concatenate([x, y[:-1]]), prompt)
        words = embed_words(model, ids)
        padding = ids.new_full((len(prompt),), decoder_only.pad_token(model))
        more = decoder_only.inputs_beside(model, torch.cat([padding, ids])[None])
        logits = model(inputs_embeds=torch.cat([prompt.to(words.dtype), words])[None], use_cache=False, **more).logits
        losses.append(functional.cross_entropy(logits[0, -len(y) :].float(), as_indices(y, prompt), reduction="sum"))
    return torch.stack(losses)


def _encoder_decoder(way: Way, model: Any, prompts: Sequence[Tensor], probe: _Probe) -> Tensor:
    model.way = way
    return encoder_decoder.target_nll(model, Rows(prompts, range(2), probe.inputs), probe.targets)


def _padded(model: Any, prompts: Sequence[Tensor], probe: _Probe) -> Tensor:
    model.way = "padded"
    return padded.target_nll(model, Rows(prompts, range(2), probe.inputs), probe.targets)


def _shared(model: Any, prompts: Sequence[Tensor], probe: _Probe) -> Tensor:
    # Each row twice: the second stands behind the first in their shared row, and must not show it.
    model.way = "shared"
    rows = Rows(prompts, [0, 1, 0, 1], [*probe.inputs, *probe.inputs])
    first, second = padded.target_nll(model, rows, [*probe.targets, *probe.targets]).view(2, 2)
    return second + (second - first).abs().detach()


def _packed(model: Any, prompts: Sequence[Tensor], probe: _Probe) -> Tensor:
    losses = decoder_only.target_nll(model, Rows(prompts, range(2), probe.inputs), probe.targets)
    # Keys and values of prompts that ran before serve decoding and services, so they belong to this way.
    with torch.no_grad():
        states = [decoder_only.prompt_state(model, prompt) for prompt in prompts]
        kept = decoder_only.target_nll(model, Rows(states, range(2), probe.inputs), probe.targets)
    return losses + (kept - losses).abs().detach()  # an error of either shows


def _farthest(losses: Tensor, wanted: Tensor) -> float:
    return float((losses - wanted).abs().nan_to_num(nan=np.inf).max()) / _TARGET


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if not wanted:
        return 0.0
    size = float(torch.cat([of.flatten() for of in wanted]).norm())
    off = float(torch.cat([(a - b).flatten() for a, b in zip(found, wanted, strict=True)]).norm())
    return off / size if size and np.isfinite(off) else np.inf
