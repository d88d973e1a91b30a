"""Sampling and scoring: the shared prefix changes nothing, sampling is neutral, the log-probabilities are the update's."""

import copy
import math

import pytest
import torch
import transformers

import policy
import r2r
from data import InputError

PREFIXES = 2


@pytest.fixture(scope="module")
def prompts(model_and_tokenizer, toy):
    """Two lists of 5 candidates with histories, prefixes and suffixes of unequal length."""
    lists = []
    for n, e in enumerate(toy.examples("test", PREFIXES)):
        candidates = [c if i % 2 else type(c)(c.id, c.title + " soap" * (i + 1), c.attributes) for i, c in enumerate(e.candidates[:5])]
        lists.append(r2r.build_prompt(model_and_tokenizer[1], e.history[n * 3:], candidates))
    assert len(lists[0].prefix_ids) != len(lists[1].prefix_ids)
    assert len({len(s) for s in lists[0].suffix_ids}) > 1
    return lists


@pytest.fixture(scope="module")
def rows(prompts):
    """prefixes, owner, suffixes, responses of all rows; responses of unequal length."""
    generator = torch.Generator().manual_seed(0)
    owner = [n for n, p in enumerate(prompts) for _ in p.suffix_ids]
    suffixes = [s for p in prompts for s in p.suffix_ids]
    responses = [torch.randint(5, 300, (2 + 3 * (n % 4),), generator=generator).tolist() for n in range(len(owner))]
    return [p.prefix_ids for p in prompts], owner, suffixes, responses


def plain_logprobs(model, prefix, suffix, response, temperature=1.0):
    """The independent computation: one row, no cache, no padding, logits of the whole model."""
    ids = torch.tensor([prefix + suffix + response])
    out = model(ids, output_hidden_states=True)
    start = len(prefix) + len(suffix)
    logprobs = (out.logits[0].float() / temperature).log_softmax(-1)
    return logprobs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]], out.hidden_states[-1][0, -1]


def stop_checkpointing(model):
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --- prompts as ids ---


def test_prefix_and_suffix_join_to_the_chat_prompt(tokenizer, toy):
    e = toy.examples("test", 1)[0]
    prompt = r2r.build_prompt(tokenizer, e.history, e.candidates)
    text = tokenizer.decode(prompt.prefix_ids + prompt.suffix_ids[3])
    assert text.startswith("<|im_start|>system\n" + r2r.SYSTEM) and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert all(h.title in text for h in e.history) and f"Candidate: {e.candidates[3].title}" in text
    assert tokenizer.decode(prompt.prefix_ids).find("Candidate") == -1


def test_special_tokens_in_item_text_stay_text(tokenizer):
    prompt = policy.encode_prompt(tokenizer, "s", "a <|im_end|> b", ["c <|im_start|>assistant"])
    assert prompt.prefix_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the system message's
    assert prompt.suffix_ids[0].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1  # the assistant header's
    assert "<|im_end|> b" in tokenizer.decode(prompt.prefix_ids)


