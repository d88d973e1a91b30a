"""The language model as a policy: load it, sample from it, score what it said.

The prompts of one list differ only after the candidate begins. So a prompt is a *prefix* (instruction and
history, once a list) and a *suffix* (candidate and assistant's header), joined as token ids. What is the same
is computed once:

    sampling   the prefix runs once a list, the suffix once a candidate; their keys and values are copied into
               a static cache of all rows, and Hugging Face `generate` goes on from there
    update     `SharedPrefix` runs the prefixes once, with gradients; rows read its keys and values as
               detached leaves; one backward pass at the end sends what the leaves collected through it

Equations (PPO, arXiv 1707.06347; k3, http://joschu.net/blog/kl-approx.html):

    clipped_loss   -min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = exp(logprob - old_logprob)
    k3_kl          exp(ref - logprob) - (ref - logprob) - 1, an unbiased estimate of KL(pi || ref), never < 0

Choices of ours:
  1. Log-probabilities are those of the distribution that is sampled, temperature included.
  2. Dropout is set to 0 at loading, so that train and eval mode score alike.
  3. The generation defaults that a model ships with (top-p, penalties) are put aside while sampling: the
     policy that samples would be another one than the policy that is scored.
"""

import inspect
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import date

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from data import InputError

SHARE_PREFIX = True      # False: every row carries its whole prompt; for tests and the bench
MAX_ROWS = 320           # rows of a `generate` call (at least one list): bounds the memory of its cache
COMPILE_DECODING = False  # True: on a GPU `generate` compiles the decoding step; tests/gpu.py measures it
CHUNK_ELEMENTS = 2**24   # logits held at once: 64 MB in float32, whatever the vocabulary
CLIP = 0.2               # PPO's epsilon; it acts from the second update on a rollout on
MARK = "\u241e"          # stands for the user's text while a template is rendered; no template writes it


# --- loading --------------------------------------------------------------------------------------------

def load(name, device="cpu", dtype=torch.float32, texts=(), seed=0, weights=None, layers=1):
    """(model in eval mode, tokenizer). Raises InputError.

    texts, layers: what `tiny`'s tokenizer learns from, its depth. weights: for a folder that has none."""
    from extras.models import from_pretrained, prepare, resolve
    source = resolve(name)
    if source == "tiny":
        from extras.toy import build_tiny
        model, tokenizer = build_tiny(texts, seed, layers)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
    else:
        model, tokenizer = from_pretrained(source, dtype, weights)
    prepare(model)
    # Some templates write today's date: the first day stays with the tokenizer, and prompts stay the same.
    tokenizer.init_kwargs.setdefault("prompt_date", date.today().isoformat())
    return model.to(device).eval(), tokenizer


# --- prompts as ids -------------------------------------------------------------------------------------

@dataclass
class Prompt:
    """The prompts of one list: `prefix_ids`, common to all, and the K `suffix_ids`."""

    prefix_ids: list[int]
    suffix_ids: list[list[int]]

def encode_prompt(tokenizer, system, prefix, suffixes):
    """Chat prompts: system message, user turn `prefix + suffix`, open assistant turn; pieces tokenised alone.

    Special tokens count only where the template writes them: an item's title that spells one stays text.
    """
    try:
        text = _render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": MARK}])
    except Exception:  # some templates refuse a system message (jinja2's TemplateError)
        text = ""
    if system.strip() not in text:  # ... and some drop it without a word
        text = _render(tokenizer, [{"role": "user", "content": f"{system}\n\n{MARK}"}])
    head, tail = (tokenizer(piece, add_special_tokens=False).input_ids for piece in text.split(MARK))

    def plain(piece):
        return tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids

    return Prompt(head + plain(prefix), [plain(suffix) + tail for suffix in suffixes])

def _render(tokenizer, messages, open_turn=True):
    if not tokenizer.chat_template:  # a base model: plain text
        turns = "".join(f"{m['content']}\n\n" for m in messages)
        turns = turns if open_turn else turns[:-2] + (tokenizer.eos_token or "")
        return (tokenizer.bos_token or "") + turns
    day = date.fromisoformat(tokenizer.init_kwargs.get("prompt_date", date.today().isoformat()))
    # transformers 5.24 hands no function to a template: what it would write is put there instead.
    template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(day.strftime(call[2])),
                      tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                         add_generation_prompt=open_turn,
                                         date_string=day.strftime("%d %b %Y"))

