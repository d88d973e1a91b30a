"""R2Rank's step, ranking and head: against the written objective, and what must not change a result."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import policy
import r2r
import train
from steps import Recorder, close, pad_logprobs, plain_row, replay, settings, token_terms
from test_plackett_luce import enumerate_value

RELEVANCE = [[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0]]

@pytest.fixture(scope="module")
def lists(toy):
    """Two lists, of 4 and 3 candidates, with histories of unequal length."""
    return [replace(e, history=e.history[n:], candidates=e.candidates[:len(y)], relevance=y)
            for n, (e, y) in enumerate(zip(toy.examples("test", 2), RELEVANCE))]

@pytest.fixture(scope="module")
def rollout(model_and_tokenizer, lists):
    """Three sampled rationales a candidate, of unequal lengths."""
    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    found = r2r.reason(model, tokenizer, [(e.history, e.candidates) for e in lists], settings(), 3)
    found.responses[2], found.responses[5] = found.responses[2][:4], found.responses[5][:1]
    found.hidden = policy.all_logprobs(model, found)[1]
    return found

def objective(model, head, rollout, args, old_rows=None, reference=None):
    """Score loss + token loss + KL as written, in one graph: (loss, metrics)."""
    size = range(len(rollout.owner))
    pairs = [plain_row(model, rollout, n, args.temperature) for n in size]
    rows, hidden = [p[0] for p in pairs], torch.stack([p[1] for p in pairs])
    scores = head(hidden.detach() if args.score_gradient == "head" else hidden)
    columns = [(s, torch.tensor(y)) for s, y in zip(rollout.by_list(scores), RELEVANCE)]
    values = [torch.stack([enumerate_value(c, y.tolist(), 10) for c in s.T]).mean() for s, y in columns]
    advantages = torch.cat([r2r.advantages(s.detach(), y, credit=args.credit).flatten() for s, y in columns])
    with torch.no_grad():
        refs = [plain_row(reference, rollout, n, args.temperature)[0] for n in size] if args.kl_coef else rows
    loss, metrics = token_terms(rows, old_rows or [r.detach() for r in rows], refs, advantages, args.kl_coef)
    utility = sum(values) / len(values)
    return args.token_weight * loss - utility, metrics | {"utility": utility.item()}

def take_step(model, head, tokenizer, lists, args, reference=None, **recorder):
    """(gradients of each update, metrics) of r2r.train_step on copies of model and head."""
    model, head = copy.deepcopy((model, head))
    kept = Recorder(model, head, **recorder)
    metrics = r2r.train_step(model.train(), tokenizer, head, lists, kept, args, reference)
    return kept.gradients, metrics

@pytest.mark.parametrize("changes", [
    {}, {"credit": "list"}, {"credit": "none"}, {"score_gradient": "head"},
    {"kl_coef": 0.3, "temperature": 0.7}, {"kl_coef": 0.3, "ppo_epochs": 2}, {"no_reasoning": True}],
    ids=lambda changes: "-".join(changes) or "default")
def test_a_step_follows_the_written_objective(
        model, tokenizer, score_head, lists, rollout, changes, monkeypatch):
    """Also of a second update, when weights and scores have moved so far that the clip acts."""
    args = settings(**changes)
    if args.no_reasoning:
        rollout = r2r.reason(model, tokenizer, [(e.history, e.candidates) for e in lists], args, 1)
    replay(monkeypatch, rollout)
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.data += 0.01 * torch.randn_like(p)
    found, metrics = take_step(model, score_head, tokenizer, lists, args, moved, rate=0.3)
    model, head = copy.deepcopy((model, score_head))
    kept, old_rows, utility = Recorder(model, head, rate=0.3), None, []
    for _ in range(args.ppo_epochs):
        loss, wanted = objective(model, head, rollout, args, old_rows, moved)
        utility.append(wanted.pop("utility"))
        with torch.no_grad():
            old_rows = [plain_row(model, rollout, n, args.temperature)[0] for n in range(len(rollout.owner))]
        loss.backward()
        kept.step()
    assert len(found) == args.ppo_epochs and all(map(close, found, kept.gradients))
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert metrics["utility"] == pytest.approx(utility[0], abs=1e-5)  # of the rollout, before any update
    assert metrics["grad_norm"] == pytest.approx(found[-1].norm().item())
    # On policy nothing is clipped; off policy the test would show nothing if nothing were.
    assert 0 < metrics["clipped"] < 1 if args.ppo_epochs == 2 else metrics["clipped"] == 0

def test_what_each_part_of_the_gradient_trains(model, tokenizer, score_head, lists, rollout, monkeypatch):
    """No credit: the score loss alone. score_gradient "head": it reaches the head alone. They add up."""
    replay(monkeypatch, rollout)
    weights = sum(p.numel() for p in model.parameters())
    found, none, head = [], {"credit": "none"}, {"score_gradient": "head"}
    for changes in ({}, none, head, none | head):
        (gradient,), metrics = take_step(model, score_head, tokenizer, lists, settings(**changes))
        found.append(gradient[:weights])
        assert (metrics["token_loss"] == 0) == ("credit" in changes) and gradient[weights:].any()
    whole, scores, tokens, neither = found
    assert close(scores + tokens, whole) and scores.any() and tokens.any() and not neither.any()

def test_micro_batches_and_sharing_change_nothing(model, tokenizer, score_head, lists, rollout, monkeypatch):
    """What is computed beyond a response's end does not count, either."""
    replay(monkeypatch, rollout)
    args = settings(kl_coef=0.3, ppo_epochs=2)
    wanted, metrics = take_step(model, score_head, tokenizer, lists, args, model, rate=0.3)
    pad_logprobs(monkeypatch)
    for micro_batch, share in ((1, True), (4, False), (100, True)):
        monkeypatch.setattr(policy, "SHARE_PREFIX", share)
        args.micro_batch = micro_batch
        found, again = take_step(model, score_head, tokenizer, lists, args, model, rate=0.3)
        assert all(map(close, found, wanted))
        for name in ("utility", "token_loss", "kl", "clipped", "entropy", "score_std", "length"):
            assert again[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-4), name

