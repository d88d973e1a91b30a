"""Prompts, rollout, update and ranking: against an independent computation, and what must not change a result."""

import copy
import random

import pytest
import torch

import policy
import r2r
from data import InputError, Item


@pytest.fixture(scope="module")
def rollout(model_and_tokenizer, score_head, toy):
    """Two lists of 4 and 3 candidates, 3 rationales each, sampled and scored."""
    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    examples = toy.examples("test", 2)
    prompts = [r2r.build_prompt(tokenizer, e.history[n:], e.candidates[:4 - n]) for n, e in enumerate(examples)]
    relevance = [torch.tensor([0.0, 1, 0, 0]), torch.tensor([2.0, 0, 1])]
    rollout = r2r.generate(model, tokenizer, prompts, relevance, 3, policy.Sampling(9))
    rollout.responses[2], rollout.responses[5] = rollout.responses[2][:4], rollout.responses[5][:1]  # unequal lengths
    return r2r.score(model, score_head, rollout)


def gradients(*modules):
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters()])


def zero(*modules):
    for m in modules:
        m.zero_grad()


def direct_loss(model, head, rollout, advantages, clip, kl_coef, old, ref, temperature):
    """Score loss + token loss + KL as METHODS writes them: one graph, one row at a time, no cache and no padding. And the metrics."""
    scores, tokens = [], sum(map(len, rollout.responses))
    told = {"token_loss": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0}
    for n, response in enumerate(rollout.responses):
        start = rollout.prefixes[rollout.owner[n]] + rollout.suffixes[n]
        out = model(torch.tensor([start + response]), output_hidden_states=True)
        scores.append(head(out.hidden_states[-1][0, -1]))
        logprobs = (out.logits[0, len(start) - 1:-1] / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        ratio = (logprobs - old[n, :len(response)]).exp()
        told["token_loss"] -= torch.minimum(ratio * advantages[n], ratio.clamp(1 - clip, 1 + clip) * advantages[n]).sum() / tokens
        told["clipped"] += ((ratio < 1 - clip) | (ratio > 1 + clip)).sum().item() / tokens
        told["entropy"] -= logprobs.detach().sum().item()
        gap = ref[n, :len(response)] - logprobs
        told["kl"] += (gap.exp() - gap - 1).sum() / tokens
    values = [r2r.expected_ndcg(s.T, y, 10).mean() for s, y in zip(rollout.lists(torch.stack(scores)), rollout.relevance)]
    return -sum(values) / len(values) + told["token_loss"] + kl_coef * told["kl"], {k: torch.as_tensor(v).item() for k, v in told.items()}


@pytest.mark.parametrize("credit", ["item", "list"])
@pytest.mark.parametrize("kl_coef, temperature", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
def test_update_is_the_gradient_of_the_written_objective(model, score_head, rollout, credit, kl_coef, temperature):
    """Off policy (the old log-probabilities are moved, so that the clip acts), with micro-batches and the shared prefix."""
    signal = r2r.signal(rollout, credit=credit)
    generator = torch.Generator().manual_seed(1)
    moved = r2r.Rollout(rollout.prompts, rollout.relevance, 3, rollout.responses, scores=rollout.scores)
    moved.logprobs = rollout.logprobs + 0.3 * torch.randn(rollout.logprobs.shape, generator=generator)
    moved.ref_logprobs = rollout.logprobs + 0.3 * torch.randn(rollout.logprobs.shape, generator=generator)
    zero(model, score_head)
    loss, told = direct_loss(model, score_head, rollout, signal.advantages, 0.2, kl_coef, moved.logprobs, moved.ref_logprobs, temperature)
    loss.backward()
    want = gradients(model, score_head)
    for micro_batch in (1, 5, 100):
        for share in (True, False):
            zero(model, score_head)
            metrics = r2r.backward(model, score_head, moved, signal, 0.2, kl_coef, temperature, micro_batch, share)
            got = gradients(model, score_head)
            assert (got - want).norm() / want.norm() < 1e-5
            assert 0 < metrics["clipped"] < 1
            assert {k: metrics[k] for k in told} == pytest.approx(told | {"kl": told["kl"] * (kl_coef > 0)}, abs=1e-4)
    zero(model, score_head)


def test_on_policy_nothing_is_clipped(model, score_head, rollout):
    metrics = r2r.backward(model, score_head, rollout, r2r.signal(rollout), clip=1e-3)
    assert metrics["clipped"] == 0.0
    zero(score_head)


def test_scoring_does_not_depend_on_micro_batches(model, score_head, rollout):
    results = []
    for micro_batch in (1, 4, 100):
        again = r2r.Rollout(rollout.prompts, rollout.relevance, 3, rollout.responses)
        results.append(r2r.score(model, score_head, again, micro_batch=micro_batch))
    for r in results[1:]:
        torch.testing.assert_close(r.scores, results[0].scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(r.logprobs, results[0].logprobs, atol=1e-5, rtol=0)


def test_lists_without_signal_are_skipped_and_change_nothing(model, score_head, rollout, monkeypatch):
    signal = r2r.signal(rollout)
    first = 4 * 3
    signal.score_gradient[first:], signal.advantages[first:], results = 0.0, 0.0, []
    seen, original = [], policy.row_logprobs
    monkeypatch.setattr(policy, "row_logprobs", lambda prefix, owner, *a: (seen.append(len(owner)), original(prefix, owner, *a))[1])
    for alive in ([0, 1], [0]):
        zero(model, score_head)
        seen.clear()
        signal.alive = alive
        r2r.backward(model, score_head, rollout, signal)
        results.append(gradients(model, score_head))
        assert sum(seen) == (first if alive == [0] else len(rollout.owner))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    zero(score_head)


def test_a_list_of_equal_scores_is_dead_only_when_it_teaches_nothing(rollout):
    again = r2r.Rollout(rollout.prompts, rollout.relevance, 3, rollout.responses)
    again.scores = torch.tensor([-200.0, 200, -200, -200]).repeat_interleave(3)
    again.scores = torch.cat([again.scores, torch.tensor([1.0, 0, 0.5]).repeat_interleave(3)])
    signal = r2r.signal(again)
    assert signal.alive == [1]  # the first is ranked right, certainly: no gradient, no advantage
    assert signal.advantages[:12].abs().max() == 0


def test_sampled_signal_estimates_the_exact_one(rollout):
    exact = r2r.signal(rollout)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([r2r.signal(rollout, permutations=64, generator=generator).score_gradient for _ in range(300)])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - exact.score_gradient).abs() < 5 * error + 1e-7).all()


# --- ranking ---


def test_order_of_the_candidates_does_not_matter(model, tokenizer, score_head, toy):
    e = toy.examples("test", 1)[0]
    first = r2r.rank(model, tokenizer, score_head, e.history, e.candidates, max_new_tokens=6)
    assert [r.score for r in first] == sorted((r.score for r in first), reverse=True) and len(first) == 20
    for seed in range(3):
        shuffled = random.Random(seed).sample(e.candidates, 20)
        again = r2r.rank(model, tokenizer, score_head, e.history, shuffled, max_new_tokens=6)
        assert again == first  # to the last bit


def test_averaging_rationales(model, tokenizer, score_head, toy):
    e = toy.examples("test", 1)[0]
    torch.manual_seed(0)
    (scores, rationales), = r2r.score_lists(model, tokenizer, score_head, [(e.history, e.candidates[:3])], policy.Sampling(5), 4)
    assert scores.shape == (3,) and [len(r) for r in rationales] == [4, 4, 4]


def test_without_reasoning_the_head_reads_the_prompt(model, tokenizer, toy):
    e = toy.examples("test", 1)[0]
    head = r2r.ScoreHead(192, reasoning=False)
    torch.nn.init.normal_(head.layers[2].weight)
    ranked = r2r.rank(model, tokenizer, head, e.history, e.candidates)
    prompt = r2r.build_prompt(tokenizer, e.history, e.candidates, reasoning=False)
    for r in ranked:
        ids = prompt.prefix_ids + prompt.suffix_ids[e.candidates.index(r.item)]
        want = head(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1])
        assert r.rationale == "" and r.score == pytest.approx(want.item(), abs=1e-4)


