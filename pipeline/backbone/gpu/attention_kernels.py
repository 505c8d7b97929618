"""The Triton code of `attention`. It imports Triton, so nothing but `attention` imports it, where Triton is installed.

One program handles some tokens of one segment for one head. A forward program walks from its segment up to the root of
the tree, so it reads the keys of nothing but its own ancestors: rows of other prompts cannot reach it, not even as a
NaN times zero. Scores are not stored; the backward pass makes them again (FlashAttention-2, Dao 2023).

Tables are int32. `starts`, `sizes` and `parents` are by segment; starts count from the first given token. `of_block`
and `firsts` tell each block's segment, and its first token there. Tensors are contiguous, `[tokens, heads, SIZE]`.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(pointer, tokens, heads, head, inside, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows `[len(tokens), WIDE]` of one head; 0 outside."""
    dims = tl.arange(0, WIDE)
    places = (tokens[:, None].to(tl.int64) * heads + head) * SIZE + dims[None, :]
    return tl.load(pointer + places, mask=inside[:, None] & (dims[None, :] < SIZE), other=0.0)


@triton.jit
def _put_rows(pointer, rows, tokens, heads, head, inside, SIZE: tl.constexpr, WIDE: tl.constexpr):
    dims = tl.arange(0, WIDE)
    places = (tokens[:, None].to(tl.int64) * heads + head) * SIZE + dims[None, :]
    tl.store(pointer + places, rows.to(pointer.dtype.element_ty), mask=inside[:, None] & (dims[None, :] < SIZE))


@triton.jit
def forward(
    q_pointer, k_pointer, v_pointer, out_pointer, log_sums,
    of_block, firsts, starts, sizes, parents,
    given, scaling, heads, key_heads,
    SIZE: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs `[N, A, D]`, and the logarithm of each softmax' denominator `[N, A]`, of one block and head."""
    block, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (heads // key_heads)
    own, first = tl.load(of_block + block), tl.load(firsts + block)
    start, size = tl.load(starts + own), tl.load(sizes + own)
    row = first + tl.arange(0, M)
    inside, tokens = row < size, start + row
    q = _rows(q_pointer, tokens - given, heads, head, inside, SIZE, WIDE)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, WIDE], tl.float32)
    # Its own segment comes first, of which every row sees at least one key: so `top` is finite from then on.
    segment = own
    while segment >= 0:
        before, length = tl.load(starts + segment), tl.load(sizes + segment)
        end = tl.where(segment == own, tl.minimum(first + M, length), length)
        for at in range(0, end, N):
            column = at + tl.arange(0, N)
            k = _rows(k_pointer, before + column, key_heads, key_head, column < length, SIZE, WIDE)
            v = _rows(v_pointer, before + column, key_heads, key_head, column < length, SIZE, WIDE)
            seen = (column[None, :] < length) & ((segment != own) | (column[None, :] <= row[:, None]))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new[:, None])
            fade = tl.exp(top - new)
            total = total * fade + tl.sum(weights, 1)
            out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new
        segment = tl.load(parents + segment)
    _put_rows(out_pointer, out / total[:, None], tokens - given, heads, head, inside, SIZE, WIDE)
    tl.store(log_sums + (tokens - given).to(tl.int64) * heads + head, top + tl.log(total), mask=inside)