def test_the_order_of_candidates_changes_nothing(model, tokenizer, score_head, lists):
    """Sampling included: the same seed gives a candidate the same rationales, wherever it stands."""
    turned = [replace(e, candidates=e.candidates[::-1], relevance=e.relevance[::-1]) for e in lists]
    (first,), _ = take_step(model, score_head, tokenizer, lists, settings())
    torch.manual_seed(0)  # as this test began
    (second,), _ = take_step(model, score_head, tokenizer, turned, settings())
    assert close(second, first) and first.any()
    ranked, again = (r2r.rank(model, tokenizer, score_head, e.history, e.candidates, max_new_tokens=6)
                     for e in (lists[0], turned[0]))
    assert again == ranked  # to the last bit
    assert [x.score for x in ranked] == sorted((x.score for x in ranked), reverse=True)
    with pytest.raises(TypeError, match="data.Item"):
        r2r.rank(model, tokenizer, score_head, lists[0].history, ["a title", "another"])

def test_shares_of_a_step_add_up_to_the_whole(model, tokenizer, score_head, lists, rollout, monkeypatch):
    """As several processes share it: one list each, and one process without any."""
    replay(monkeypatch, rollout)
    (whole,), metrics = take_step(model, score_head, tokenizer, lists, settings())
    totals = {"lists": 2, "rationales": len(rollout.owner), "tokens": sum(map(len, rollout.responses))}
    shares = [take_step(model, score_head, tokenizer, share, settings(), totals=totals)
              for share in (lists[:1], lists[1:], [])]
    assert close(sum(gradient for (gradient,), _ in shares), whole) and not shares[2][0][0].any()
    for name in ("utility", "token_loss", "format_rate", "score_std"):
        assert sum(found[name] for _, found in shares) == pytest.approx(metrics[name], abs=1e-5)

@pytest.mark.parametrize("pl, bad", [("exact", math.nan), ("exact", math.inf), ("sample", -math.inf)])
def test_a_score_that_is_no_number_is_seen_in_the_norm(
        model, tokenizer, score_head, lists, rollout, pl, bad, monkeypatch):
    """Sorting such scores gives a ranking, and so a finite gradient, unless somebody looks."""
    class Broken(torch.nn.Module):
        def forward(self, hidden):
            return score_head(hidden) + torch.tensor([bad] + [0.0] * (len(hidden) - 1))

    replay(monkeypatch, rollout)
    assert math.isnan(take_step(model, Broken(), tokenizer, lists, settings(pl=pl))[1]["grad_norm"])
    score_head.zero_grad()

def test_lists_without_signal_are_skipped_unless_they_pay_their_kl(model, score_head, rollout, monkeypatch):
    """A list that is ranked right with certainty teaches nothing; one of equal scores for all does."""
    certain = torch.tensor([-200.0, 200, -200, -200]).repeat_interleave(3)
    scores = torch.cat([certain, torch.tensor([1.0, 0, 0.5]).repeat_interleave(3)])
    signal = r2r.learning_signal(rollout, scores, list(map(torch.tensor, RELEVANCE)), 2)
    assert signal[3] == [1] and not signal[1][:12].any()
    seen, original = [], policy.row_logprobs
    monkeypatch.setattr(policy, "row_logprobs", lambda *rest: (seen.extend(rest[2]), original(*rest))[1])
    old = torch.zeros(21, 9)
    for kl_coef, rows in ((0.0, 9), (0.1, 21)):
        seen.clear()
        r2r.backward(model, score_head, rollout, signal, 99, settings(kl_coef=kl_coef), old, old)
        assert len(seen) == rows
    score_head.zero_grad()

