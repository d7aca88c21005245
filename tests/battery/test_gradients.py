"""P7: gradients with the selection frozen, and under gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mgam.engine import read
from mgam.plan import Plan
from mgam.policies import Policy
from mgam.pyramid import Pyramid
from mgam.schedule import Lookahead

from .oracle import dense
from .trial import SCALE, Frozen, Trial

TOKENS = 41
trained = pytest.mark.parametrize("backend", ["torch"])
"""Backends whose gradients are checked against finite differences; the others are compared with the reference."""


@pytest.fixture
def lookahead() -> Lookahead:
    """Who decided does not matter to a gradient with the selection frozen."""
    return "none"


def once(
    trial: Trial, queries: Tensor, keys: Tensor, values: Tensor, policy: Policy | None = None, dense_until: int = 0
) -> Tensor:
    """One pass as in training: a pyramid over the whole text."""
    rows, _, tokens, _ = queries.shape
    plan = Plan.of([trial.schedule(30, 0)] * rows, [0] * rows, [tokens] * rows, tokens, dense_until)
    reading = trial.reading(dense_until, policy)
    return read(queries, Pyramid.of(keys, values, trial.levels), plan, reading, SCALE)


@trained
def test_gradcheck_with_frozen_selection(trial: Trial) -> None:
    states, dense_until = trial.states(TOKENS), 11
    frozen = Frozen.of(trial, states, trial.schedule(30, 0), dense_until=dense_until)
    leaves = [part.requires_grad_() for part in states]
    assert torch.autograd.gradcheck(lambda *parts: once(trial, *parts, frozen, dense_until), leaves, fast_mode=True)


def test_backends_agree_on_gradients(trial: Trial) -> None:
    """Gradients of queries, keys and values, through summaries too, against the reference."""
    grads = []
    for backend in (trial.backend, "reference"):
        leaves = [part.requires_grad_() for part in trial.states(TOKENS)]
        out = once(Trial(trial.case, backend, trial.positions), *leaves, dense_until=5)
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **trial.tolerance)


def test_gradient_of_a_generous_policy_is_dense(trial: Trial) -> None:
    states = trial.states(TOKENS)
    leaves = [part.requires_grad_() for part in states]
    generous = trial.case.policy(SCALE, **trial.case.generous)
    grads = [
        torch.autograd.grad(out.sin().sum(), leaves)
        for out in (once(trial, *leaves, generous), dense(*leaves, SCALE, trial.rotated))
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **trial.tolerance)


@trained
def test_gradient_checkpointing_changes_nothing(trial: Trial) -> None:
    leaves = [part.requires_grad_() for part in trial.states(TOKENS, rows=2)]
    plain = torch.autograd.grad(once(trial, *leaves).sin().sum(), leaves)
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(lambda *parts: once(trial, *parts), *leaves, use_reentrant=reentrant).sin().sum().backward()
        for leaf, grad in zip(leaves, plain, strict=True):
            torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0)


def test_the_search_takes_no_gradient(trial: Trial) -> None:
    """What is searched and how is no part of the graph: a selection is frozen in every backward pass."""
    leaves = [part.requires_grad_() for part in trial.states(TOKENS)]
    pyramid = Pyramid.of(leaves[1], leaves[2], trial.levels)
    assert pyramid.search is not None
    assert not pyramid.search.requires_grad
