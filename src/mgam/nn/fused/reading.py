"""One softmax of a block of queries over its cover: window, chunks read as tokens, summaries. Forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(acc, peak, total, q, key, value, bias, seen, scale, PRECISION: tl.constexpr):
    raw = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + bias[None, :]
    raw = tl.where(seen, raw, -float("inf"))
    highest = tl.maximum(peak, tl.max(raw, 1))
    fade = tl.exp2(peak - highest)
    weight = tl.exp2(raw - highest[:, None])
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit
def _lines(base, index, step, live, D: tl.constexpr):
    column = tl.arange(0, D)
    return tl.load(base + index[:, None].to(tl.int64) * step + column[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _program(heads, tokens, G: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """What one program reads for: number of the block, row and query head together, row and KV head together, row, KV
    head, query head; first token of the window and the one after it; tokens of the block (BLOCK,)."""
    number = tl.program_id(0)
    member = tl.program_id(1)
    pair = member // G
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    asker = member % (heads * G)
    start = number * BLOCK
    left = tl.maximum(start - SIDE, 0)
    right = tl.minimum(start + BLOCK + (0 if CAUSAL else SIDE), tokens)
    return number, member, pair, row, head, asker, left, right, start + tl.arange(0, BLOCK)


@triton.jit
def _tokens(keys, values, token, key_step, value_step, end, own, CAUSAL: tl.constexpr, D: tl.constexpr):
    """Which of some tokens (N,) are there, before `end`, which of them queries see (M, N), their keys and values."""
    live = token < end
    seen = live[None, :] & (own >= 0)[:, None]
    if CAUSAL:
        seen = seen & (token[None, :] <= own[:, None])
    return live, seen, _lines(keys, token, key_step, live, D), _lines(values, token, value_step, live, D)


@triton.jit
def _summaries(mean_keys, mean_values, list_ptr, bias_ptr, at, count, own, D: tl.constexpr):
    """Lines (N,) of the summaries at some places of a list of `count`, their biases, which are there, which queries
    see (M, N), their keys and values."""
    live = at < count
    line = tl.load(list_ptr + at, mask=live, other=0)
    bias = tl.load(bias_ptr + line, mask=live, other=0.0)
    seen = live[None, :] & (own >= 0)[:, None]
    return line, bias, live, seen, _lines(mean_keys, line, D, live, D), _lines(mean_values, line, D, live, D)


@triton.jit(do_not_specialize=["blocks", "tokens", "fines", "room", "means", "pairs"])
def read_kernel(
    q_ptr, q_row, q_head, q_step, key_ptr, key_row, key_head, key_step, value_ptr, value_row, value_head, value_step,
    mean_ptr, bias_ptr, fine_ptr, list_ptr, count_ptr, out_ptr, lse_ptr, heads, blocks, tokens, fines, room, means,
    pairs, scale,
    G: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one row and query head.

    q (B, H*G, tokens, D), keys and values (B, H, tokens, D) by strides; mean (2, B, H, means, D) with bias (means,) in
    base 2; fine, list and count as `choose_kernel` writes them. Writes out (B, tokens, H*G, D) and lse
    (B, H*G, tokens), in base 2. `scale` is in base 2.
    """
    number, member, pair, row, head, asker, left, right, own = _program(heads, tokens, G, BLOCK, SIDE, CAUSAL)
    column = tl.arange(0, D)
    there = own < tokens
    q = _lines(q_ptr + row * q_row + asker * q_head, own, q_step, there, D)
    keys = key_ptr + row * key_row + head * key_head
    values = value_ptr + row * value_row + head * value_head
    acc = tl.zeros((BLOCK, D), tl.float32)
    peak = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    none = tl.zeros((TILE,), tl.float32)
    for first in tl.range(left, right, TILE):
        token = first + tl.arange(0, TILE)
        _, seen, key, value = _tokens(keys, values, token, key_step, value_step, right, own, CAUSAL, D)
        acc, peak, total = _tile(acc, peak, total, q, key, value, none, seen, scale, PRECISION)
    place = pair.to(tl.int64) * blocks + number
    few = tl.zeros((CHUNK,), tl.float32)
    for slot in tl.range(0, tl.load(count_ptr + place * 3 + 1)):
        token = tl.load(fine_ptr + place * fines + slot) * CHUNK + tl.arange(0, CHUNK)
        _, seen, key, value = _tokens(keys, values, token, key_step, value_step, tokens, own, False, D)
        acc, peak, total = _tile(acc, peak, total, q, key, value, few, seen, scale, PRECISION)
    count = tl.load(count_ptr + place * 3 + 2)
    mean_keys = mean_ptr + pair.to(tl.int64) * means * D
    mean_values = mean_keys + pairs.to(tl.int64) * means * D
    for first in tl.range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        _, bias, _, seen, key, value = _summaries(
            mean_keys, mean_values, list_ptr + place * room, bias_ptr, at, count, own, D
        )
        acc, peak, total = _tile(acc, peak, total, q, key, value, bias, seen, scale, PRECISION)
    target = ((row * tokens + own) * (heads * G) + asker)[:, None] * D + column[None, :]
    tl.store(out_ptr + target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(lse_ptr + member.to(tl.int64) * tokens + own, peak + tl.log2(total), mask=there)


@triton.jit
def _slopes(q, grad, lse, delta, key, value, bias, seen, scale, PRECISION: tl.constexpr):
    """Weights (M, N), and gradients of logits (M, N)."""
    raw = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + bias[None, :]
    weight = tl.where(seen, tl.exp2(raw - lse[:, None]), 0.0)
    steep = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    return weight, weight * (steep - delta[:, None])


@triton.jit
def _add(dk, dv, index, live, weight, slope, q, grad, plain, D: tl.constexpr, PRECISION: tl.constexpr):
    """Adds gradients of keys and values to lines of float32."""
    column = tl.arange(0, D)
    target = index[:, None].to(tl.int64) * D + column[None, :]
    more = tl.dot(tl.trans(weight.to(grad.dtype)), grad, input_precision=PRECISION)
    tl.atomic_add(dv + target, more, mask=live[:, None], sem="relaxed")
    more = tl.dot(tl.trans(slope.to(q.dtype)), q, input_precision=PRECISION) * plain
    tl.atomic_add(dk + target, more, mask=live[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["blocks", "tokens", "fines", "room", "means", "pairs"])
def read_grad_kernel(
    q_ptr, q_row, q_head, q_step, key_ptr, key_row, key_head, key_step, value_ptr, value_row, value_head, value_step,
    mean_ptr, bias_ptr, fine_ptr, list_ptr, count_ptr, out_ptr, lse_ptr, grad_ptr, grad_row, grad_step, grad_head,
    dq_ptr, sum_ptr, mean_sum_ptr, fine_grad_ptr, list_grad_ptr, heads, blocks, tokens, fines, room, means, pairs,
    scale, plain,
    G: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what one block of queries of one row and query head adds to all gradients.

    out and dq (B, tokens, H*G, D), its gradient by strides; sum (2, B, H, tokens, D) and mean_sum (2, B, H, means, D)
    float32, keys first; fine_grad (B, H, blocks, G, fines) and list_grad (B, H, blocks, G, room) float32: gradients
    of the biases of opened chunks and of summaries. `plain` is the scale of products, `scale` the same in base 2.
    """
    number, member, pair, row, head, asker, left, right, own = _program(heads, tokens, G, BLOCK, SIDE, CAUSAL)
    column = tl.arange(0, D)
    there = own < tokens
    q = _lines(q_ptr + row * q_row + asker * q_head, own, q_step, there, D)
    grad = _lines(grad_ptr + row * grad_row + asker * grad_head, own, grad_step, there, D)
    target = ((row * tokens + own) * (heads * G) + asker)[:, None] * D + column[None, :]
    out = tl.load(out_ptr + target, mask=there[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(lse_ptr + member.to(tl.int64) * tokens + own, mask=there, other=float("inf"))
    keys = key_ptr + row * key_row + head * key_head
    values = value_ptr + row * value_row + head * value_head
    dk = sum_ptr + pair.to(tl.int64) * tokens * D
    dv = dk + pairs.to(tl.int64) * tokens * D
    dq = tl.zeros((BLOCK, D), tl.float32)
    none = tl.zeros((TILE,), tl.float32)
    for first in tl.range(left, right, TILE):
        token = first + tl.arange(0, TILE)
        live, seen, key, value = _tokens(keys, values, token, key_step, value_step, right, own, CAUSAL, D)
        weight, slope = _slopes(q, grad, lse, delta, key, value, none, seen, scale, PRECISION)
        dq = tl.dot(slope.to(key.dtype), key, dq, input_precision=PRECISION)
        _add(dk, dv, token, live, weight, slope, q, grad, plain, D, PRECISION)
    place = pair.to(tl.int64) * blocks + number
    told = place * G + member % G
    few = tl.zeros((CHUNK,), tl.float32)
    for slot in tl.range(0, tl.load(count_ptr + place * 3 + 1)):
        token = tl.load(fine_ptr + place * fines + slot) * CHUNK + tl.arange(0, CHUNK)
        live, seen, key, value = _tokens(keys, values, token, key_step, value_step, tokens, own, False, D)
        weight, slope = _slopes(q, grad, lse, delta, key, value, few, seen, scale, PRECISION)
        if GATED:
            tl.store(fine_grad_ptr + told * fines + slot, tl.sum(slope))
        dq = tl.dot(slope.to(key.dtype), key, dq, input_precision=PRECISION)
        _add(dk, dv, token, live, weight, slope, q, grad, plain, D, PRECISION)
    count = tl.load(count_ptr + place * 3 + 2)
    mean_keys = mean_ptr + pair.to(tl.int64) * means * D
    mean_values = mean_keys + pairs.to(tl.int64) * means * D
    dk = mean_sum_ptr + pair.to(tl.int64) * means * D
    dv = dk + pairs.to(tl.int64) * means * D
    for first in tl.range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        line, bias, live, seen, key, value = _summaries(
            mean_keys, mean_values, list_ptr + place * room, bias_ptr, at, count, own, D
        )
        weight, slope = _slopes(q, grad, lse, delta, key, value, bias, seen, scale, PRECISION)
        if GATED:
            tl.store(list_grad_ptr + told * room + at, tl.sum(slope, 0), mask=live)
        dq = tl.dot(slope.to(key.dtype), key, dq, input_precision=PRECISION)
        _add(dk, dv, line, live, weight, slope, q, grad, plain, D, PRECISION)
    tl.store(dq_ptr + target, (dq * plain).to(dq_ptr.dtype.element_ty), mask=there[:, None])
