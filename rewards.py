"""Rewards and ranking metrics. A ranking is given as the relevance of *all* its candidates, best-ranked first.

    DCG@k = sum_{r<=k} (2^y_r - 1) / log2(r + 1)        NDCG@k = DCG@k / DCG@k of the ideal order
"""

import math

import torch


def ndcg_at_k(ranked_relevance, k):
    """NDCG@k in [0, 1] with gain 2^y - 1 and discount 1/log2(rank + 1); 0 when nothing is relevant."""
    def dcg(relevance):
        return sum((2.0**y - 1.0) / math.log2(r + 2) for r, y in enumerate(relevance[:k]))

    ranked_relevance = [float(y) for y in ranked_relevance]
    ideal = dcg(sorted(ranked_relevance, reverse=True))
    return dcg(ranked_relevance) / ideal if ideal > 0 else 0.0


def hit_at_k(ranked_relevance, k):
    """1.0 when one of the first k is relevant, else 0.0."""
    return float(any(y > 0 for y in ranked_relevance[:k]))


def reciprocal_rank(ranked_relevance):
    """1 / rank of the first relevant candidate; 0.0 when there is none."""
    return next((1.0 / (r + 1) for r, y in enumerate(ranked_relevance) if y > 0), 0.0)


def discounted_gains(relevance, k):
    """gains 2^y - 1 (K,), discounts 1/log2(rank + 1) (k,), and the ideal DCG@k (scalar), as tensors."""
    gains = torch.exp2(relevance) - 1
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=gains.dtype, device=gains.device))
    return gains, discounts, (gains.sort(descending=True).values[:k] * discounts).sum()