@triton.jit
def backward_queries(
    q_pointer, k_pointer, v_pointer, grad_pointer, log_sums, shares, out_pointer, dq_pointer,
    of_block, firsts, starts, sizes, parents,
    given, scaling, heads, key_heads,
    SIZE: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of one block's queries for one head; into `shares` `[N, A]` go the sums of output times gradient."""
    block, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (heads // key_heads)
    own, first = tl.load(of_block + block), tl.load(firsts + block)
    start, size = tl.load(starts + own), tl.load(sizes + own)
    row = first + tl.arange(0, M)
    inside, tokens = row < size, start + row - given
    q = _rows(q_pointer, tokens, heads, head, inside, SIZE, WIDE)
    grad = _rows(grad_pointer, tokens, heads, head, inside, SIZE, WIDE)
    log_sum = tl.load(log_sums + tokens.to(tl.int64) * heads + head, mask=inside, other=0.0)
    out = _rows(out_pointer, tokens, heads, head, inside, SIZE, WIDE)
    share = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(shares + tokens.to(tl.int64) * heads + head, share, mask=inside)
    dq = tl.zeros([M, WIDE], tl.float32)
    segment = own
    while segment >= 0:
        before, length = tl.load(starts + segment), tl.load(sizes + segment)
        end = tl.where(segment == own, tl.minimum(first + M, length), length)
        for at in range(0, end, N):
            column = at + tl.arange(0, N)
            k = _rows(k_pointer, before + column, key_heads, key_head, column < length, SIZE, WIDE)
            v = _rows(v_pointer, before + column, key_heads, key_head, column < length, SIZE, WIDE)
            seen = (column[None, :] < length) & ((segment != own) | (column[None, :] <= row[:, None]))
            seen = seen & inside[:, None]
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            weights = tl.where(seen, tl.exp(scores - log_sum[:, None]), 0.0)
            towards = tl.dot(grad, tl.trans(v), input_precision="ieee")
            slopes = weights * (towards - share[:, None])
            dq += tl.dot(slopes.to(k.dtype), k, input_precision="ieee")
        segment = tl.load(parents + segment)
    _put_rows(dq_pointer, dq * scaling, tokens, heads, head, inside, SIZE, WIDE)


@triton.jit
def backward_keys(
    q_pointer, k_pointer, v_pointer, grad_pointer, log_sums, shares, dk_pointer, dv_pointer,
    of_block, firsts, starts, sizes, first_below, below,
    given, scaling, heads, key_heads,
    SIZE: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients of one block's keys and values for one head of keys, summed in a fixed order.

    `below` lists the segments that attend to each one, itself among them, from `first_below` on.
    """
    block, key_head = tl.program_id(0), tl.program_id(1)
    own, first = tl.load(of_block + block), tl.load(firsts + block)
    start, size = tl.load(starts + own), tl.load(sizes + own)
    column = first + tl.arange(0, N)
    k = _rows(k_pointer, start + column, key_heads, key_head, column < size, SIZE, WIDE)
    v = _rows(v_pointer, start + column, key_heads, key_head, column < size, SIZE, WIDE)
    dk = tl.zeros([N, WIDE], tl.float32)
    dv = tl.zeros([N, WIDE], tl.float32)
    for number in range(tl.load(first_below + own), tl.load(first_below + own + 1)):
        segment = tl.load(below + number)
        place, length = tl.load(starts + segment) - given, tl.load(sizes + segment)
        # Of their own segment, keys are seen from their own place on.
        for at in range(tl.where(segment == own, first, 0), length, M):
            row = at + tl.arange(0, M)
            inside, tokens = row < length, place + row
            seen = inside[:, None] & (column[None, :] < size)
            seen = seen & ((segment != own) | (column[None, :] <= row[:, None]))
            for member in range(0, heads // key_heads):
                head = key_head * (heads // key_heads) + member
                q = _rows(q_pointer, tokens, heads, head, inside, SIZE, WIDE)
                grad = _rows(grad_pointer, tokens, heads, head, inside, SIZE, WIDE)
                log_sum = tl.load(log_sums + tokens.to(tl.int64) * heads + head, mask=inside, other=0.0)
                share = tl.load(shares + tokens.to(tl.int64) * heads + head, mask=inside, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
                weights = tl.where(seen, tl.exp(scores - log_sum[:, None]), 0.0)
                dv += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
                towards = tl.dot(grad, tl.trans(v), input_precision="ieee")
                slopes = weights * (towards - share[:, None])
                dk += tl.dot(tl.trans(slopes.to(q.dtype)), q, input_precision="ieee")
    _put_rows(dk_pointer, dk * scaling, start + column, key_heads, key_head, column < size, SIZE, WIDE)
    _put_rows(dv_pointer, dv, start + column, key_heads, key_head, column < size, SIZE, WIDE)


@triton.jit
def rotate(
    q_pointer, k_pointer, rotated_q, rotated_k, cosine, sine,
    heads, key_heads, direction,
    HALF: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate one token's queries and keys, all heads; pairs lie half a head apart. `direction` -1 turns them back."""
    token = tl.program_id(0).to(tl.int64)
    head, dims = tl.arange(0, HEADS), tl.arange(0, WIDE)
    cos = tl.load(cosine + token * HALF + dims, mask=dims < HALF, other=0.0)[None, :]
    sin = tl.load(sine + token * HALF + dims, mask=dims < HALF, other=0.0)[None, :] * direction
    places = head[:, None] * (2 * HALF) + dims[None, :]
    for side in tl.static_range(2):
        source, target = (q_pointer, rotated_q) if side == 0 else (k_pointer, rotated_k)
        count = heads if side == 0 else key_heads
        here = (head[:, None] < count) & (dims[None, :] < HALF)
        at = token * count * (2 * HALF) + places
        low = tl.load(source + at, mask=here, other=0.0).to(tl.float32)
        high = tl.load(source + at + HALF, mask=here, other=0.0).to(tl.float32)
        tl.store(target + at, (low * cos - high * sin).to(target.dtype.element_ty), mask=here)
        tl.store(target + at + HALF, (high * cos + low * sin).to(target.dtype.element_ty), mask=here)