def stop_ids(model, tokenizer):
    """Ids that end a response, the template's end of turn first. `eos_token_id` may be a list, or None."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = _render(tokenizer, turns, open_turn=False)
    turn_end = tokenizer(text.split(MARK)[1], add_special_tokens=False).input_ids[:1]
    found = [i for i in turn_end if i in tokenizer.all_special_ids]
    for ids in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not found:
        raise InputError("the tokenizer names no end-of-sequence token, so no response would ever end")
    return list(dict.fromkeys(found))


# --- sampling -------------------------------------------------------------------------------------------

@dataclass
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), or (greedy) the most probable token."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    greedy: bool = False

@dataclass
class Rollout:
    """G responses to each of K prompts of L lists: row (l, i, g) is number (l * K + i) * G + g; K may vary.

    responses: ids, up to and with the first end-of-sequence id; hidden (N, D): the last layer's state at each
    response's last token (at the prompt's, where there is no response).
    """

    prompts: list[Prompt]
    num_samples: int
    responses: list[list[int]] = field(default_factory=list)
    hidden: torch.Tensor | None = None

    def __post_init__(self):
        G = self.num_samples
        self.prefixes = [p.prefix_ids for p in self.prompts]
        self.owner = [n for n, p in enumerate(self.prompts) for _ in range(len(p.suffix_ids) * G)]
        self.suffixes = [s for p in self.prompts for s in p.suffix_ids for _ in range(G)]
        self.responses = self.responses or [[] for _ in self.owner]

    def by_list(self, values):
        """Cut a tensor of rows (N, ...) into one (K, G, ...) tensor a list."""
        sizes = [len(p.suffix_ids) * self.num_samples for p in self.prompts]
        return [rows.view(-1, self.num_samples, *values.shape[1:]) for rows in values.split(sizes)]

def sample(model, tokenizer, prefix_ids, suffix_ids, num_samples, **settings):
    """Responses to K prompts of one prefix: [K][num_samples] lists of ids; settings: those of `Sampling`."""
    prompts = [Prompt(prefix_ids, suffix_ids)]
    rows = sample_rows(model, tokenizer, prompts, num_samples, Sampling(**settings)).responses
    return [rows[i:i + num_samples] for i in range(0, len(rows), num_samples)]

@torch.no_grad()
def sample_rows(model, tokenizer, prompts, num_samples, sampling):
    """`num_samples` responses to each prompt: a Rollout with its states. Uses torch's global generator."""
    rollout, hidden, stops = Rollout(prompts, num_samples), {}, stop_ids(model, tokenizer)
    # The first row of each candidate, ordered by content: the order of the candidates then changes nothing.
    order = sorted(range(0, len(rollout.owner), num_samples),
                   key=lambda n: (rollout.owner[n], len(rollout.suffixes[n]), rollout.suffixes[n]))
    lists_a_call = max(1, MAX_ROWS // (num_samples * max((len(p.suffix_ids) for p in prompts), default=1)))
    for start in range(0, len(prompts), lists_a_call):
        first = [n for n in order if start <= rollout.owner[n] < start + lists_a_call]
        ids, mask, cache = _prefill(model, rollout, first, sampling.max_new_tokens + 1)
        tokens, states = _generate(model, ids, mask, cache, stops, sampling)
        rows = [n + g for n in first for g in range(num_samples)]
        for i, (n, row) in enumerate(zip(rows, tokens[:, ids.shape[1]:].tolist())):
            row = row[:sampling.max_new_tokens]
            end = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))  # the stop counts
            rollout.responses[n] = row[:end]
            hidden[n] = states[end][i]  # states[t] has read t tokens of the response
    rollout.hidden = torch.stack([hidden[n] for n in sorted(hidden)]) if hidden else None
    return rollout

