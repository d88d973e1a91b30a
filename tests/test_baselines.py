"""LightGCN and SASRec: the propagation, its gradient, the training signal, causality, padding, determinism."""

import pytest
import torch

from eval import SASRec, fit_sasrec, pad
from rewards import LightGCN, fit_lightgcn

# Two duplicates; user 2 and items 3 and 4 have no edge.
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2], [1, 1], [3, 0], [0, 0]])


def dense_propagation(weight, num_users, num_items, pairs, layers):
    """(A_hat^0 + … + A_hat^L) E0 / (L + 1) by loops and dense matrices, in E0's precision."""
    A = torch.zeros(num_users + num_items, num_users + num_items, dtype=weight.dtype)
    for u, i in set(map(tuple, pairs.tolist())):
        A[u, num_users + i] = A[num_users + i, u] = 1
    D = torch.diag(torch.tensor([1 / d**0.5 if d > 0 else 0.0 for d in A.sum(1).tolist()], dtype=weight.dtype))
    A_hat = D @ A @ D
    return sum(torch.matrix_power(A_hat, n) @ weight for n in range(layers + 1)) / (layers + 1)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_and_its_gradient_are_those_of_the_dense_matrix(layers):
    model = LightGCN(4, 5, PAIRS, dim=6, layers=layers).double()
    degree = model.offsets.diff()
    exact = (degree.repeat_interleave(degree) * degree[model.neighbours]).double().rsqrt()
    torch.testing.assert_close(model.weights, exact, rtol=2e-7, atol=0)  # A_hat is held in float32; all else is held against float64
    model.weights = exact
    users, items = model.propagate()
    assert users.shape == (4, 6) and items.shape == (5, 6)
    weight = model.embedding.detach().clone().requires_grad_()
    expected = dense_propagation(weight, 4, 5, PAIRS, layers)
    torch.testing.assert_close(torch.cat([users, items]), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(users[2], model.embedding[2] / (layers + 1))  # isolated: its own share of the mean, no NaN
    direction = torch.randn_like(expected)
    (torch.cat([users, items]) * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(model.embedding.grad, weight.grad, rtol=1e-10, atol=1e-12)


def blocks():
    """20 users and 20 items in two blocks; each user has 6 of the 10 items of their block."""
    generator = torch.Generator().manual_seed(0)
    rows = [(u, 10 * (u // 10) + i) for u in range(20) for i in torch.randperm(10, generator=generator)[:6].tolist()]
    return torch.tensor(rows)


def test_bpr_ranks_unseen_items_of_the_own_block_higher():
    pairs = blocks()
    model = fit_lightgcn(20, 20, pairs, dim=8, layers=2, epochs=60, batch_size=64)
    users, items = model.propagate()
    scores = users @ items.T  # (20, 20)
    own = torch.arange(20)[:, None] // 10 == torch.arange(20) // 10
    unseen = own.clone()
    unseen[pairs[:, 0], pairs[:, 1]] = False
    lowest_unseen = scores.masked_fill(~unseen, float("inf")).amin(1)
    highest_other = scores.masked_fill(own, -float("inf")).amax(1)
    assert (lowest_unseen > highest_other).all()


def test_bpr_and_its_regulariser_step_by_step():
    """Each user has all items but one, the negative: full batches, so twenty steps of Adam on the written loss, propagated densely."""
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u])
    fit = lambda epochs: fit_lightgcn(4, 4, pairs, dim=6, layers=2, epochs=epochs, lr=0.05, l2=0.5).embedding.detach()
    weight = fit(0).double().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    rows = torch.stack([pairs[:, 0], 4 + pairs[:, 1], 4 + pairs[:, 0]])  # user, item, the item that the user lacks
    for _ in range(20):
        u, i, j = dense_propagation(weight, 4, 4, pairs, 2)[rows]
        loss = -torch.log(torch.sigmoid((u * i).sum(1) - (u * j).sum(1))).mean() + 0.5 * weight[rows].square().sum(-1).sum(0).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(fit(20), weight.detach().float(), atol=1e-4, rtol=1e-4)


def test_lightgcn_counts_a_pair_once_and_follows_from_its_seed():
    pairs = blocks()
    state = torch.get_rng_state()
    fits = [fit_lightgcn(20, 20, p, dim=8, epochs=3, seed=s).embedding for p, s in
            ((pairs, 1), (torch.cat([pairs, pairs[:30]]), 1), (pairs.flip(0), 1), (pairs, 2))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])
    assert not torch.equal(fits[0], fits[3])


def test_lightgcn_draws_no_negative_that_the_user_has():
    """With one item left per user, every negative is that item; a user who has everything is skipped, not looped over."""
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u or u == 3])
    start = fit_lightgcn(4, 4, pairs, dim=4, layers=0, epochs=0, l2=0.0).embedding.detach()
    fitted = fit_lightgcn(4, 4, pairs, dim=4, layers=0, epochs=200, l2=0.0)
    users, items = fitted.propagate()
    scores = users @ items.T
    for u in range(3):
        assert (scores[u] > scores[u, u])[torch.arange(4) != u].all()
    assert torch.equal(fitted.embedding[3], start[3])