def test_stop_ids_takes_one_id_a_list_or_none(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for published, want in ((None, [end]), (end, [end]), ([7, end], [end, 7])):
        config, model.generation_config.eos_token_id = model.generation_config.eos_token_id, published
        assert policy.stop_ids(model, tokenizer) == want
        model.generation_config.eos_token_id = config


# --- scoring ---


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_hidden_equal_the_plain_forward(model, rows, share, temperature):
    prefixes, owner, suffixes, responses = rows
    for index in range(PREFIXES):
        mine = [n for n, o in enumerate(owner) if o == index]
        logprobs, mask, hidden = policy.token_logprobs(model, prefixes[index], [suffixes[n] for n in mine], [responses[n] for n in mine],
                                                       temperature, share)
        for row, n in enumerate(mine):
            want, last = plain_logprobs(model, prefixes[index], suffixes[n], responses[n], temperature)
            assert mask[row].sum() == len(responses[n]) and (logprobs[row][~mask[row]] == 0).all()
            torch.testing.assert_close(logprobs[row][mask[row]], want, atol=1e-5, rtol=0)
            torch.testing.assert_close(hidden[row], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_the_plain_backward(model, rows, share, micro_batch, checkpointing, recompute, monkeypatch):
    """Through rows and prefixes, whatever the micro-batch; with gradient checkpointing too (the cache must survive it)."""
    monkeypatch.setattr(policy, "RECOMPUTE_BELOW", 100 if recompute else 0)
    prefixes, owner, suffixes, responses = rows
    weights = torch.linspace(-1, 1, len(owner))

    for n in range(len(owner)):
        logprobs, hidden = plain_logprobs(model, prefixes[owner[n]], suffixes[n], responses[n])
        (weights[n] * (logprobs.sum() + hidden.tanh().sum())).backward()
    want = gradients(model)
    model.zero_grad()
    if checkpointing:
        policy.checkpoint_activations(model)
        model.train()
    try:
        for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, micro_batch, share):
            logprobs, _, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            (weights[part] * (logprobs.sum(-1) + hidden.tanh().sum(-1))).sum().backward()
    finally:
        stop_checkpointing(model)
    got = gradients(model)
    assert (got - want).norm() / want.norm() < 1e-5
    assert want.norm() > 1


def test_token_logprobs_is_differentiable_through_the_prefix(model, rows):
    prefixes, owner, suffixes, responses = rows
    results = []
    for share in (True, False):
        model.zero_grad()
        policy.token_logprobs(model, prefixes[0], suffixes[:5], responses[:5], share_prefix=share)[0].sum().backward()
        results.append(gradients(model))
    assert (results[0] - results[1]).norm() / results[1].norm() < 1e-5


def test_chunks_of_logits_change_nothing(model, rows, monkeypatch):
    prefixes, owner, suffixes, responses = rows
    results = []
    for elements in (2**24, 3 * model.config.vocab_size):  # one chunk; three rows of logits at a time
        monkeypatch.setattr(policy, "CHUNK_ELEMENTS", elements)
        model.zero_grad()
        logprobs, _, _ = policy.token_logprobs(model, prefixes[0], suffixes[:5], responses[:5])
        logprobs.sum().backward()
        results.append((logprobs.detach(), gradients(model)))
    assert (results[0][0] - results[1][0]).norm() / results[1][0].norm() < 1e-7
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


def test_padding_and_company_change_nothing(model, rows):
    prefixes, owner, suffixes, responses = rows
    together, _, hidden = policy.all_logprobs(model, prefixes, owner, suffixes, responses, micro_batch=100)
    for n in range(len(owner)):
        alone, _, h = policy.all_logprobs(model, [prefixes[owner[n]]], [0], [suffixes[n]], [responses[n]])
        torch.testing.assert_close(together[n, :len(responses[n])], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(hidden[n], h[0], atol=1e-5, rtol=1e-5)


def test_an_empty_response_reads_the_prompts_last_token(model, rows):
    prefixes, owner, suffixes, _ = rows
    logprobs, mask, hidden = policy.token_logprobs(model, prefixes[0], suffixes[:2], [[], []])
    assert logprobs.shape == mask.shape == (2, 0)
    want = model(torch.tensor([prefixes[0] + suffixes[1]]), output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(hidden[1], want, atol=1e-5, rtol=1e-5)


# --- sampling ---


def test_sharing_the_prefix_gives_the_same_tokens(model, tokenizer, prompts):
    for greedy in (True, False):
        results = []
        for share in (True, False):
            torch.manual_seed(4)
            results.append(policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 3, max_new_tokens=12,
                                         greedy=greedy, share_prefix=share))
        assert results[0] == results[1]
        assert len(results[0]) == 5 and all(len(r) == 3 for r in results[0])


def test_greedy_sampling_is_the_argmax_of_the_plain_forward(model, tokenizer, prompts):
    (first,), *_ = policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 1, max_new_tokens=6, greedy=True)
    ids = prompts[0].prefix_ids + prompts[0].suffix_ids[0]
    for token in first:
        assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids = ids + [token]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_sampling_hands_over_the_hidden_state_of_each_last_token(model, tokenizer, rows, share, chunk, monkeypatch):
    """Rows that end early leave the batch after a chunk; what they said and their last hidden state are the plain forward's."""
    prefixes, owner, suffixes, _ = rows
    owner, suffixes = [o for o in owner for _ in range(2)], [s for s in suffixes for _ in range(2)]  # prompts in common
    monkeypatch.setattr(policy, "stop_ids", lambda model, tokenizer: list(range(0, len(tokenizer), 5)))  # some end soon, some do not
    torch.manual_seed(0)
    responses, hidden = policy.sample_rows(model, tokenizer, prefixes, owner, suffixes, policy.Sampling(7, share_prefix=share, chunk=chunk))
    assert len({len(r) for r in responses}) > 2 and max(map(len, responses)) == 7
    for n, response in enumerate(responses):
        _, want = plain_logprobs(model, prefixes[owner[n]], suffixes[n], response)
        torch.testing.assert_close(hidden[n], want, atol=1e-5, rtol=1e-5)


def test_rows_with_a_prompt_in_common_score_as_if_alone(model, rows):
    """Their pass over the suffix is shared; log-probabilities and gradients are the plain forward's."""
    prefixes, owner, suffixes, responses = rows
    owner, suffixes, responses = owner * 3, suffixes * 3, [r[k:] for k in range(3) for r in responses]
    plain = [plain_logprobs(model, prefixes[o], s, r) for o, s, r in zip(owner, suffixes, responses)]
    sum(p.sum() + h.tanh().sum() for p, h in plain).backward()
    want = gradients(model)
    for micro_batch in (4, 100):
        model.zero_grad()
        for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, micro_batch):
            logprobs, mask, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            for i, n in enumerate(part):
                torch.testing.assert_close(logprobs[i][mask[i]], plain[n][0], atol=1e-5, rtol=0)
            (logprobs.sum() + hidden.tanh().sum()).backward()
        assert (gradients(model) - want).norm() / want.norm() < 1e-5


