"""Metrics by hand and against brute force."""

import itertools
import math
import random

import pytest
import torch

from rewards import discounted_gains, hit_at_k, ndcg_at_k, reciprocal_rank


def test_binary_ndcg_by_hand():
    assert ndcg_at_k([1, 0, 0], 10) == 1.0
    assert ndcg_at_k([0, 1, 0], 10) == pytest.approx(1 / math.log2(3))
    assert ndcg_at_k([0, 0, 1], 2) == 0.0
    assert ndcg_at_k([0, 0, 1], 3) == pytest.approx(0.5)


def test_graded_ndcg_by_hand():
    # gains 2^y - 1: 3 -> 7, 2 -> 3, 1 -> 1
    dcg = 1 / math.log2(2) + 7 / math.log2(3) + 0 + 3 / math.log2(5)
    ideal = 7 / math.log2(2) + 3 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at_k([1, 3, 0, 2], 4) == pytest.approx(dcg / ideal)
    assert ndcg_at_k([1, 3, 0, 2], 1) == pytest.approx(1 / 7)


def test_ideal_is_over_all_candidates_not_over_the_first_k():
    assert ndcg_at_k([0, 0, 1, 1], 2) == 0.0
    assert ndcg_at_k([1, 0, 1, 1], 2) == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_ndcg_is_one_only_for_ideal_orders():
    for order in itertools.permutations([0, 0, 1, 2]):
        assert (ndcg_at_k(order, 3) == pytest.approx(1.0)) == (list(order[:2]) == [2, 1])


def test_nothing_relevant_is_zero():
    assert ndcg_at_k([0, 0], 2) == hit_at_k([0, 0], 2) == reciprocal_rank([0, 0]) == 0.0
    assert ndcg_at_k([], 5) == 0.0


def test_hit_and_reciprocal_rank():
    assert [hit_at_k([0, 0, 1], k) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]
    assert reciprocal_rank([0, 0, 1, 1]) == pytest.approx(1 / 3)


def test_random_ranking_of_twenty():
    rng = random.Random(0)
    values = [ndcg_at_k(rng.sample([1] + [0] * 19, 20), 10) for _ in range(20000)]
    assert sum(values) / len(values) == pytest.approx(0.227, abs=0.005)  # METHODS, "Protocol"


def test_tensor_form_agrees():
    relevance = torch.tensor([0.0, 2.0, 1.0, 0.0, 3.0])
    gains, discounts, ideal = discounted_gains(relevance, 3)
    assert ((gains[:3] * discounts).sum() / ideal).item() == pytest.approx(ndcg_at_k(relevance.tolist(), 3), abs=1e-6)