# --- ranking ---

def test_scores_are_means_over_rationales(model, tokenizer, score_head, lists, rollout, monkeypatch):
    replay(monkeypatch, rollout)
    pairs = [(e.history, e.candidates) for e in lists]
    found = r2r.score_lists(model, tokenizer, score_head, pairs, settings(), 3)
    rows = [score_head(plain_row(model, rollout, n)[1]).item() for n in range(21)]
    for (scores, rationales), start, size in zip(found, (0, 12), (4, 3)):
        wanted = torch.tensor(rows[start:start + 3 * size]).view(size, 3).mean(1)
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
        responses = rollout.responses[start:start + 3 * size]
        assert sum(rationales, []) == tokenizer.batch_decode(responses, skip_special_tokens=True)

def test_zero_shot_score_is_the_log_odds_at_the_answer(toy, lists):
    """What it answered does not count; one that never came to its answer is asked for it."""
    model, tokenizer = policy.load("tiny", texts=toy.texts())

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert len(encode("yes")) != len(encode("no"))  # to this tokenizer
    prompt = r2r.build_prompt(tokenizer, lists[1].history, lists[1].candidates)
    answers = "Rose.\n<answer>yes</answer>", "Rose.\n<answer>no", "I"
    responses = [encode(f"{text}<|im_end|>") for text in answers]
    found = r2r.answer_log_odds(model, tokenizer, policy.Rollout([prompt], 1, responses))
    for n, thought in enumerate(("Rose.\n", "Rose.\n", "I\n")):
        rows = [encode(f"{thought}<answer>{word}") for word in ("yes", "no")]
        yes, no = (plain_row(model, policy.Rollout([prompt], 1, [r] * 3), n)[0].sum() for r in rows)
        assert found[n].item() == pytest.approx((yes - no).item(), abs=1e-4)

@pytest.mark.parametrize("text, answer", [
    ("so <answer>yes</answer>", True), ("<answer> No </answer>", False),
    ("<answer>yes</answer> wait <answer>no</answer>", False),  # the last one counts
    *((text, None) for text in ("", "yes", "<answer>maybe</answer>", "<answer>yes", "<answer></answer>"))])
def test_parse_answer(text, answer):
    assert r2r.parse_answer(text) is answer

def test_warm_up_fits_the_head_and_learns_no_noise_by_heart():
    """Features that show the positive are found; from noise it learns no certainty about other lists."""
    relevance, fresh = [torch.eye(6)[n % 6] for n in range(12)], torch.randn(120, 192)
    noise = [torch.randn(6, 2, 192) for _ in range(12)]
    telling = [h + 2.0 * y[:, None, None] for h, y in zip(noise, relevance)]
    heads = [r2r.ScoreHead(192) for _ in range(3)]
    optimizers = [torch.optim.AdamW(head.parameters(), lr=1e-3) for head in heads]
    assert train.fit_score_head(heads[0], telling, relevance, optimizers[0], epochs=5) > 0.95
    train.fit_score_head(heads[1], noise, relevance, optimizers[1])
    for h, y in 10 * list(zip(noise, relevance)):  # by heart
        optimizers[2].zero_grad()
        r2r.score_loss(heads[2](h), y)[0].mean().backward()
        optimizers[2].step()
    assert heads[1](fresh).std() < 0.5 * heads[2](fresh).std()

def test_swapped_rationales_are_scored_where_they_are_put(model, tokenizer, score_head, toy, monkeypatch):
    """--swap-rationales: each candidate is scored by its own prompt and its neighbour's rationale."""
    rollouts, reason, found = [], r2r.reason, []
    monkeypatch.setattr(r2r, "reason", lambda *a, **k: rollouts.append(reason(*a, **k)) or rollouts[-1])
    lists = [(e.history, e.candidates) for e in toy.examples("test", 2, 3)]
    for swap in (False, True):
        torch.manual_seed(0)
        found += r2r.score_lists(model, tokenizer, score_head, lists, settings(swap_rationales=swap), 2)
    plain, swapped = rollouts
    assert swapped.responses == [plain.responses[n] for n in (4, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9)]
    rows = torch.stack([score_head(plain_row(model, swapped, n)[1]) for n in range(12)]).view(6, 2).mean(1)
    assert close(torch.cat([scores for scores, _ in found[2:]]), rows)
