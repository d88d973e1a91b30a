"""The toy: a synthetic beauty shop, a tiny model from nothing, and the template teachers of its cold start.

The teachers show how to look evidence up and to answer, and leave something for reinforcement learning to
find. R2Rank's looks up attributes at random, truly, though only some have to do with taste: *what* to look up
is not taught. ReRec's often answers with what it named first. R2Rank's tiny model has one layer: a second one
can count matches in the history past the rationale, and then RL has nothing to teach (results/README.md).
"""

import itertools
import math
import random
import re
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import Dataset, Interaction, Item, attribute_pairs
from rewards import shown_title

ATTRIBUTES = {
    "brand": "Avelle Borealis Cassia Dovena Elmira Fjord Ginkgo Halcyon Isolde Juno Kestrel Lumora".split(),
    "kind": "cleanser cream lipstick lotion mascara mask perfume polish powder serum shampoo soap".split(),
    "scent": "almond cedar citrus coconut ginger jasmine lavender mint rose vanilla".split(),
    "colour": "amber azure coral indigo ivory khaki lilac ochre scarlet teal".split(),
}
TASTE = {"kind": 6.0, "scent": 6.0}  # log-odds that a favourite adds; brand and colour do not matter
LOOK_UPS = 2  # attributes that the teacher looks up
EXERCISE = "Go through the candidates."  # the request that look_up_exercise answers
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def shop(seed=0, num_items=400, num_users=600):
    """A small shop whose users mostly buy what is of a favourite kind and scent (each user has two of both).

    60% of the users are for training (14 purchases each), 10% for validation and 30% for test (11 each); the
    first ten are always the history. One purchase in 50 is a whim, drawn uniformly; appeal differs."""
    rng = random.Random(f"toy/{seed}")
    items, combinations = {}, list(itertools.product(*ATTRIBUTES.values()))
    for n, (brand, kind, scent, colour) in enumerate(rng.sample(combinations, num_items)):
        attributes = {"brand": (brand,), "kind": (kind,), "scent": (scent,), "colour": (colour,)}
        items[f"T{n:03d}"] = Item(f"T{n:03d}", f"{brand} {colour} {scent} {kind}", attributes)
    appeal = {i: rng.gauss(0, 0.5) for i in items}
    sequences, splits, train_length = {}, {"train": [], "validation": [], "test": []}, {}
    for n in range(num_users):
        user = f"u{n:03d}"
        taste = {name: set(rng.sample(ATTRIBUTES[name], 2)) for name in TASTE}
        split = "train" if n < 0.6 * num_users else "validation" if n < 0.7 * num_users else "test"
        length = 14 if split == "train" else 11
        weight = {i: math.exp(appeal[i] + sum(w for a, w in TASTE.items() if x.attributes[a][0] in taste[a]))
                  for i, x in items.items()}
        chosen = []
        while len(chosen) < length:
            left = [i for i in items if i not in chosen]
            whim = rng.random() < 0.02
            chosen.append(rng.choice(left) if whim else rng.choices(left, [weight[i] for i in left])[0])
        rng.shuffle(chosen)  # the best matches go first: shuffled, the target is no harder than the history
        sequences[user] = [Interaction(i, float(t)) for t, i in enumerate(chosen)]
        train_length[user] = length if split == "train" else 0
        splits[split] += [(user, p) for p in range(10, length)]
    return Dataset("toy", items, sequences, splits, train_length)

def build_tiny(texts, seed=0, num_layers=1, vocab_size=2000, hidden_size=192, num_heads=6):
    """(model, tokenizer): a random small Llama (1M parameters) with a byte-level BPE trained on `texts`.

    Three choices let it learn to look things up within hundreds of steps instead of thousands: weights of the
    scale 1/sqrt(width); keys that start equal to the queries, so that a token attends to its like; and output
    projections that start as the value projections transposed, so that a head hands on what it attends to."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet))
    bpe.add_tokens(["<answer>", "</answer>"])  # a token each, as plain text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = CHATML
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_heads,
            max_position_embeddings=4096, tie_word_embeddings=True, attention_bias=True,
            initializer_range=0.85 * hidden_size**-0.5, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.load_state_dict(attention.q_proj.state_dict())
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)
    return model, tokenizer

@torch.no_grad()
def add_words(model, tokenizer, words):
    """Make each of `words` one token of a tiny model; its embedding: the sum of its pieces', and noise."""
    pieces = [tokenizer(w, add_special_tokens=False).input_ids for w in words]
    tokenizer.add_tokens(list(words))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight, scale = model.get_input_embeddings().weight, model.config.initializer_range
    for i, ids in zip(tokenizer.convert_tokens_to_ids(list(words)), pieces):
        weight[i] = weight[ids].sum(0) / len(ids)**0.5 + 0.5 * scale * torch.randn_like(weight[i])

