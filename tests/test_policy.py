"""Sampling and scoring: the shared prefix changes nothing, and what is sampled is what is scored."""

import copy
import math

import pytest
import torch
import transformers

import policy
import r2r
from data import InputError
from extras.models import checkpoint_activations
from steps import close, plain_row

@pytest.fixture(scope="module")
def rollout(model_and_tokenizer, toy):
    """Two lists of 5 candidates; prefixes, suffixes and responses are of unequal length."""
    prompts = []
    for n, e in enumerate(toy.examples("test", 2)):
        candidates = [c if i % 2 else type(c)(c.id, c.title + " soap" * (i + 1), c.attributes)
                      for i, c in enumerate(e.candidates[:5])]
        prompts.append(r2r.build_prompt(model_and_tokenizer[1], e.history[n * 3:], candidates))
    responses = [[5 + (7 * n + 31 * t) % 295 for t in range(2 + 3 * (n % 4))] for n in range(10)]
    found = policy.Rollout(prompts, 1, responses)
    assert len(set(map(len, found.prefixes))) == 2 and len(set(map(len, found.suffixes))) > 1
    return found

def gradients(model, rollout, size=None):
    """Of all that is computed of the rows: in micro-batches, or (no size) by each row's plain forward. Each
    row has a weight of its own, so that a gradient sent to the wrong one does not go unnoticed."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(rollout.owner))
    batches = (([n], *plain_row(model, rollout, n)) for n in range(len(rollout.owner)))
    if size:
        found = policy.micro_batches(model, rollout, size, entropy=True)
        batches = ((rows, logprobs, hidden, entropy) for rows, logprobs, _, hidden, entropy in found)
    for rows, logprobs, hidden, entropy in batches:
        (weights[rows] * (logprobs.sum(-1) + entropy.sum(-1) + hidden.tanh().sum(-1))).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in model.parameters() if p.requires_grad])

def test_prefix_and_suffix_join_to_the_chat_prompt(tokenizer, toy):
    e = toy.examples("test", 1)[0]
    prompt = r2r.build_prompt(tokenizer, e.history, e.candidates)
    assert "Candidate" not in tokenizer.decode(prompt.prefix_ids)
    text = tokenizer.decode(prompt.prefix_ids + prompt.suffix_ids[3])
    assert text.startswith("<|im_start|>system\n" + r2r.SYSTEM)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert all(h.title in text for h in e.history) and f"Candidate: {e.candidates[3].title}" in text

LOOP = ("{%% for m in messages %%}{%% if m.role == 'system' %%}%s{%% else %%}"
        "<u>{{ m.content }}</u>{%% endif %%}{%% endfor %%}")

@pytest.mark.parametrize("template, wanted", [
    (None, "Judge.\n\nHistory: %s\n\n"),  # a base model
    (LOOP % "", "<u>Judge.\n\nHistory: %s</u>"),  # drops the system message without a word
    (LOOP % "{{ raise_exception('no system role') }}", "<u>Judge.\n\nHistory: %s</u>")])
def test_the_instruction_survives_any_template(tokenizer, template, wanted):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    prompt = policy.encode_prompt(tokenizer, "Judge.", "History: ", ["A", "B"])
    for candidate, suffix in zip("AB", prompt.suffix_ids):
        assert tokenizer.decode(prompt.prefix_ids + suffix) == wanted % candidate

def test_a_template_that_writes_the_date_gets_the_recorded_one(model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ("{{ strftime_now('%d %b %Y') }}, {{ date_string }}: "
                               "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.init_kwargs["prompt_date"] = "2001-02-03"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for some in (tokenizer, policy.load(str(tmp_path))[1]):
        prefix = policy.encode_prompt(some, "Judge.", "History", ["soap"]).prefix_ids
        assert some.decode(prefix) == "03 Feb 2001, 03 Feb 2001: Judge.History"

def test_stop_ids_takes_one_id_a_list_or_none(model, tokenizer, monkeypatch):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for published, want in ((None, [end]), (end, [end]), ([7, end], [end, 7])):
        monkeypatch.setattr(model.generation_config, "eos_token_id", published)
        assert policy.stop_ids(model, tokenizer) == want

@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_plain_forwards(model, rollout, share, temperature, monkeypatch):
    """Row by row: neither padding nor the company of other rows and lists changes anything."""
    monkeypatch.setattr(policy, "SHARE_PREFIX", share)
    want = [plain_row(model, rollout, n, temperature) for n in range(10)]
    for size, at_once in ((1, 2**24), (3, 2**24), (100, 3 * model.config.vocab_size)):
        monkeypatch.setattr(policy, "CHUNK_ELEMENTS", at_once)
        together, states = policy.all_logprobs(model, rollout, size, temperature)
        for rows, *found in policy.micro_batches(model, rollout, size, temperature, entropy=True):
            for n, logprobs, mask, hidden, entropy in zip(rows, *found):
                T = len(rollout.responses[n])
                assert mask.tolist() == [True] * T + [False] * (len(mask) - T)
                assert (logprobs[T:] == 0).all() and (together[n, T:] == 0).all()
                torch.testing.assert_close((logprobs[:T], hidden, entropy[:T]), want[n], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close((together[n, :T], states[n]), want[n][:2], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_plain_backward(model, rollout, share, checkpointing, monkeypatch):
    """Through rows and prefixes, whatever the micro-batch; the cache survives gradient checkpointing."""
    monkeypatch.setattr(policy, "SHARE_PREFIX", share)
    want, model = gradients(model, rollout), copy.deepcopy(model)
    if checkpointing:
        checkpoint_activations(model.train())
    for size, at_once in ((1, 2**24), (3, 2**24), (100, 2**24), (100, 3 * model.config.vocab_size)):
        monkeypatch.setattr(policy, "CHUNK_ELEMENTS", at_once)  # at last, three rows of logits at a time
        assert close(gradients(model, rollout, size), want) and want.norm() > 1

@pytest.mark.parametrize("max_rows", [1, 320])
def test_what_is_sampled_is_what_is_scored(model, tokenizer, rollout, max_rows, monkeypatch):
    """Lists in one `generate` call or in two; responses of all lengths; each ends with its first stop."""
    monkeypatch.setattr(policy, "MAX_ROWS", max_rows)
    stops = list(range(0, len(tokenizer), 5))  # some end soon, some do not
    monkeypatch.setattr(policy, "stop_ids", lambda *_: stops)
    sampled = policy.sample_rows(model, tokenizer, rollout.prompts, 3, policy.Sampling(7))
    assert {1, 2, 3, 7} <= {len(r) for r in sampled.responses}
    greedy = [policy.sample_rows(model, tokenizer, prompts, 2, policy.Sampling(7, greedy=True)).responses
              for prompts in (rollout.prompts, rollout.prompts[:1], rollout.prompts[1:])]
    assert greedy[0] == greedy[1] + greedy[2]  # several lists in one call get the tokens of a call each
    monkeypatch.setattr(policy, "SHARE_PREFIX", False)
    torch.manual_seed(0)  # as this test began
    alone = policy.sample_rows(model, tokenizer, rollout.prompts, 3, policy.Sampling(7))
    assert alone.responses == sampled.responses
    logprobs, _ = policy.all_logprobs(model, sampled)
    for n, response in enumerate(sampled.responses):
        assert not any(token in stops for token in response[:-1])
        assert len(response) == 7 or response[-1] in stops
        want, hidden, _ = plain_row(model, sampled, n)
        torch.testing.assert_close(sampled.hidden[n], hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logprobs[n, :len(response)], want, atol=1e-5, rtol=0)

HOSTILE = dict(do_sample=True, temperature=0.2, top_p=0.5, top_k=3, repetition_penalty=1.8, typical_p=0.7,
               no_repeat_ngram_size=2, min_new_tokens=4, suppress_tokens=[10, 11], min_p=0.1, num_beams=2,
               forced_eos_token_id=5, encoder_repetition_penalty=1.2, bad_words_ids=[[7]])

@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampling_is_neutral_whatever_a_model_ships(model, tokenizer, rollout, temperature, monkeypatch):
    """Only temperature touches the logits; frequencies are those of the update's log-probabilities."""
    seen, original = [], transformers.LogitsProcessorList.__call__

    def spy(self, *args, **kwargs):
        seen.extend(type(p).__name__ for p in self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LogitsProcessorList, "__call__", spy)
    monkeypatch.setattr(policy, "MAX_ROWS", 2000)
    published = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, **HOSTILE)
    monkeypatch.setattr(model, "generation_config", published)
    before, n, V = published.to_dict(), 2000, len(tokenizer)
    prefix, suffix = rollout.prefixes[0][-20:], rollout.suffixes[0]
    prompts, sampling = [policy.Prompt(prefix, [suffix])], policy.Sampling(1, temperature)
    samples = policy.sample_rows(model, tokenizer, prompts, n, sampling).responses
    assert set(seen) <= {"TemperatureLogitsWarper"}
    assert model.generation_config is published and published.to_dict() == before
    with torch.no_grad():
        logprobs = policy.token_logprobs(model, prefix, [suffix] * V, [[t] for t in range(V)], temperature)[0]
    counts = torch.bincount(torch.tensor([s[0] for s in samples]), minlength=V)
    expected = logprobs.exp().squeeze(1) * n
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < V - 1 + 5 * math.sqrt(2 * (V - 1))

