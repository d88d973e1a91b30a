"""Plackett-Luce, exact and sampled, and the credit of rationales, against enumeration of all permutations."""

import itertools
import math

import pytest
import torch

import r2r
from rewards import ndcg_at_k

RELEVANCE = [[0, 1, 0], [1, 0, 0, 1], [0, 2, 1, 0, 3], [0, 0, 0, 0, 1]]

def enumerate_value(scores, relevance, k):
    """V(s): P(sigma) NDCG(sigma) summed over all K! permutations, P from its definition. Differentiable."""
    value = 0.0
    for order in itertools.permutations(range(len(scores))):
        left, probability = list(order), 1.0
        for i in order:
            probability = probability * scores[i].exp() / sum(scores[j].exp() for j in left)
            left.remove(i)
        value = value + probability * ndcg_at_k([relevance[i] for i in order], k)
    return value

def random_scores(size, scale, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale

def gradient_of(loss, scores):
    return torch.autograd.grad(loss, scores)[0]

def test_log_prob_is_the_definition_sums_to_one_and_truncates_to_the_marginal():
    scores = random_scores(5, 2.0)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    probs = r2r.pl_log_prob(scores, orders).exp()
    assert probs.shape == (120,) and probs.sum().item() == pytest.approx(1.0, abs=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    by_hand = sum(scores[order[k]] - torch.logsumexp(scores[order[k:]], 0) for k in range(5))
    assert r2r.pl_log_prob(scores, order).item() == pytest.approx(by_hand.item(), abs=1e-12)
    marginal = probs[(orders[:, :2] == order[:2]).all(1)].sum()
    truncated = r2r.pl_log_prob(scores, order, top_k=2).exp()
    assert truncated.item() == pytest.approx(marginal.item(), abs=1e-12)

def test_samples_follow_the_distribution():
    scores = random_scores(4, 1.0)
    n = 40000
    samples = r2r.pl_sample(scores, n, torch.Generator().manual_seed(3))
    assert samples.shape == (n, 4) and (samples.sort(-1).values == torch.arange(4)).all()
    for order in itertools.permutations(range(4)):
        p = r2r.pl_log_prob(scores, torch.tensor(order)).exp().item()
        seen = (samples == torch.tensor(order)).all(1).double().mean().item()
        assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / n)

@pytest.mark.parametrize("relevance", RELEVANCE)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 15.0])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_exact_value_and_gradient_against_enumeration(relevance, scale, k):
    scores = random_scores(len(relevance), scale, seed=len(relevance)).requires_grad_()
    want = enumerate_value(scores, relevance, k)
    got = r2r.expected_ndcg(scores, torch.tensor(relevance), k)
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    torch.testing.assert_close(gradient_of(got, scores), gradient_of(want, scores), atol=1e-6, rtol=1e-5)

def test_exact_value_of_a_long_list_is_the_mean_over_sampled_rankings():
    scores, relevance = random_scores(20, 1.5), torch.arange(20.0) % 4
    orders = r2r.pl_sample(scores, 20000, torch.Generator().manual_seed(0))
    drawn = r2r.permutation_ndcg(orders, relevance).double()
    error = drawn.std() / len(drawn) ** 0.5
    assert (drawn.mean() - r2r.expected_ndcg(scores, relevance, 10)).abs() < 4 * error < 0.01