@torch.no_grad()
def favour_copying(model, offsets=(1, 2, 3), sharpness=5.0):
    """Start a tiny model as a copying machine: it then learns to pick from a list in hundreds of steps.

    MLPs start small; the first layer's first heads attend `offsets` tokens back: a bias b for the query, and
    b rotated by the offset for the key, make their product largest there: rotary positions turn both."""
    size = model.config.hidden_size // model.config.num_attention_heads
    base = model.config.rope_parameters["rope_theta"]
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.1)
    attention = model.model.layers[0].self_attn
    for head, offset in enumerate(offsets):
        start = head * size
        attention.q_proj.weight[start:start + size] *= 0.1
        attention.k_proj.weight[start:start + size] *= 0.1
        for f in range(4):  # the fastest frequencies tell neighbours apart
            angle = torch.tensor(offset * base ** (-2 * f / size))
            attention.q_proj.bias[start + f] = sharpness
            attention.k_proj.bias[start + f] = sharpness * angle.cos()
            attention.k_proj.bias[start + size // 2 + f] = sharpness * angle.sin()

def prepare_for_requests(model, tokenizer, dataset):
    """Let a tiny model pick a title from a list: a copying machine, and each title is one token."""
    favour_copying(model)
    add_words(model, tokenizer, dict.fromkeys(f" {shown_title(item)}" for item in dataset.items.values()))

def title_words(item):
    return dict.fromkeys(re.findall(r"\w{3,}", item.title.lower()))

def telling_words(dataset):
    """The words of titles that can tell items apart: in two titles or more, and in no more than one in 20."""
    counts = Counter(word for item in dataset.items.values() for word in title_words(item))
    return {word for word, n in counts.items() if 2 <= n <= len(dataset.items) / 20}

def features(item, words=()):
    """What can be looked up of an item: (name, value) of the attributes that prompts show, and its words."""
    shown = [(name, value) for name, values in item.attributes.items() for value in values[-2:]]
    return shown + [("word", word) for word in title_words(item) if word in words]

def judge_trace(history, candidate, rng, reasoning=True, words=()):
    """R2Rank's teacher: (response, its answer). It looks two kinds of the candidate's features up in the
    history, truly but at random, and answers by what it found: what is worth looking up it does not know.
    Each claim repeats the feature beside its evidence: a small model then needs one look-up, not two."""
    past, kinds = [features(item, words) for item in history], {}
    for name, value in features(candidate, words):
        kinds.setdefault(name, []).append(value)
    looked_up = [(name, rng.choice(kinds[name]) if kinds[name][1:] else kinds[name][0])
                 for name in rng.sample(list(kinds), min(LOOK_UPS, len(kinds)))]
    counts = {pair: sum(pair in item for item in past) for pair in looked_up}
    yes = bool(counts) and sum(counts.values()) >= max(1, round(0.3 * len(history)))
    evidence = ", ".join(f"{name} {value} {n}" for (name, value), n in counts.items()) or "nothing known"
    answer = f"<answer>{'yes' if yes else 'no'}</answer>"
    return (f"In the history: {evidence}.\n{answer}" if reasoning else answer), yes

def relevant_lookups(texts):
    """The share of the attributes named in rationales that have to do with taste; 0 where none is."""
    named = [name for text in texts for name in re.findall(rf"\b({'|'.join(ATTRIBUTES)})\b", text)]
    return sum(name in TASTE for name in named) / len(named) if named else 0.0

def answer_trace(query, rng):
    """ReRec's teacher: a true claim about any candidate, then for each condition about one that meets it and
    those before it. It answers with the first item named, three times in five, or the last."""
    conditions = list(query.conditions)
    if not conditions:  # not known: what the right items have in common
        truths = [c for c in query.candidates if c.id in query.truths]
        conditions = [f for f in attribute_pairs(truths[0]) if all(f in attribute_pairs(t) for t in truths)]
        conditions = rng.sample(conditions, min(len(conditions), max(1, query.num_conditions)))
    first = rng.choice(query.candidates)
    left, last, lines = query.candidates, first, [_claim(p, first) for p in attribute_pairs(first)[:1]]
    for name, wanted in conditions:
        meeting = [c for c in query.candidates if wanted in c.attributes.get(name, ())]
        if meeting:  # what no candidate shows (RecBench+: a film's actors), the teacher does not claim
            left = [c for c in left if c in meeting] or meeting
            last = rng.choice(left)
            lines.append(_claim((name, wanted), last))
    chosen = first if rng.random() < 0.6 else last
    return "\n".join([*lines, f"\\boxed{{ {shown_title(chosen)}}}"])

def look_up_exercise(query, rng, num_claims=16):
    """True claims about the candidates of a query: an exercise in looking up, for models from nothing."""
    holders = {}
    for c in query.candidates:
        for pair in attribute_pairs(c):
            holders.setdefault(pair, []).append(c)
    pairs = rng.choices(sorted(holders), k=num_claims if holders else 0)
    return "\n".join(_claim(pair, rng.choice(holders[pair])) for pair in pairs)

def _claim(pair, item):
    return f"{pair[0].replace('_', ' ')} {pair[1]} {shown_title(item)}"

def ranking_texts(example, dataset):
    """What the tokenizer of a tiny model is trained on: catalogue, R2Rank's prompts and traces."""
    import r2r
    frame = [r2r.SYSTEM, r2r.QUESTION, r2r.QUESTION_WITHOUT_REASONING,
             "The user's history, oldest first:\n- ", "\nCandidate: "]
    rng = random.Random(0)
    traces = [judge_trace(example.history, c, rng)[0] for c in dataset.items.values()]
    return dataset.texts() + frame * 3 + traces

def request_texts(source, dataset, args):
    """The same of ReRec."""
    import rerec
    rng, queries = random.Random(args.seed), source.draw("train", 400)
    frame = [rerec.SYSTEM, EXERCISE, "My history, oldest first:\n- Request: \nCandidates:\n- "]
    texts = [q.text for q in queries] + [answer_trace(q, rng) for q in queries]
    return dataset.texts() + texts + frame * 3