def test_sampling_happens_in_eval_mode_and_restores_the_mode(model, tokenizer, rollout):
    """Also where it fails, out of memory, say: the caller may try again."""
    modes, model = [], copy.deepcopy(model)
    want = policy.sample_rows(model, tokenizer, rollout.prompts, 2, policy.Sampling(5)).responses
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    checkpoint_activations(model.train())
    torch.manual_seed(0)  # as this test began
    got = policy.sample_rows(model, tokenizer, rollout.prompts, 2, policy.Sampling(5)).responses
    assert got == want and model.training and not any(modes)
    published, model.generate = model.generation_config, None
    with pytest.raises(TypeError):
        policy.sample_rows(model, tokenizer, rollout.prompts, 1, policy.Sampling(5))
    assert model.training and model.generation_config is published and not model.base_model._forward_hooks

def test_rows_wider_than_the_models_reach_are_refused(model, tokenizer, rollout, monkeypatch):
    """The longest prefix and the longest suffix count together, though no row has both."""
    new = 5 + 1  # a row is fed one token beyond its end
    prompts = [policy.Prompt(rollout.prefixes[0], rollout.prompts[0].suffix_ids[1:2]),
               policy.Prompt(rollout.prefixes[-1], rollout.prompts[1].suffix_ids[:1])]
    alone = max(len(p.prefix_ids) + len(p.suffix_ids[0]) for p in prompts) + new
    padded = max(len(p.prefix_ids) for p in prompts) + max(len(p.suffix_ids[0]) for p in prompts) + new
    assert alone < padded

    for max_rows, reach in ((320, padded), (1, alone)):  # both lists in a call, and a call a list
        monkeypatch.setattr(policy, "MAX_ROWS", max_rows)
        monkeypatch.setattr(model.config, "max_position_embeddings", reach)
        sampled = policy.sample_rows(model, tokenizer, prompts, 1, policy.Sampling(5))
        monkeypatch.setattr(model.config, "max_position_embeddings", reach - 1)
        with pytest.raises(InputError, match=f"{reach} tokens.*max_position_embeddings of {reach - 1}"):
            policy.sample_rows(model, tokenizer, prompts, 1, policy.Sampling(5))
    policy.all_logprobs(model, sampled, size=1)
    monkeypatch.setattr(model.config, "max_position_embeddings", alone - new)
    with pytest.raises(InputError, match="max_position_embeddings"):
        policy.all_logprobs(model, sampled, size=100)

def test_k3_is_an_unbiased_kl_and_never_negative():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    estimates = policy.k3_kl(p, q)
    assert (estimates >= 0).all()
    kl = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * estimates).sum().item() == pytest.approx(kl, abs=1e-6)
