"""LightGCN: its propagation and gradient, the BPR loss and its negatives, when it stops, determinism."""

import pytest
import torch

from data import InputError
from rewards import LightGCN, fit_lightgcn

# Two duplicates; user 2 and items 3 and 4 have no edge.
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2], [1, 1], [3, 0], [0, 0]])

def dense_propagation(weight, num_users, num_items, pairs, layers):
    """(A_hat^0 + … + A_hat^L) E0 / (L + 1) by loops and dense matrices."""
    A = torch.zeros(num_users + num_items, num_users + num_items, dtype=weight.dtype)
    for u, i in pairs.tolist():
        A[u, num_users + i] = A[num_users + i, u] = 1
    D = torch.diag(torch.where(A.sum(1) > 0, A.sum(1).rsqrt(), 0))
    return sum(torch.matrix_power(D @ A @ D, n) @ weight for n in range(layers + 1)) / (layers + 1)

@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_and_its_gradient_are_those_of_the_dense_matrix(layers):
    model = LightGCN(4, 5, PAIRS, dim=6, layers=layers)
    weight = model.embedding.detach().clone().requires_grad_()
    found, expected = torch.cat(model.propagate()), dense_propagation(weight, 4, 5, PAIRS, layers)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(model.embedding.grad, weight.grad)

def test_bpr_and_its_regulariser_step_by_step():
    """Each user has all items but one, the negative: then the steps of Adam can be written down."""
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u])

    def fit(epochs):
        return fit_lightgcn(4, 4, pairs, dim=6, layers=2, epochs=epochs, lr=0.05, l2=0.5).embedding.detach()

    weight = fit(0).double().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    rows = torch.stack([pairs[:, 0], 4 + pairs[:, 1], 4 + pairs[:, 0]])  # user, item, the item the user lacks
    for _ in range(20):
        u, i, j = dense_propagation(weight, 4, 4, pairs, 2)[rows]
        penalty = 0.5 / 2 * weight[rows].square().sum(-1).sum(0).mean()
        loss = -torch.log(torch.sigmoid((u * i).sum(1) - (u * j).sum(1))).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(fit(20), weight.detach().float(), atol=1e-4, rtol=1e-4)

def test_a_pair_counts_once_and_seed_and_stop_decide():
    pairs = torch.tensor([(u, (7 * u + i * i) % 20) for u in range(20) for i in range(5)])
    state = torch.get_rng_state()

    def fit(pairs=pairs, **options):
        return fit_lightgcn(20, 20, pairs, dim=8, **({"epochs": 3, "seed": 1} | options)).embedding

    first = fit()
    same = (fit(torch.cat([pairs, pairs[:30]])), fit(pairs.flip(0)),
            fit(epochs=50, stop=lambda model, epoch: epoch == 3))
    assert all(torch.equal(first, other) for other in same) and not torch.equal(first, fit(seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    for useless in (torch.tensor([[0, 0], [0, 1]]), torch.zeros(0, 2, dtype=torch.long)):
        with pytest.raises(InputError, match="at least one"):
            fit_lightgcn(2, 2, useless)

def test_a_user_who_has_every_item_is_skipped():
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u or u == 3])
    start, fitted = (fit_lightgcn(4, 4, pairs, dim=4, layers=0, epochs=n, l2=0.0) for n in (0, 200))
    assert (fitted.embedding != start.embedding).any(1).tolist() == [True] * 3 + [False] + [True] * 4