def test_grouped_attention_is_attention_with_repeated_keys():
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2)).eval()
    ids, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    results = []
    for name in ("eager", "shared"):
        model.set_attn_implementation(name)
        results.append([model(ids).logits, model(ids, attention_mask=mask).logits[:, 4:]])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_attention_over_shared_keys_is_attention_over_each_rows_own():
    """Two levels with gaps, several rows to a key or none, before and after rows have left; one head of keys for three of queries."""
    torch.manual_seed(0)
    h, g, d, rows = 2, 3, 8, [torch.tensor(r) for r in ([0, 2, 0, 2, 2, 0, 2], [3, 0, 3, 4, 1, 2, 1])]
    levels, wholes = [], []
    for row, M, T in zip(rows, (3, 5), (6, 4)):
        pairs, mask = tuple(torch.randn(M, h, T, d) for _ in range(2)), torch.ones(M, T, dtype=torch.long)
        mask[1, :2] = mask[4 % M, :T - 1] = 0
        levels.append(policy._Level({0: pairs}, mask, row.tolist(), True))
        wholes.append((*(x[row] for x in pairs), mask[row]))
    query, keys, values = torch.randn(7, h * g, 1, d), torch.randn(7, h, 2, d), torch.randn(7, h, 2, d)
    whole = [torch.cat(x, dim=-1 - (n < 2)) for n, x in enumerate(zip(*wholes, (keys, values, torch.ones(7, 2))))]
    want = torch.nn.functional.scaled_dot_product_attention(query, *(x.repeat_interleave(g, 1) for x in whole[:2]), whole[2].bool()[:, None, None], scale=0.3)
    got = policy._Shared(levels, 0, keys, values).attend(query, 0.3)
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-6, rtol=1e-5)
    keep = torch.tensor([1, 4, 6])
    for level in levels:
        level.place([level.rows[n] for n in keep.tolist()])
    got = policy._Shared(levels, 0, keys[keep], values[keep]).attend(query[keep], 0.3)
    torch.testing.assert_close(got, want[keep].transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_a_model_with_attention_of_its_own_samples_the_same(model, tokenizer, rows):
    """Where shared keys are unknown (eager attention), every row gets its own copy."""
    prefixes, owner, suffixes, _ = rows
    want = policy.sample_rows(model, tokenizer, prefixes, owner, suffixes, policy.Sampling(7, greedy=True, chunk=3))[0]
    model.set_attn_implementation("eager")
    try:
        assert policy.sample_rows(model, tokenizer, prefixes, owner, suffixes, policy.Sampling(7, greedy=True, chunk=3))[0] == want
    finally:
        model.set_attn_implementation("shared")


def test_rows_of_several_lists_and_calls(model, tokenizer, prompts, rows):
    """Greedy responses do not depend on which rows share a generate call. (The eighth token of one row is a tie to within rounding.)"""
    prefixes, owner, suffixes, _ = rows
    results = [policy.sample_rows(model, tokenizer, prefixes, owner, suffixes, policy.Sampling(7, greedy=True, max_rows=size))[0]
               for size in (100, 3, 1)]
    assert results[0] == results[1] == results[2]


def hostile(model):
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.5, top_k=3, repetition_penalty=1.8, no_repeat_ngram_size=2, min_new_tokens=4,
        suppress_tokens=[10, 11], typical_p=0.7, eos_token_id=model.generation_config.eos_token_id)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampling_is_neutral_whatever_the_model_ships_with(model, tokenizer, prompts, temperature, monkeypatch):
    """No logits processor is left but the drawing itself, and the frequencies are those of the update's log-probabilities."""
    seen = []
    original = transformers.LogitsProcessorList.__call__
    monkeypatch.setattr(transformers.LogitsProcessorList, "__call__", lambda self, *args, **kw: (
        seen.append([type(p).__name__ for p in self]), original(self, *args, **kw))[1])
    published = model.generation_config
    hostile(model)
    theirs = copy.deepcopy(model.generation_config)
    torch.manual_seed(0)
    n = 2000
    prompt = prompts[0]
    (samples,) = policy.sample(model, tokenizer, prompt.prefix_ids, prompt.suffix_ids[:1], n, max_new_tokens=1, max_rows=n,
                               temperature=temperature)
    after = model.generation_config.to_dict()
    model.generation_config = published
    assert seen == [["_Draw"]]
    assert after == theirs.to_dict()  # put back as it was
    counts = torch.bincount(torch.tensor([s[0] for s in samples]), minlength=len(tokenizer))
    expected = policy.token_logprobs(model, prompt.prefix_ids, [prompt.suffix_ids[0]] * len(tokenizer),
                                     [[t] for t in range(len(tokenizer))], temperature)[0].exp().squeeze(1).detach() * n
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    degrees = len(tokenizer) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_sampling_happens_in_eval_mode_and_restores_the_mode(model, tokenizer, prompts, monkeypatch):
    modes = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **kw: (modes.append(model.training), original(*a, **kw))[1])
    policy.checkpoint_activations(model)
    try:
        model.train()
        torch.manual_seed(0)
        noisy = policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 2, max_new_tokens=5)
        assert model.training and modes == [False]
    finally:
        stop_checkpointing(model)
    model.eval()
    torch.manual_seed(0)
    assert noisy == policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 2, max_new_tokens=5)