def test_large_gaps_stay_finite_and_no_relevant_candidate_is_worth_nothing():
    scores = torch.tensor([[1000.0, -1000.0, 0.0, 60.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    orders, nothing = torch.tensor([[0, 2, 1, 3], [1, 2, 0, 3]]), torch.zeros(4)
    log_probs = r2r.pl_log_prob(scores[:, None], orders)
    assert log_probs.shape == (2, 2) and log_probs.isfinite().all()
    value = r2r.expected_ndcg(scores, torch.tensor([0, 1, 1, 0]), 2)
    assert value[0].item() == pytest.approx(0.0, abs=1e-6)
    assert gradient_of(log_probs.sum() + value.sum(), scores).isfinite().all()
    value = r2r.expected_ndcg(scores, nothing, 10)
    assert torch.equal(value, torch.zeros(2)) and not gradient_of(value.sum(), scores).any()
    assert torch.equal(r2r.permutation_ndcg(orders, nothing), torch.zeros(2))

@pytest.mark.parametrize("relevance", RELEVANCE[1:3])
def test_both_score_losses_have_the_gradient_of_the_enumerated_value(relevance):
    """REINFORCE within its standard error over many draws, calmed by its leave-one-out baseline; exact to
    1e-5. Column by column."""
    K, k, M = len(relevance), 3, 8
    target = torch.tensor(relevance, dtype=torch.float64)
    scores = random_scores((K, 2), 1.5, seed=7).requires_grad_()
    want = gradient_of(sum(enumerate_value(column, relevance, k) for column in scores.T), scores)
    exact = gradient_of(r2r.score_loss(scores, target, k)[0].sum(), scores)
    torch.testing.assert_close(-exact, want, atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    noises = [r2r.gumbel((M, K), generator).double() for _ in range(4000)]
    draws = -torch.stack([gradient_of(r2r.score_loss(scores, target, k, n)[0].sum(), scores) for n in noises])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - want).abs() < 5 * error + 1e-12).all()
    assert (error < 0.01).all()  # so that a wrong factor could not hide in the error
    plain = []
    for n in noises[:500]:
        orders = (scores.detach().T[:, None] + n).argsort(-1, descending=True)
        terms = r2r.permutation_ndcg(orders, target, k) * r2r.pl_log_prob(scores.T[:, None], orders, k)
        plain.append(gradient_of(terms.mean(1).sum(), scores))
    assert draws[:500].var(0).sum() < 0.5 * torch.stack(plain).var(0).sum()

def brute_force_credit(scores, relevance, k):
    K, G = scores.shape
    values = torch.zeros(K, G, dtype=scores.dtype)
    for i in range(K):
        for g in range(G):
            for other in range(G):
                column = scores[:, other].clone()
                column[i] = scores[i, g]
                values[i, g] += enumerate_value(column, relevance, k) / G
    return values - values.mean(1, keepdim=True)

@pytest.mark.parametrize("relevance", RELEVANCE)
@pytest.mark.parametrize("elements", [1, 1000, 2**24])  # however many lists are re-scored at once
def test_item_credit_by_brute_force(relevance, elements, monkeypatch):
    monkeypatch.setattr(r2r, "CREDIT_ELEMENTS", elements)
    scores, target = random_scores((len(relevance), 3), 2.0, seed=2), torch.tensor(relevance).double()
    noise = r2r.gumbel((20000, len(relevance))).double()
    want = brute_force_credit(scores, relevance, 3)
    for given, atol in ((None, 1e-6), (noise, 0.01)):  # exact, and sampled
        torch.testing.assert_close(r2r.item_credit(scores, target, 3, given), want, atol=atol, rtol=0)

def test_advantages_by_their_formulas():
    scores, relevance = random_scores((5, 4), 1.5), torch.tensor(RELEVANCE[2], dtype=torch.float64)
    values = r2r.item_values(scores, relevance)
    want = (values - values.mean(1, keepdim=True)) / (values.std() + r2r.DELTA)
    torch.testing.assert_close(r2r.advantages(scores, relevance), want)
    returns = r2r.expected_ndcg(scores.T, relevance, 10)
    want = (returns - returns.mean()) / (returns.std() + r2r.DELTA)
    torch.testing.assert_close(r2r.advantages(scores, relevance, credit="list"), want.expand(5, -1))
    for credit in ("item", "list"):  # rationales that are alike, or the only ones, have none
        for alike in (scores[:, :1].expand(5, 4), scores[:, :1]):
            assert r2r.advantages(alike, relevance, credit=credit).abs().max() < 1e-2
