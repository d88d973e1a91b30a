"""R2Rank's scores, answers and head: read from rationales, by the plain forward pass."""

import pytest
import torch

import policy
import r2r
import train
from steps import plain_row, replay, settings
from test_step import lists, rationales  # noqa: F401

@pytest.mark.parametrize("swap", [False, True])
def test_scores_are_means_over_rationales(model, tokenizer, score_head, lists, rationales, swap, monkeypatch):
    """--swap-rationales: each candidate is scored by its own prompt and its neighbour's rationales."""
    replay(monkeypatch, rationales)
    said = rationales.responses
    if swap:
        said = [*said[9:12], *said[:9], *said[18:], *said[12:18]]
    pairs = [(e.history, e.candidates) for e in lists]
    found = r2r.score_lists(model, tokenizer, score_head, pairs, settings(swap_rationales=swap), 3)
    read = policy.Rollout(rationales.prompts, 3, said)
    rows = torch.stack([score_head(plain_row(model, read, n)[1]) for n in range(21)])
    for (scores, _), wanted in zip(found, read.by_list(rows), strict=True):
        torch.testing.assert_close(scores, wanted.mean(1), atol=1e-5, rtol=0)
    texts = [text for _, rows in found for row in rows for text in row]
    assert texts == tokenizer.batch_decode(said, skip_special_tokens=True)

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