def _prefill(model, rollout, first, room):
    """ids, mask (N, P + S) of prompts, and a cache of all but their last token with room for `room` more."""
    from extras.models import check_width
    lists = sorted({rollout.owner[n] for n in first})
    which = torch.tensor([lists.index(rollout.owner[n]) for n in first], device=model.device)
    prefix_ids, prefix_mask = _pad([rollout.prefixes[n] for n in lists], model.device, left=True)
    # Shorter suffixes are padded between prefix and suffix; the mask has holes there.
    suffix_ids, suffix_mask = _pad([rollout.suffixes[n] for n in first], model.device, left=True)
    G = rollout.num_samples
    ids = torch.cat([prefix_ids[which], suffix_ids], dim=1).repeat_interleave(G, 0)
    mask = torch.cat([prefix_mask[which], suffix_mask], dim=1).repeat_interleave(G, 0)
    check_width(model, ids.shape[1] + room)
    if not SHARE_PREFIX:
        return ids, mask, DynamicCache()
    prefix, pairs = SharedPrefix(model, [rollout.prefixes[n] for n in lists]), {}
    if suffix_ids.shape[1] > 1:  # the last token is left to `generate`
        _, pairs = _forward(model, suffix_ids[:, :-1], suffix_mask[:, :-1], prefix, which)
    layers = []
    for index, pair in sorted(prefix.leaves.items()):
        pair = [x[which] for x in pair]  # keys and values (K, h, P, d)
        if pairs:
            pair = [torch.cat(both, dim=2) for both in zip(pair, pairs[index])]
        layers.append(StaticLayer(max_cache_len=ids.shape[1] + room))
        layers[-1].update(*(x.repeat_interleave(G, 0) for x in pair))
    return ids, mask, Cache(layers=layers)

class _EndedBefore(transformers.StoppingCriteria):
    """A row may stop one token after its end: by then the model has read that end, and its state is known."""

    def __init__(self, start, stops):
        self.start, self.stops = start, stops

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, self.start:-1], self.stops).any(1)

def _generate(model, ids, mask, cache, stops, sampling):
    """Tokens (N, T + new) of `generate`, and states (N, D) after 0, 1, 2, ... of the new ones were read."""
    settings = {"do_sample": False} if sampling.greedy else {
        "do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(max_new_tokens=sampling.max_new_tokens + 1, pad_token_id=stops[0],
                              use_cache=True, disable_compile=not COMPILE_DECODING, **settings)
    ended = _EndedBefore(ids.shape[1], torch.tensor(stops, device=model.device))
    states, published, was_training = [], model.generation_config, model.training
    hook = model.base_model.register_forward_hook(torch.compiler.disable(  # a longer list: another program
        lambda module, args, output: states.append(output.last_hidden_state[:, -1].clone())))
    try:
        # What a config leaves open, generate takes from the model's own: that one is put aside (choice 3).
        model.generation_config = GenerationConfig()
        model.eval()  # in train mode with gradient checkpointing, generate gives garbage with only a warning
        tokens = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[ended],
                                **_as_argument(model, cache))
    finally:
        hook.remove()
        model.generation_config = published
        model.train(was_training)
    return tokens, states

def _as_argument(model, cache):
    """The cache under the name that this version of transformers has for it."""
    name = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
    return {name: cache}

def _pad(lists, device, left=False):
    """Ids (N, T) and mask (N, T) of lists of unequal length."""
    width = max(map(len, lists))
    ids, mask = torch.zeros(2, len(lists), width, dtype=torch.long)
    for n, row in enumerate(lists):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, where] = torch.tensor(row, dtype=torch.long)
        mask[n, where] = 1
    return ids.to(device), mask.to(device)


# --- scoring, with gradients ----------------------------------------------------------------------------

class _PrefixCache(Cache):
    """Gives rows their prefix's keys and values before their own, which it keeps in `pairs`."""

    def __init__(self, leaves, width, rows):
        super().__init__(layers=[])
        self.leaves, self.width, self.rows, self.pairs = leaves, width, rows, {}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.pairs.setdefault(layer_idx, (keys, values))
        if not self.leaves:
            return keys, values
        shared = [x.index_select(0, self.rows) for x in self.leaves[layer_idx]]  # (N, h, P, d)
        return tuple(torch.cat(both, dim=2) for both in zip(shared, (keys, values)))

    def get_seq_length(self, layer_idx=0):
        return self.width

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.width + query_length, 0

