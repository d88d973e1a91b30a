"""What the README offers to change is changed in one place: each test replaces it there, and looks."""

import itertools

import pytest
import torch

import data
import policy
import r2r
import rerec
import rewards
import test_plackett_luce
from steps import Recorder, close, plain_row, replay
from test_step import answers, case, lists, queries, rationales  # noqa: F401
from test_step import RELEVANCE, flags, objective, take_step

@pytest.mark.parametrize("method", ["r2rank"])
def test_another_utility(case, monkeypatch):
    """Reciprocal ranks in the place of NDCG: the step is that of the objective with their expectation."""
    def gains(relevance, k):
        return (relevance > 0).float(), 1 / torch.arange(1.0, k + 1), torch.tensor(1.0)

    def utility(ranked, k):
        return sum((y > 0) / rank for rank, y in enumerate(ranked, start=1))

    replay(monkeypatch, case.rollout)
    (before,), _ = take_step(case, flags(case))
    monkeypatch.setattr(rewards, "discounted_gains", gains)
    monkeypatch.setattr(test_plackett_luce, "ndcg_at_k", utility)  # what `objective` enumerates
    (found,), metrics = take_step(case, flags(case))
    loss, wanted, _ = objective(case, case.model, case.head, flags(case), None, None)
    kept = Recorder(case.model, case.head)
    loss.backward()
    kept.step()
    assert close(found, kept.gradients[0]) and not close(found, before)
    assert metrics["utility"] == pytest.approx(wanted["utility"], abs=1e-5)

@pytest.mark.parametrize("method", ["r2rank"])
def test_another_advantage_of_a_rationale(case, monkeypatch):
    """Credit that is not divided by its deviation: the token loss shrinks by just that factor."""
    replay(monkeypatch, case.rollout)
    args, weights = flags(case, score_gradient="head"), sum(p.numel() for p in case.model.parameters())
    (scaled,), _ = take_step(case, args, case.items[:1])  # the weights learn by the token loss alone
    scores = case.head(case.rollout.hidden[:12]).view(4, 3)
    deviation = r2r.item_values(scores, torch.tensor(RELEVANCE[0])).std() + r2r.DELTA
    monkeypatch.setattr(r2r, "advantages", lambda s, y, credit, noise: r2r.item_credit(s, y, noise=noise))
    (unscaled,), _ = take_step(case, args, case.items[:1])
    assert close(unscaled[:weights], deviation * scaled[:weights]) and unscaled[:weights].any()

@pytest.mark.parametrize("method", ["rerec"])
def test_a_further_term_of_the_reward(case, monkeypatch):
    """Two answers that were worth the same differ by it, and the step prefers the one it rewards."""
    query, case.task.graph = case.items[0], {}
    one, two = [c.title for c in query.candidates if c.id not in query.truths][:2]
    responses = case.tokenizer([f"\\boxed{{{one}}}", f"\\boxed{{{two}}}"]).input_ids
    case.items = [query]
    case.rollout = policy.Rollout([rerec.build_prompt(case.tokenizer, query)], 2, responses)
    replay(monkeypatch, case.rollout)
    assert not take_step(case, flags(case))[0][0].any()

    def further(first, *rest, original=rerec.reward_terms):
        return original(first, *rest) | {"brief": float(first.title == two)}

    monkeypatch.setattr(rerec, "reward_terms", further)
    monkeypatch.setitem(rerec.WEIGHTS, "brief", 0.5)
    (gradient,), _ = take_step(case, flags(case))
    worse, better = (plain_row(case.model, case.rollout, n)[0] for n in (0, 1))
    (worse.sum() / len(worse) - better.sum() / len(better)).backward()
    wanted = torch.cat([p.grad.flatten() for p in case.model.parameters()])
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.999

def test_other_negatives(toy, monkeypatch):
    """Any stream of ids will do: what the user touched is passed over, and the list stays a list."""
    monkeypatch.setattr(data.Dataset, "_proposals", lambda self, *_: itertools.cycle(self.items))
    user, position = toy.targets("train")[0]
    sequence = [x.item_id for x in toy.sequences[user]]
    first = [i for i in toy.items if i not in sequence][:9]
    example = toy.example((user, position), num_candidates=10)
    assert {c.id for c in example.candidates} == {*first, sequence[position]} and sum(example.relevance) == 1
