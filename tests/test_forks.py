"""What the README offers to change is changed in one place: each test replaces it there, and looks."""

import itertools

import pytest
import torch

import data
import policy
import r2r
import rerec
import rewards
from data import Example, Item, Query
from steps import Recorder, plain_row, replay, settings

ITEMS = [Item(f"i{n}", title, {"kind": (title,)}) for n, title in enumerate(("Soap", "Cream", "Mask"))]
REQUEST = Query("q", "Something good, please.", "explicit", 1, ITEMS, ("i0",))
RELEVANCE = [0.0, 1.0, 0.0]

def ranking_step(model, tokenizer, head, monkeypatch, **changes):
    """(gradient of the model's weights, scores (3, 2)) of a step on one list, with the same rationales."""
    responses, kept = tokenizer(["yes", "no", "rose", "mint cream", "a", "b"]).input_ids, Recorder(model)
    rollout = policy.Rollout([r2r.build_prompt(tokenizer, ITEMS[:1], ITEMS)], 2, responses)
    replay(monkeypatch, rollout)
    lists, args = [Example("u", ITEMS[:1], ITEMS, RELEVANCE)], settings(group_size=2, **changes)
    r2r.train_step(model, tokenizer, head, lists, kept, args)
    head.zero_grad()
    with torch.no_grad():
        scores = torch.stack([head(plain_row(model, rollout, n)[1]) for n in range(6)])
    return kept.gradients[0], scores.view(3, 2)

def answering_step(model, tokenizer, responses, monkeypatch):
    """(gradient of a step on REQUEST with these responses, their rollout)"""
    prompt, args = rerec.build_prompt(tokenizer, REQUEST), settings("rerec", group_size=len(responses))
    rollout = policy.Rollout([prompt], len(responses), tokenizer(responses).input_ids)
    task, kept = rerec.Task(rerec.CurriculumQueue(["q"], 1)), Recorder(model)
    replay(monkeypatch, rollout)
    rerec.train_step(model, tokenizer, task, [REQUEST], kept, args)
    return kept.gradients[0], rollout

def test_another_utility(model, tokenizer, score_head, monkeypatch):
    """MRR in the place of NDCG: the score loss has the gradient of the enumerated expectation."""
    def reciprocal_ranks(relevance, k):
        return (relevance > 0).float(), 1 / torch.arange(1.0, k + 1), torch.tensor(1.0)

    monkeypatch.setattr(rewards, "discounted_gains", reciprocal_ranks)
    scores = ranking_step(model, tokenizer, score_head, monkeypatch)[1].requires_grad_()
    rollout = policy.Rollout([policy.Prompt([], [[]] * 3)], 2)
    gradient, _, utility, _ = r2r.learning_signal(rollout, scores.flatten(), [torch.tensor(RELEVANCE)], 1)
    value = sum(r2r.pl_log_prob(s, torch.tensor(o)).exp() / (1 + o.index(1)) / 2  # reciprocal rank of item 1
                for s in scores.T for o in itertools.permutations(range(3)))
    (wanted,) = torch.autograd.grad(-value, scores)
    torch.testing.assert_close(gradient.view(3, 2), wanted, atol=1e-6, rtol=0)
    assert utility == [pytest.approx(value.item(), abs=1e-5)]

def test_another_advantage_of_a_rationale(model, tokenizer, score_head, monkeypatch):
    """Credit that is not divided by its deviation: the token loss shrinks by just that factor."""
    options = {"score_gradient": "head"}  # the model learns by the token loss alone
    scaled, scores = ranking_step(model, tokenizer, score_head, monkeypatch, **options)
    deviation = r2r.item_values(scores, torch.tensor(RELEVANCE)).std() + r2r.DELTA
    monkeypatch.setattr(r2r, "advantages", lambda s, y, credit, noise: r2r.item_credit(s, y, noise=noise))
    unscaled = ranking_step(model, tokenizer, score_head, monkeypatch, **options)[0]
    assert (unscaled - deviation * scaled).norm() < 1e-4 * unscaled.norm() and unscaled.any()

def test_a_further_term_of_the_reward(model, tokenizer, monkeypatch):
    """Two answers that were worth the same differ by it, and the step prefers the one it rewards."""
    responses = ["\\boxed{Cream}", "\\boxed{Mask}"]
    assert not answering_step(model, tokenizer, responses, monkeypatch)[0].any()

    def further(first, *rest, original=rerec.reward_terms):
        return original(first, *rest) | {"brief": float(first.title == "Mask")}

    monkeypatch.setattr(rerec, "reward_terms", further)
    monkeypatch.setitem(rerec.WEIGHTS, "brief", 0.5)
    gradient, rollout = answering_step(model, tokenizer, responses, monkeypatch)
    worse, better = (plain_row(model, rollout, n)[0] for n in (0, 1))
    (worse.sum() / len(worse) - better.sum() / len(better)).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.999

def test_other_negatives(toy, monkeypatch):
    """Any stream of ids will do: what the user touched is passed over, and the list stays a list."""
    monkeypatch.setattr(data.Dataset, "_proposals", lambda self, *_: itertools.cycle(self.items))
    user, position = toy.targets("train")[0]
    sequence = [x.item_id for x in toy.sequences[user]]
    first = [i for i in toy.items if i not in sequence][:9]
    example = toy.example((user, position), num_candidates=10)
    assert {c.id for c in example.candidates} == {*first, sequence[position]} and sum(example.relevance) == 1