def _forward(model, ids, mask, prefix=None, rows=None):
    """The decoder on ids (N, T), each after its row of a SharedPrefix: hidden (N, T, D), keys and values."""
    from extras.models import check_width
    if prefix is not None:
        mask = torch.cat([prefix.mask[rows], mask], dim=1)
    width = mask.shape[1] - ids.shape[1]
    check_width(model, mask.shape[1])
    cache = _PrefixCache(prefix and prefix.leaves, width, rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, width:]  # holes in the mask do not count
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                              **_as_argument(model, cache))
    return output.last_hidden_state, cache.pairs

class SharedPrefix:
    """Keys and values of L prefixes, computed once and read by any number of rows, as detached leaves.

    So each micro-batch of rows runs its own backward and is freed; `backward()` at the end sends the
    gradients that the leaves collected through the prefixes, once.
    """

    def __init__(self, model, prefixes):
        ids, self.mask = _pad(prefixes, model.device, left=True)
        _, self.pairs = _forward(model, ids, self.mask)
        self.leaves = {layer: tuple(x.detach().requires_grad_(x.requires_grad) for x in pair)
                       for layer, pair in self.pairs.items()}

    def backward(self):
        both = [(x, leaf) for layer, pair in self.pairs.items() for x, leaf in zip(pair, self.leaves[layer])]
        used = [(x, leaf.grad) for x, leaf in both if leaf.grad is not None]
        if used:
            torch.autograd.backward(*zip(*used))

def row_logprobs(model, prefix, owner, suffixes, responses, temperature=1.0, entropy=False):
    """Log-probabilities of the responses, and the state at each row's last token. Differentiable.

    Row n: number owner[n] of the SharedPrefix `prefix` (or None), then suffixes[n] and responses[n], ids.
    Returns logprobs (N, T), 0 beyond a response's end, mask (N, T), hidden (N, D), and if asked the entropy
    (N, T) of each token's distribution.
    """
    device = model.device
    # Padding is at the right, where no real token can see it, so the mask need not tell of it.
    ids, _ = _pad([s + r for s, r in zip(suffixes, responses)], device)
    rows = None if prefix is None else torch.tensor(owner, device=device)
    hidden, _ = _forward(model, ids, torch.ones_like(ids), prefix, rows)  # (N, S, D)
    mask = _pad(responses, device)[1].bool()
    last = torch.tensor([len(s) + len(r) - 1 for s, r in zip(suffixes, responses)], device=device)
    # (row, column, place that predicts it, token): the state at place t - 1 predicts the token at t
    tokens = [(n, t, len(suffixes[n]) + t - 1, token)
              for n, response in enumerate(responses) for t, token in enumerate(response)]
    row, column, place, target = torch.tensor(tokens, dtype=torch.long, device=device).view(-1, 4).unbind(1)
    flat = _token_logprobs(model.get_output_embeddings(), hidden[row, place], target, temperature, entropy)
    logprobs, *more = (x.new_zeros(mask.shape).index_put((row, column), x) for x in flat.unbind(1))
    return logprobs, mask, hidden[torch.arange(len(last), device=device), last], *more

def _token_logprobs(output_layer, hidden, targets, temperature, entropy):
    """log softmax(W h / temperature)[target], and entropy, in float32: (M, D), (M,) -> (M, 1 or 2)."""
    def chunk(h, t):
        logits = output_layer(h).float() / temperature
        columns = [-F.cross_entropy(logits, t, reduction="none")]
        if entropy:
            columns.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
        return torch.stack(columns, dim=1)

    size = max(1, CHUNK_ELEMENTS // output_layer.weight.shape[0])
    if len(targets) <= size:
        return chunk(hidden, targets)
    # The logits of a chunk are computed again in its backward pass instead of being kept.
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(size), targets.split(size))])