@pytest.mark.parametrize("one_pass, bias", [(False, False), (True, False), (True, True)])
def test_zero_shot_score_is_the_log_odds_at_the_answer(model, tokenizer, toy, one_pass, bias):
    """Whether the rationale came to its answer (then what it answered does not count), or never did; both words in one pass, or a pass each."""
    if not one_pass:  # a tokenizer that has seen no answers
        model, tokenizer = policy.load("tiny", "cpu", torch.float32, toy.texts(), 0)
    if bias:
        model = copy.deepcopy(model)
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(len(model.get_output_embeddings().weight)))
    encode = lambda s: tokenizer(s, add_special_tokens=False).input_ids
    assert [len(encode(f"<answer>{word}")) for word in ("yes", "no")] == ([2, 2] if one_pass else [4, 2])
    e = toy.examples("test", 1)[0]
    prompt = r2r.build_prompt(tokenizer, e.history, e.candidates[:3])
    end = tokenizer.eos_token_id
    responses = [encode("I think rose.\n<answer>yes</answer>") + [end], encode("I think rose.\n<answer>no</answer>"), encode("I think") + [end]]
    rollout = r2r.Rollout([prompt], [torch.zeros(3)], 1, responses)
    got = r2r.answer_log_odds(model, tokenizer, rollout)
    for n, thought in enumerate(("I think rose.\n", "I think rose.\n", "I think\n")):
        totals = []
        for word in ("yes", "no"):
            start, answer = prompt.prefix_ids + prompt.suffix_ids[n] + encode(thought), encode(f"<answer>{word}")
            logprobs = model(torch.tensor([start + answer])).logits[0].log_softmax(-1)
            totals.append(sum(logprobs[len(start) + t - 1, token] for t, token in enumerate(answer)))
        assert got[n].item() == pytest.approx((totals[0] - totals[1]).item(), abs=1e-4)