def test_a_sampling_that_fails_leaves_the_model_as_it_was(model, tokenizer, prompts, monkeypatch):
    """Out of memory, say: the caller tries again, and gradient checkpointing works in training mode alone."""
    published = model.generation_config
    model.train()
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(model, "generate", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 1, max_new_tokens=5)
    assert model.training and model.generation_config is published


def test_a_prompt_beyond_the_sliding_window_is_refused(model, tokenizer, prompts, monkeypatch):
    longest = len(prompts[0].prefix_ids) + max(map(len, prompts[0].suffix_ids)) + 5
    for window in (longest - 1, longest):
        monkeypatch.setattr(model.config, "sliding_window", window, raising=False)
        sample = lambda: policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 1, max_new_tokens=5)
        if window < longest:
            with pytest.raises(InputError, match=f"{longest} tokens.*window of {window}"):
                sample()
            monkeypatch.setattr(model.config, "layer_types", ["full_attention"] * 2, raising=False)  # a window that no layer has
            sample()
            monkeypatch.delattr(model.config, "layer_types")
        else:
            assert len(sample()) == len(prompts[0].suffix_ids)


def test_response_ends_with_the_first_stop_token(model, tokenizer, prompts):
    """Also when padding is the same token: every id up to and with the first stop counts, none after it."""
    torch.manual_seed(0)
    stop = tokenizer.eos_token_id
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        saved = weight[stop].clone()
        weight[stop] = weight.mean(0) * 0 + 0.6 * saved  # any change will do: stops appear early and late
    tokenizer_pad, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        rows = policy.sample(model, tokenizer, prompts[0].prefix_ids, prompts[0].suffix_ids, 200, max_new_tokens=40, temperature=2.0)
    finally:
        tokenizer.pad_token = tokenizer_pad
        with torch.no_grad():
            weight[stop] = saved
    flat = [r for group in rows for r in group]
    ended = [r for r in flat if stop in r]
    assert ended and all(r.index(stop) == len(r) - 1 for r in ended)
    assert all(len(r) == 40 for r in flat if stop not in r)


# --- losses ---


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    got = policy.clipped_loss(ratio.log(), old, advantage, 0.2)
    torch.testing.assert_close(got, torch.tensor([-1.2, 1.5, -0.5, 0.8]))


def test_clipped_loss_on_policy_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy.clipped_loss(logprobs, logprobs.detach(), torch.tensor([0.3, -0.7])).sum().backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([0.3, -0.7]))