def micro_batches(model, rollout, size, temperature=1.0, rows=None, entropy=False):
    """Yield (row numbers, *row_logprobs) of at most `size` rows until each of `rows` (None: all) came once.

    Lists share one pass over their prefixes, as many as have at most `size` rows. Under grad, run backward on
    each micro-batch before taking the next: after the last of a pass, its gradients go through the prefixes.
    """
    rows = list(range(len(rollout.owner))) if rows is None else rows
    count = Counter(rollout.owner[n] for n in rows)  # of each list, in the order of the lists
    lists, lists_a_pass = list(count), max(1, size // max(count.values(), default=1))
    for start in range(0, len(lists), lists_a_pass):
        chosen = lists[start:start + lists_a_pass]
        prefix = SharedPrefix(model, [rollout.prefixes[i] for i in chosen]) if SHARE_PREFIX else None
        # By length, which pads little; and by content, so that the order of the candidates changes nothing.
        members = sorted((n for n in rows if rollout.owner[n] in chosen), key=lambda n: (
            len(rollout.suffixes[n]) + len(rollout.responses[n]), rollout.owner[n], rollout.suffixes[n],
            rollout.responses[n]))
        for first in range(0, len(members), size):
            batch = members[first:first + size]
            owner = [chosen.index(rollout.owner[n]) for n in batch]
            suffixes = [rollout.suffixes[n] for n in batch]
            if not SHARE_PREFIX:
                suffixes = [rollout.prefixes[rollout.owner[n]] + rollout.suffixes[n] for n in batch]
            responses = [rollout.responses[n] for n in batch]
            yield batch, *row_logprobs(model, prefix, owner, suffixes, responses, temperature, entropy)
        if prefix and torch.is_grad_enabled():
            prefix.backward()

@torch.no_grad()
def all_logprobs(model, rollout, size=32, temperature=1.0):
    """row_logprobs of a whole rollout, without gradients, in row order: logprobs (N, T), hidden (N, D)."""
    width = max(map(len, rollout.responses), default=0)
    logprobs, hidden = torch.zeros(len(rollout.owner), width, device=model.device), {}
    for rows, found, mask, last in micro_batches(model, rollout, size, temperature):
        logprobs[rows, :mask.shape[1]] = found
        hidden.update(zip(rows, last))
    return logprobs, torch.stack([hidden[n] for n in sorted(hidden)]) if hidden else None

def token_logprobs(model, prefix_ids, suffix_ids, response_ids, temperature=1.0, share_prefix=True):
    """row_logprobs of one list, N suffix_ids and response_ids; gradients go straight through the prefix."""
    if not share_prefix:
        suffixes = [prefix_ids + s for s in suffix_ids]
        return row_logprobs(model, None, None, suffixes, response_ids, temperature)
    prefix = SharedPrefix(model, [prefix_ids])
    prefix.leaves = prefix.pairs  # not detached
    return row_logprobs(model, prefix, [0] * len(suffix_ids), suffix_ids, response_ids, temperature)


# --- losses on tokens -----------------------------------------------------------------------------------

def clipped_loss(logprobs, old_logprobs, advantages, clip=CLIP):
    """PPO's clipped surrogate, a token each, to be minimised. Shapes are equal or broadcast; not reduced."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

def k3_kl(logprobs, ref_logprobs):
    """Schulman's k3 estimate of KL(policy || reference), a token each; not reduced."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1

def token_loss(logprobs, mask, advantages, tokens, old=None, ref=None, kl_coef=0.0):
    """clipped_loss + kl_coef * k3_kl, sums over the mask divided by `tokens`; and the numbers of its log.
    (N, T) each, or (N, 1) advantages. old None: the first update, whose old log-probabilities are these."""
    old = logprobs.detach() if old is None else old
    loss = clipped_loss(logprobs, old, advantages)[mask].sum() / tokens
    outside = ((logprobs - old).exp() - 1).abs() > CLIP
    sums = {"token_loss": loss.item(), "kl": 0.0, "clipped": outside[mask].sum().item() / tokens,
            "entropy": -logprobs.detach()[mask].sum().item(), "updated": mask.sum().item()}
    if kl_coef:
        kl = k3_kl(logprobs, ref)[mask].sum() / tokens
        sums["kl"], loss = kl.item(), loss + kl_coef * kl
    return loss, sums