# --- prompts, traces, head ---


def test_parse_answer():
    assert r2r.parse_answer("so <answer>yes</answer>") is True and r2r.parse_answer("<answer> No </answer>") is False
    assert r2r.parse_answer("<answer>yes</answer> wait <answer>no</answer>") is False  # the last one counts
    for text in ("", "yes", "<answer>maybe</answer>", "<answer>yes", "<answer></answer>", "</answer>yes<answer>"):
        assert r2r.parse_answer(text) is None


def test_template_trace_by_hand():
    history = [Item(str(n), "", {"brand": (b,), "kind": ("All", k)}) for n, (b, k) in enumerate([("A", "x"), ("A", "y"), ("B", "x")])]
    assert r2r.template_trace(history, Item("c", "", {"brand": ("A",), "kind": ("All", "y")})) == (
        "In the history: brand A 2, kind y 1.\n<answer>yes</answer>", True)
    assert r2r.template_trace(history, Item("c", "", {"brand": ("C",), "kind": ("All", "x")}), reasoning=False) == ("<answer>no</answer>", False)
    assert r2r.template_trace(history, Item("c", "no attributes"))[1] is False


def test_score_head_survives_saving(tmp_path, score_head):
    path = tmp_path / "score_head.safetensors"
    score_head.reasoning = False
    score_head.save(path)
    again = r2r.ScoreHead.load(path)
    score_head.reasoning = True
    hidden = torch.randn(2, 3, 192)
    assert torch.equal(again(hidden), score_head(hidden)) and again.reasoning is False
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="score_head.safetensors"):
        r2r.ScoreHead.load(path)


def test_warm_up_fits_the_head(score_head):
    """Features that show the positive are found; noise is not learnt by heart into certainty about other lists."""
    torch.manual_seed(0)
    relevance = [torch.eye(6)[n % 6] for n in range(12)]
    blind = [torch.randn(6, 2, 192) for _ in range(12)]
    telling = [h + 2.0 * y[:, None, None] for h, y in zip(blind, relevance)]
    head = r2r.ScoreHead(192)
    before = r2r.expected_ndcg(head(telling[0]).T, relevance[0], 10).mean().item()
    after = r2r.fit_score_head(head, telling, relevance, torch.optim.AdamW(head.parameters(), lr=1e-3), epochs=5)
    assert before < 0.6 < 0.95 < after
    head = r2r.ScoreHead(192)
    r2r.fit_score_head(head, blind, relevance, torch.optim.AdamW(head.parameters(), lr=1e-3))
    fresh = torch.cat([head(torch.randn(6, 1, 192)) for _ in range(20)])
    by_heart = r2r.ScoreHead(192)
    optimizer = torch.optim.AdamW(by_heart.parameters(), lr=1e-3)
    for _ in range(10):
        for h, y in zip(blind, relevance):
            optimizer.zero_grad()
            r2r.score_loss(by_heart(h), y)[0].mean().backward()
            optimizer.step()
    assert fresh.std() < 0.5 * torch.cat([by_heart(torch.randn(6, 1, 192)) for _ in range(20)]).std()