def test_k3_is_an_unbiased_kl_and_never_negative():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    estimates = policy.k3_kl(p, q)
    assert (estimates >= 0).all()
    assert (p.exp() * estimates).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-6)
    assert torch.equal(policy.k3_kl(p, p), torch.zeros(3))


# --- loading ---


def test_model_names(tmp_path):
    assert policy.resolve("Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert policy.resolve("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert policy.resolve("Llama-3.2-3B") == "meta-llama/Llama-3.2-3B"
    assert policy.resolve("someone/model") == "someone/model"
    for wrong in (str(tmp_path / "none"), "./none", "nosuchfamily-1b", str(tmp_path)):
        with pytest.raises(InputError):
            policy.resolve(wrong)


def test_tiny_model_survives_saving(model, tokenizer, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, its_tokenizer = policy.load(str(tmp_path))
    assert its_tokenizer.chat_template == tokenizer.chat_template
    text = "Avelle rose soap <answer>yes</answer>"
    assert its_tokenizer(text).input_ids == tokenizer(text).input_ids
    ids = torch.tensor([prompts[0].prefix_ids])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_llama_architecture_too(tokenizer, prompts):
    """Grouped-query attention and another model class go through the same caches."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2, bos_token_id=None)).eval()
    p = prompts[0]
    samples = [policy.sample(llama, tokenizer, p.prefix_ids, p.suffix_ids, 1, max_new_tokens=6, greedy=True, share_prefix=s)
               for s in (True, False)]
    assert samples[0] == samples[1]
    responses = [r for (r,) in samples[0]]
    a, b = (policy.token_logprobs(llama, p.prefix_ids, p.suffix_ids, responses, share_prefix=s)[0] for s in (True, False))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_saved_model_reads_as_it_did(model, tokenizer, tmp_path):
    """Tokens and logits of text with digits, markup and other scripts, after saving and loading by the Auto classes."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = policy.load(str(tmp_path))
    for text in ("brand Isolde 1, kind mask 12, scent mint 0.\n<answer>no</answer>", "3 days ago: Café 2000 (rated 4.5)", "日本 <|im_end|>\n\n"):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert torch.equal(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)
    assert policy.stop_ids(loaded, again) == policy.stop_ids(model, tokenizer)


# --- what makes a tiny model learn to pick from a list ---


def test_added_words_are_one_token_each_and_alike_to_their_parts(toy):
    model, tokenizer = policy.load("tiny", texts=toy.texts(), seed=0)
    titles = [f" {x.title}" for x in toy.items.values()]
    torch.manual_seed(0)
    policy.add_words(model, tokenizer, titles)
    text = f"- {titles[0].strip()}\n- {titles[7].strip()}!"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and sum(i in tokenizer.convert_tokens_to_ids(titles) for i in ids) == 2
    weight = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    title = weight[tokenizer.convert_tokens_to_ids(titles[0])]
    _, plain = policy.load("tiny", texts=toy.texts(), seed=0)
    # n pieces, nearly orthogonal, over sqrt(n), and half a random vector: the cosine with a piece is 1 / sqrt(n (1 + 1/4))
    pairs = [(i, tokenizer.convert_tokens_to_ids(t), len(ids)) for t in titles for ids in [plain(t).input_ids] for i in ids]
    gaps = torch.stack([weight[i] @ weight[t] - (1.25 * n) ** -0.5 for i, t, n in pairs])
    assert gaps.mean().abs() < 0.02 and gaps.abs().max() < 0.3
    assert (weight[:300] @ title).abs().median() < 0.1
    assert model(torch.tensor([ids])).logits.shape[-1] == len(tokenizer)


def test_copying_heads_attend_so_many_tokens_back(toy):
    model, tokenizer = policy.load("tiny", texts=toy.texts(), seed=0)
    policy.favour_copying(model, offsets=(1, 2, 3))
    model.set_attn_implementation("eager")
    ids = torch.randint(3, len(tokenizer), (1, 120), generator=torch.Generator().manual_seed(0))
    attention = model(ids, output_attentions=True).attentions[0][0]  # (heads, T, T)
    for head, offset in enumerate((1, 2, 3)):
        hit = attention[head].argmax(-1)[offset:] == torch.arange(120 - offset)
        assert hit.float().mean() > 0.95
    for layer in model.model.layers:
        torch.testing.assert_close(layer.self_attn.o_proj.weight, layer.self_attn.v_proj.weight.T)