@pytest.mark.parametrize("fit", ["lightgcn", "sasrec"])
def test_the_best_state_is_returned_and_patience_ends_training(fit):
    values, states = iter([0.1, 0.5, 0.2, 0.3, 0.9]), []

    def evaluate(model):
        assert not model.training
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(values)

    if fit == "lightgcn":
        model = fit_lightgcn(20, 20, blocks(), dim=4, epochs=50, evaluate=evaluate, every=2, patience=2)
    else:
        model = fit_sasrec(6, [[0, 1, 2], [3, 4, 5]], evaluate, epochs=50, every=2, patience=2, dim=4)
    assert len(states) == 4 and not model.training  # 0.5 is the best; two worse ones later it stops, before 0.9
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, states[3][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fit", ["lightgcn", "sasrec"])
def test_evaluation_chooses_but_does_not_steer(fit):
    """What evaluate knows (held-out interactions) may pick the epoch, and nothing else."""
    def train(evaluate):
        if fit == "lightgcn":
            return fit_lightgcn(20, 20, blocks(), dim=4, epochs=6, evaluate=evaluate, every=1).embedding
        return fit_sasrec(6, [[0, 1, 2], [3, 4, 5]], evaluate, epochs=6, every=1, dim=4).items.weight

    values = iter(range(6))
    assert torch.equal(train(None), train(lambda model: float(next(values))))  # better each time: the last state is the best


@pytest.mark.parametrize("fit", [lambda: fit_lightgcn(2, 2, torch.tensor([[0, 0], [0, 1]])), lambda: fit_sasrec(2, [[0], []]),
                                 lambda: fit_lightgcn(2, 2, torch.zeros(0, 2, dtype=torch.long))])
def test_data_with_nothing_to_learn_is_an_error(fit):
    with pytest.raises(ValueError, match="at least one"):
        fit()


def small_sasrec():
    torch.manual_seed(0)
    return SASRec(30, dim=16, max_len=8).eval()


def test_sasrec_is_causal():
    model = small_sasrec()
    a = torch.randint(1, 31, (4, 8))
    for grad in (True, False):  # without gradients torch takes its fused path
        with torch.set_grad_enabled(grad):
            for t in range(1, 8):
                b = a.clone()
                b[:, t] = a[:, t] % 30 + 1
                before, after = model(a), model(b)
                torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-5)
                assert ((before[:, t:] - after[:, t:]).abs().amax(-1) > 1e-3).all()


def test_sasrec_scores_do_not_depend_on_the_batch_or_on_what_is_cut():
    model = small_sasrec()
    histories = [[3, 1, 4], [], [1], list(range(20)), [5, 9, 2, 6, 5, 3]]
    together = model.scores(histories)
    assert together.shape == (5, 30)
    for row, history in zip(together, histories):
        torch.testing.assert_close(row, model.scores([history])[0], rtol=0, atol=1e-5)
    assert torch.equal(together[1], torch.zeros(30))  # no history: all items tie
    assert torch.equal(model.scores([[]]), torch.zeros(1, 30))
    torch.testing.assert_close(together[3], model.scores([list(range(12, 20))])[0], rtol=0, atol=1e-5)  # the last max_len count
    with torch.enable_grad():  # with gradients torch takes its ordinary path: same numbers
        hidden = model(pad([[4, 2, 5]], "cpu")[0])
    torch.testing.assert_close(together[0], hidden[0, -1] @ model.items.weight[1:].T, rtol=0, atol=1e-5)


def test_sasrec_learns_a_cycle_and_leaves_the_global_random_state_alone():
    ring = 7  # 0 -> 1 -> ... -> 6 -> 0; sequences of 2 to 4 items, so that every user leaves some of the ring as negatives
    sequences = [[(start + n) % ring for n in range(length)] for start in range(ring) for length in (1, 2, 3, 4)]
    state = torch.get_rng_state()
    a, b, c = (fit_sasrec(ring, sequences, epochs=100, lr=1e-2, seed=s, dim=16, dropout=0.1) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    histories = [[(start + n) % ring for n in range(length)] for start in range(ring) for length in (1, 2, 3)]
    scores = a.scores(histories)
    for row, history in zip(scores, histories):
        row[history] = -float("inf")  # never negatives of one another, so the history is excluded, as in the evaluation
        assert row.argmax() == (history[-1] + 1) % ring
    assert torch.equal(a.scores(histories), b.scores(histories))
    assert not torch.equal(a.scores(histories), c.scores(histories))


def test_sasrec_masks_the_users_own_items_also_those_cut_from_the_input():
    """The only negatives left are items of the same user, before the cut: nothing is left to learn, the loss is 0."""
    sequences = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    start, fitted = (fit_sasrec(5, sequences, epochs=e, dim=8, max_len=2) for e in (0, 3))
    assert all(torch.equal(v, fitted.state_dict()[k]) for k, v in start.state_dict().items())
