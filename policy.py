"""The language model as a policy: load it, sample from it, score what it said.

The prompts of one list differ only after the candidate begins, so a prompt is a *prefix* (instructions and history, once a
list) and a *suffix* (candidate and assistant header, once a candidate), joined as token ids. Their concatenation is the
same whether the prefix is shared or not, in sampling and in the update:

    sampling   prefill the prefixes once a list and the suffixes once a candidate, let `generate` go on: each row attends to these
               shared keys and to its own (`_Shared`); shorter suffixes are padded *between* prefix and suffix
    update     `SharedPrefix` runs the prefixes once with gradients; rows read its keys and values as detached leaves, a
               micro-batch at a time; `backward()` then sends what the leaves collected through the prefixes, once. Within a
               micro-batch the rows of one candidate (its G rationales) share one pass over its suffix, too

Equations (METHODS §1 "Gradient, rationale part"; PPO, arXiv 1707.06347; k3, http://joschu.net/blog/kl-approx.html):
    token_loss   -min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = exp(logprob - old_logprob)
    k3           exp(ref - logprob) - (ref - logprob) - 1,  an unbiased, non-negative estimate of KL(pi || ref)

Deviations and choices: (1) log-probabilities are those of the *sampling* distribution, temperature included; (2) dropout is
set to 0 at loading, so that train and eval mode score alike; (3) the model's published generation defaults (top-p, penalties …)
are put aside while sampling and saved again with the checkpoint; (4) a token is drawn by the cumulative distribution (`_Draw`), and
`generate`, told to be greedy, takes it.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import InputError

ORGANISATIONS = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama": "meta-llama", "gemma": "google", "phi": "microsoft",
                 "mistral": "mistralai", "ministral": "mistralai", "olmo": "allenai", "deepseek": "deepseek-ai"}
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MB in float32, whatever the vocabulary and the number of tokens
RECOMPUTE_BELOW = 0.1  # prefixes with fewer tokens than this share of their rows' keep no activations


# --- loading ---------------------------------------------------------------------------------------------------------


def resolve(name):
    """`--model` to what from_pretrained takes: `tiny`, a local directory, a hub id, or a bare name of a known family."""
    path = Path(name).expanduser()
    if name == "tiny":
        return name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"--model {name}: the folder has no config.json, so it is no Hugging Face model directory")
        return str(path)
    if name[:1] in "./~" or name.count("/") > 1:
        raise InputError(f"--model {name}: no such folder")
    if "/" in name:
        return name
    family = re.match(r"[a-z]*", name.lower()).group()
    if family not in ORGANISATIONS:
        raise InputError(f"--model {name}: no such folder, nor a bare name of a family known here ({', '.join(ORGANISATIONS)}); "
                         f"give `tiny`, a local directory, or a hub id such as Qwen/Qwen2.5-1.5B")
    return f"{ORGANISATIONS[family]}/{name}"


def load(name, device="cpu", dtype=torch.float32, texts=(), seed=0):
    """Model and tokenizer. `texts` (strings) are what the tokenizer of `tiny` is trained on. On the device `meta` the model has no weights,
    and only its config is read. Raises InputError."""
    source = resolve(name)
    transformers.utils.logging.disable_progress_bar()  # for loading and saving weights: the stages' own bars say more
    if source == "tiny":
        model, tokenizer = build_tiny(texts, seed)
        for parameter in model.parameters():  # not the rotary frequencies: from_pretrained leaves them in float32, too
            parameter.data = parameter.data.to(dtype)
    else:
        verify_directory(source, complete=False)  # someone may want the model without its score head
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            if device == "meta":
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--model {name}: cannot load {source} ({reason})") from None
        if (Path(source) / ADAPTERS).exists():  # the state of a run with --lora
            load_adapters(model, source)
    for name_ in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name_, None) not in (None, 1, 1.0):
            raise InputError(f"--model {name}: its logits are not a plain linear layer of the hidden state ({name_} is set), which "
                             f"the log-probabilities here assume; Qwen, Llama, SmolLM, Mistral, Phi and OLMo models work")
    for module in model.modules():  # choice 2
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if hasattr(module, "_can_checkpoint_with_cache"):
            # Our caches only read (SharedPrefix below), so recomputing a layer finds the same keys. Left at False,
            # transformers drops the cache under gradient checkpointing, and with it the whole prefix.
            module._can_checkpoint_with_cache = True
    windows = {"sliding_attention", "chunked_attention"} & set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if model.config._attn_implementation == "sdpa" and not windows:
        model.set_attn_implementation("shared")
    return model.to(device).eval(), tokenizer


def shared_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """Attention as in `sdpa`, but for two cases. query (N, H, T, d), key and value (N, h, T', d) or `_Shared`, to (N, T, H, d).

    Keys that rows share while sampling are read once for all of them. And on a CPU, fewer keys than queries are not copied H / h
    times under a mask first, as transformers does for the sake of GPU kernels: that is half of attention's time there.
    """
    if isinstance(key, _Shared):
        return key.attend(query, scaling), None
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    causal = attention_mask is None and query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("shared", shared_attention)
transformers.AttentionMaskInterface.register("shared", sdpa_mask)


def checkpoint_activations(model, on=True):
    """Recompute activations in the backward pass (`--gradient-checkpointing`); transformers renamed the methods."""
    if on:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    else:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def build_tiny(texts, seed=0, vocab_size=2000, hidden_size=192, num_layers=2, num_heads=6):
    """A randomly initialised small Llama (about 1M parameters) with a byte-level BPE tokenizer trained on `texts`; seconds.

    Two choices make so small a model learn to look things up within some hundred steps instead of thousands: weights of the
    scale 1/sqrt(width), and key projections that start equal to the query projections, so that from the start a token attends
    to its like. (Not a Qwen2: for those, AutoTokenizer puts Qwen's own splitting of digits in the place of what was saved.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_tokens(["<answer>", "</answer>"])  # a token each, as plain text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=num_layers,
            num_attention_heads=num_heads, num_key_value_heads=num_heads, max_position_embeddings=4096, tie_word_embeddings=True,
            attention_bias=True, initializer_range=0.85 * hidden_size**-0.5, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id))
        for layer in model.model.layers:
            layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    return model, tokenizer


@torch.no_grad()
def add_words(model, tokenizer, words):
    """Make each of `words` one token of a tiny model. Its embedding starts as the sum of its pieces' (so that a title is alike to
    the words in it) and a random part (so that it is nothing but itself)."""
    pieces = [tokenizer(w, add_special_tokens=False).input_ids for w in words]
    tokenizer.add_tokens(list(words))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight, scale = model.get_input_embeddings().weight, model.config.initializer_range
    for i, ids in zip(tokenizer.convert_tokens_to_ids(list(words)), pieces):
        weight[i] = weight[ids].sum(0) / len(ids)**0.5 + 0.5 * scale * torch.randn_like(weight[i])


@torch.no_grad()
def favour_copying(model, offsets=(1, 2, 3), sharpness=5.0):
    """Initialise a tiny model as a copying machine, which lets it learn to pick from a list in hundreds of steps, not thousands.

    What a head attends to it hands on as it is (output = value projection transposed, beside key = query); the MLPs start small;
    the first layer's first heads attend `offsets` tokens back: biases b for the query and b rotated by the offset for the key
    make their product largest there, since rotary positions turn both by their position.
    """
    size = model.config.hidden_size // model.config.num_attention_heads
    base = model.config.rope_parameters["rope_theta"]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
        layer.mlp.down_proj.weight.mul_(0.1)
    attention = model.model.layers[0].self_attn
    for head, offset in enumerate(offsets):
        start = head * size
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[start:start + size] *= 0.1
        for f in range(4):  # the fastest frequencies tell neighbours apart
            angle = torch.tensor(offset * base ** (-2 * f / size))
            attention.q_proj.bias[start + f] = sharpness
            attention.k_proj.bias[start + f] = sharpness * angle.cos()
            attention.k_proj.bias[start + size // 2 + f] = sharpness * angle.sin()


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = "adapters.safetensors"  # beside the weights that they adapt


def add_adapters(model, rank):
    """Freeze the model, and put a trainable adapter of low rank on every linear layer of its decoder (`--lora`; LoRA, arXiv 2106.09685).

    A layer W x becomes W x + 2 B A x, A and B in float32 whatever W is, B = 0 at first. Raises InputError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("--lora: the adapters are those of peft, which is not installed: pip install peft") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)
        p.data = p.data.float() if ".lora_" in name else p.data


def adapters(model):
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def load_adapters(model, folder):
    """The adapters that `save_model` wrote, put on a model that has none yet, or in the place of its own."""
    saved = load_file(Path(folder) / ADAPTERS)
    if not adapters(model):
        add_adapters(model, next(len(x) for name, x in saved.items() if "lora_A" in name))
    with torch.no_grad():
        for name, x in adapters(model).items():
            x.copy_(saved[name])


def save_model(model, folder, weights=None):
    """An ordinary Hugging Face directory; adapters go into a file of their own, and the weights are those beneath. weights: by name, of a
    model that cannot be asked for them."""
    if adapters(model):
        weights = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items() if ".lora_" not in name}
    model.save_pretrained(folder, state_dict=dict(weights) if weights else None)
    save_adapters(model, folder)


def save_adapters(model, folder):
    if tensors := adapters(model):
        save_file({name: x.contiguous() for name, x in tensors.items()}, Path(folder) / ADAPTERS)


@torch.no_grad()
def merge_adapters(model):
    """Add the adapters to the weights beneath, rounded to their type: an ordinary model again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight"):
            layer = module.get_base_layer()
            layer.weight += module.get_delta_weight("default")
            model.set_submodule(name, layer)


# --- saving ----------------------------------------------------------------------------------------------------------

CHECKSUMS = "checksums.json"


def save_directory(folder, write):
    """write(a temporary folder) puts files there; they are checksummed, flushed to the disk, and only then take `folder`'s name.

    So a folder of that name is complete, whenever the process is killed. Raises InputError naming what could not be written.
    """
    folder = Path(folder)
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # not its parents: a run directory that vanished is an error
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        (temporary / CHECKSUMS).write_text(json.dumps({str(p.relative_to(temporary)): _sha256(p) for p in files}, indent=1) + "\n")
        for path in [*files, temporary / CHECKSUMS, temporary]:
            _flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise InputError(f"{folder}: it cannot be saved ({error}). What was saved before is untouched") from None


def verify_directory(folder, complete=True):
    """Compare a folder's files with the checksums that save_directory left. Raises InputError naming the first one that differs,
    or (complete) is missing."""
    listing = Path(folder) / CHECKSUMS
    if not listing.exists():
        return  # not from save_directory: nothing to compare with
    try:
        expected = json.loads(listing.read_text())
        for name, checksum in expected.items():
            if not (Path(folder) / name).is_file():
                if complete:
                    raise InputError(f"{Path(folder) / name}: it is missing")
                continue
            if _sha256(Path(folder) / name) != checksum:
                raise InputError(f"{Path(folder) / name}: it is damaged (its checksum differs from {CHECKSUMS})")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{listing}: cannot be read ({error})") from None


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems refuse this for folders
            os.fsync(handle)
    finally:
        os.close(handle)


# --- prompts as ids --------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """The prompts of one list: `prefix_ids`, common to all, and the K `suffix_ids`."""

    prefix_ids: list[int]
    suffix_ids: list[list[int]]


def encode_prompt(tokenizer, system, prefix, suffixes):
    """Chat prompts `system`, user: `prefix + suffix`, open assistant turn. Each part is tokenised by itself.

    Special tokens count only where the template writes them: text that spells one (in an item's title, say) stays text.
    """
    mark = "\u241e"  # any string that no template writes
    try:
        text = _render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": mark}])
    except Exception:  # some families' templates refuse a system message (jinja2's TemplateError)
        text = _render(tokenizer, [{"role": "user", "content": f"{system}\n\n{mark}"}])
    head, tail = text.split(mark)
    markup = lambda s: tokenizer(s, add_special_tokens=False).input_ids
    plain = lambda s: tokenizer(s, add_special_tokens=False, split_special_tokens=True).input_ids
    tail = markup(tail)
    return Prompt(markup(head) + plain(prefix), [plain(s) + tail for s in suffixes])


def _render(tokenizer, messages, add_generation_prompt=True):
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    turns = "".join(f"{m['content']}\n\n" for m in messages)  # a base model: plain text
    return (tokenizer.bos_token or "") + (turns if add_generation_prompt else turns[:-2] + (tokenizer.eos_token or ""))


def stop_ids(model, tokenizer):
    """Ids that end a response, the template's own end of turn first. `eos_token_id` may be one id, a list, or nothing."""
    text = _render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\u241e"}], False)
    turn_end = tokenizer(text.split("\u241e")[1], add_special_tokens=False).input_ids[:1]
    found = [i for i in turn_end if i in tokenizer.all_special_ids]
    for ids in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not found:
        raise InputError("the tokenizer names no end-of-sequence token, so no response would ever end")
    return list(dict.fromkeys(found))


# --- sampling --------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How responses are drawn. max_rows bounds the rows of one `generate` call, and with it the memory of the cache; every
    `chunk` tokens the rows that have ended leave it."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    greedy: bool = False
    share_prefix: bool = True
    max_rows: int = 320
    chunk: int = 32


def sample(model, tokenizer, prefix_ids, suffix_ids, num_samples, **settings):
    """Responses to K prompts with one prefix: [K][num_samples] lists of ids, up to and with the first end-of-sequence id.

    prefix_ids: list of ids; suffix_ids: K lists of ids; settings: the fields of `Sampling`. Uses torch's global generator.
    """
    owner = [0] * (len(suffix_ids) * num_samples)
    rows, _ = sample_rows(model, tokenizer, [prefix_ids], owner, [s for s in suffix_ids for _ in range(num_samples)],
                          Sampling(**settings))
    return [rows[i:i + num_samples] for i in range(0, len(rows), num_samples)]


@torch.no_grad()
def sample_rows(model, tokenizer, prefixes, owner, suffixes, sampling):
    """One response for each row n, whose prompt is prefixes[owner[n]] + suffixes[n].

    Returns (N lists of ids, hidden (N, D): the last layer's state at each response's last token, which costs nothing here).
    """
    stops = stop_ids(model, tokenizer)
    shape = model.config.get_text_config()  # where it does not tell layers apart, all have the window, if there is one
    window = getattr(shape, "sliding_window", None) if "sliding_attention" in (getattr(shape, "layer_types", None) or ["sliding_attention"]) else None
    longest = max((len(prefixes[o]) + len(s) for o, s in zip(owner, suffixes)), default=0) + sampling.max_new_tokens
    if window and longest > window:  # gaps between prefix and suffix would count in the window: not what the update scores
        raise InputError(f"prompts and responses of up to {longest} tokens are longer than the model's sliding window of {window}; "
                         f"lower --max-new-tokens or --history-length")
    # Rows of like length meet in one call; the order depends on nothing but their content, so neither do the results.
    order = sorted(range(len(suffixes)), key=lambda n: (owner[n], len(suffixes[n]), suffixes[n]))
    responses, hidden = [[] for _ in suffixes], [None] * len(suffixes)
    with _own_defaults(model, stops, sampling) as (config, draw):
        for start in range(0, len(order), sampling.max_rows):
            rows, width = order[start:start + sampling.max_rows], 0
            ids, mask, cache = _prefill(model, prefixes, [owner[n] for n in rows], [suffixes[n] for n in rows], sampling)
            running = set(rows)
            while rows:
                assert not model.training
                config.max_new_tokens = min(sampling.chunk, sampling.max_new_tokens - width)
                out, states = _continue(model, ids, mask, cache, config if running else None, draw)
                for n, tokens in zip(rows, out[:, ids.shape[1]:].tolist()):
                    if n in running:
                        end = next((t + 1 for t, token in enumerate(tokens) if token in stops), None)
                        responses[n] += tokens[:end]  # the mask counts the first EOS; padding may be EOS too
                        if end or len(responses[n]) == sampling.max_new_tokens:
                            running.remove(n)
                for i, n in enumerate(rows):  # states[j] has read the first width + j tokens of the response
                    if n not in running and len(responses[n]) - width < len(states):
                        hidden[n] = states[len(responses[n]) - width][i]
                width += out.shape[1] - ids.shape[1]
                keep = torch.tensor([i for i, n in enumerate(rows) if hidden[n] is None], device=model.device, dtype=torch.long)
                mask = torch.cat([mask, mask.new_ones(len(rows), out.shape[1] - ids.shape[1])], dim=1)[keep]
                ids = out[keep]
                if 0 < len(keep) < len(rows):
                    cache.batch_select_indices(keep)
                rows = [n for n in rows if hidden[n] is None]
    return responses, torch.stack(hidden) if hidden else torch.zeros(0, model.get_output_embeddings().weight.shape[1], device=model.device)


def _continue(model, ids, mask, cache, config, draw=()):
    """`generate` some more tokens, or (config None) only read the last one. Returns ids (N, T + new) and the hidden states (N, D) of
    the last position, a forward pass each: the first has read ids, the others one new token more each."""
    if config is None:
        out = model.base_model(input_ids=ids[:, -1:], attention_mask=mask, position_ids=_positions(mask)[:, -1:], use_cache=True,
                               **_named(model, cache))
        return ids, [out.last_hidden_state[:, -1]]
    states = []
    hook = model.base_model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state[:, -1].clone()))
    try:
        # synced_gpus: processes that share a model would else wait for one another at every token, and not all have as many
        return model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=draw, synced_gpus=False, **_named(model, cache)), states
    finally:
        hook.remove()


def _named(model, cache):
    """The cache as an argument, under the name that this version of transformers has for it."""
    return {"cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values": cache}


def _prefill(model, prefixes, owner, suffixes, sampling):
    """Ids and mask (N, P + S) of the rows' prompts, holes masked, and their cache: all but the last token where prompts are shared."""
    lists = sorted(set(owner))
    prefix_ids, prefix_mask = _pad([prefixes[i] for i in lists], model.device, left=True)
    suffix_ids, suffix_mask = _pad(suffixes, model.device, left=True)
    local = [lists.index(o) for o in owner]
    which = torch.tensor(local, device=model.device)
    ids, mask = torch.cat([prefix_ids[which], suffix_ids], dim=1), torch.cat([prefix_mask[which], suffix_mask], dim=1)
    if not sampling.share_prefix:
        return ids, mask, DynamicCache()
    leaves = SharedPrefix(model, [prefixes[i] for i in lists]).leaves
    levels = [_Level(leaves, prefix_mask, local, len({len(prefixes[i]) for i in lists}) > 1)]
    if suffix_ids.shape[1] > 1:
        (_, (pairs, branch_mask, _)), branch = _branch(model, [(leaves, prefix_mask, which)], local, suffixes)
        levels.append(_Level(pairs, branch_mask, branch, len(set(map(len, suffixes))) > 1))
    return ids, mask, _Responses(model, levels, sampling.max_new_tokens + 1)


class _Level:
    """Keys and values that rows share: {layer: (M, h, T, d) twice}, mask (M, T), which may have gaps, and which of the M each row has."""

    def __init__(self, pairs, mask, rows, gaps):
        self.pairs, self.gaps, self.device = pairs, (mask == 0)[:, None, None, None] if gaps else None, mask.device  # gaps (M, 1, 1, 1, T)
        self.size = len(mask)
        self.place(rows)

    def place(self, rows):
        """Lay N rows out in a grid (M, R), those that share keys side by side; where fewer share, row 0 fills the gap."""
        self.rows, sharing = rows, [[] for _ in range(self.size)]
        column = []
        for n, m in enumerate(rows):
            column.append(len(sharing[m]))
            sharing[m].append(n)
        width = max(map(len, sharing))
        self.grid = torch.tensor([s + [0] * (width - len(s)) for s in sharing], device=self.device)
        self.cell = torch.tensor([m * width + c for m, c in zip(rows, column)], device=self.device)  # row -> its place in the flat grid

    def spread(self, x):
        """(N, h, g, …) -> (M, h, R, g, …)"""
        return x[self.grid].transpose(1, 2)

    def collect(self, x):
        """(M, h, R, g, …) -> (N, h, g, …)"""
        return x.transpose(1, 2).flatten(0, 1)[self.cell]


class _Shared:
    """The keys and values that one new token of each row attends to: those of the levels, and the rows' own (N, h, t, d)."""

    def __init__(self, levels, layer, keys, values):
        self.levels, self.layer, self.keys, self.values = levels, layer, keys, values

    def attend(self, query, scaling):
        """query (N, H, 1, d) -> (N, 1, H, d): one softmax over all levels, each level's keys and values read once."""
        N, H, _, d = query.shape
        q = (query * (d**-0.5 if scaling is None else scaling)).view(N, self.keys.shape[1], -1, d)  # (N, h, g, d)
        scores = []
        for level in self.levels:
            keys = level.pairs[self.layer][0]
            wide = level.spread(q)  # (M, h, R, g, d)
            found = (wide.flatten(2, 3) @ keys.transpose(2, 3)).view(*wide.shape[:4], -1)  # (M, h, R, g, T)
            scores.append(level.collect(found if level.gaps is None else found.masked_fill(level.gaps, -torch.inf)))
        scores.append(q @ self.keys.transpose(2, 3))  # (N, h, g, t)
        weights = torch.cat(scores, dim=-1).float().softmax(-1).to(q.dtype).split([s.shape[-1] for s in scores], dim=-1)
        out = weights[-1] @ self.values
        for level, share in zip(self.levels, weights):
            wide = level.spread(share)
            out = out + level.collect((wide.flatten(2, 3) @ level.pairs[self.layer][1]).view(*wide.shape[:4], d))
        return out.view(N, 1, H, d)


class _Response(DynamicLayer):
    """One layer's cache while sampling: what rows share stays shared, and there is room for the whole response: a token costs its own
    write, not a copy of all before it."""

    is_croppable = False

    def __init__(self, levels, layer, room, whole):
        """whole: give plain keys, every row its own, to a model whose attention is not `shared_attention`."""
        super().__init__()
        keys = levels[0].pairs[layer][0]
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self.levels, self.layer, self.whole, self.length = levels, layer, whole, 0
        self.past = sum(level.pairs[layer][0].shape[2] for level in levels)
        self.buffers = [keys.new_empty(len(levels[0].rows), keys.shape[1], room, keys.shape[3]) for _ in range(2)]

    def get_seq_length(self):
        return self.past + self.length

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start:self.length] = new
        own = [b[:, :, :self.length] for b in self.buffers]
        if self.whole:
            return tuple(torch.cat([*(level.pairs[self.layer][n][torch.tensor(level.rows, device=own[n].device)]
                                     for level in self.levels), own[n]], dim=2) for n in range(2))
        return (_Shared(self.levels, self.layer, *own),) * 2

    def batch_select_indices(self, indices):
        self.buffers = [b.index_select(0, indices) for b in self.buffers]


class _Responses(Cache):
    """The cache of N rows while sampling; levels: [`_Level`]; room: tokens to come."""

    def __init__(self, model, levels, room):
        self.levels, whole = levels, model.config._attn_implementation != "shared"
        super().__init__(layers=[_Response(levels, layer, room, whole) for layer in sorted(levels[0].pairs)])

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        for level in self.levels:
            level.place([level.rows[n] for n in indices.tolist()])


@contextlib.contextmanager
def _own_defaults(model, stops, sampling):
    """The sampling distribution is softmax(logits / temperature) and nothing else, whatever the model ships with; in eval mode (trap 2:
    generate in train mode with gradient checkpointing gives garbage with only a warning).

    `generate` fills fields that a config leaves unset from model.generation_config, so that one is put aside meanwhile.
    """
    config = GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], use_cache=True, do_sample=False)
    published, model.generation_config = model.generation_config, GenerationConfig()
    was_training = model.training
    model.eval()
    try:
        yield config, [] if sampling.greedy else [_Draw(sampling.temperature)]
    finally:  # also when memory runs out, and the caller tries again
        model.generation_config = published
        model.train(was_training)


class _Draw(LogitsProcessor):
    """Leaves nothing but a token drawn from softmax(logits / temperature), for `generate` to take.

    One random number a row is enough; the multinomial of `generate`'s own sampling takes one for each token of the vocabulary, on
    a CPU a fifth of the whole rollout.
    """

    def __init__(self, temperature):
        self.temperature = temperature

    def __call__(self, input_ids, scores):
        tokens = []
        for part in scores.split(64):  # (≤ 64, V): bounds what double precision takes
            cumulative = (part / self.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
            u = torch.rand(len(part), 1, dtype=torch.float64, device=part.device) * cumulative[:, -1:]
            tokens.append(torch.searchsorted(cumulative, u, right=True))  # the first whose cumulative probability is above u
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.cat(tokens), 0.0)


def _pad(lists, device, left=False):
    """Ids (N, T) and mask (N, T) of lists of unequal length."""
    width = max(map(len, lists))
    ids, mask = torch.zeros(2, len(lists), width, dtype=torch.long)
    for row, (x, m) in zip(lists, zip(ids, mask)):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        x[where], m[where] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


# --- scoring, with gradients ------------------------------------------------------------------------------------------


class _Levels(Cache):
    """Gives each row the keys and values of those before it, level by level, and keeps the row's own in `pairs`.

    It only reads: a checkpointed layer that is run again finds the same.
    """

    def __init__(self, levels):
        super().__init__(layers=[])
        self.levels, self.pairs, self.length = levels, {}, sum(mask.shape[1] for _, mask, _ in levels)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.pairs.setdefault(layer_idx, (keys, values))
        past = [[_rows(x, rows) for x in pairs[layer_idx]] for pairs, _, rows in self.levels]  # (M, h, T, d) -> (N, h, T, d)
        return tuple(torch.cat(parts, dim=2) for parts in zip(*past, (keys, values))) if past else (keys, values)

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_query_offset(self, layer_idx=0):
        return self.length

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.length + query_length, 0


def _rows(x, rows):
    return x.expand(len(rows), *x.shape[1:]) if len(x) == 1 else x.index_select(0, rows)  # the same, without a copy


def _forward(model, ids, mask, levels):
    """The model on rows of ids (N, T) that each follow a row of every level. Returns hidden (N, T, D) and the rows' own keys and
    values {layer: (k, v)}. A level: (keys and values {layer: (M, h, T', d)}, mask (M, T'), the row for each of our N)."""
    whole = torch.cat([*(m.index_select(0, rows) for _, m, rows in levels), mask], dim=1)
    cache = _Levels(levels)
    out = model.base_model(input_ids=ids, attention_mask=whole, position_ids=_positions(whole)[:, cache.length:], use_cache=False,
                           **_named(model, cache))
    return out.last_hidden_state, cache.pairs


def _branch(model, levels, owner, suffixes):
    """One more level: all but the last token of the rows' suffixes, each different one once. owner: each row's prefix.
    Returns the levels, and which of the suffixes each row has."""
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys((o, tuple(s)) for o, s in zip(owner, suffixes)))}
    ids, mask = _pad([s[:-1] for _, s in prompts], model.device, left=True)
    pairs, prefix_mask, _ = levels[0]
    _, own = _forward(model, ids, mask, [(pairs, prefix_mask, torch.tensor([o for o, _ in prompts], device=model.device))])
    rows = [prompts[o, tuple(s)] for o, s in zip(owner, suffixes)]
    return [*levels, (own, mask, torch.tensor(rows, device=model.device))], rows


class SharedPrefix:
    """The keys and values of L prefixes, computed once and read by any number of rows.

    Under grad the rows see detached leaves, so each micro-batch of rows can run its own backward and be freed; call
    `backward()` once at the end. With share=False nothing is computed here and rows carry their prefix themselves.
    """

    def __init__(self, model, prefixes, share=True, recompute=False):
        """recompute: keep no activations of the prefixes; `backward()` runs them once more."""
        self.model, self.prefixes, self.share, self.recompute = model, prefixes, share, recompute
        if not share:
            return
        self.ids, self.mask = _pad(prefixes, model.device, left=True)
        with contextlib.nullcontext() if not recompute else torch.no_grad():
            _, self.pairs = _forward(model, self.ids, self.mask, [])
        needed = torch.is_grad_enabled() and recompute
        self.leaves = {layer: tuple(x.detach().requires_grad_(x.requires_grad or needed) for x in kv) for layer, kv in self.pairs.items()}

    def backward(self):
        """Send the gradients that the rows left on the keys and values through the prefixes."""
        if not self.share:
            return
        if self.recompute:
            _, self.pairs = _forward(self.model, self.ids, self.mask, [])
        pairs = [(x, leaf.grad) for layer, kv in self.pairs.items() for x, leaf in zip(kv, self.leaves[layer])
                 if x.requires_grad and leaf.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        self.pairs = None


def _shares_suffixes(owner, suffixes):
    """Whether rows have a prompt in common, so that a pass over the different suffixes saves work."""
    return max(map(len, suffixes)) > 1 and min(map(len, suffixes)) > 0 and len({(o, tuple(s)) for o, s in zip(owner, suffixes)}) < len(owner)


def row_logprobs(prefix, owner, suffixes, responses, temperature=1.0):
    """Log-probabilities of the responses, and the hidden state at each row's last token. Differentiable.

    prefix: SharedPrefix; row n is prefix owner[n] + suffixes[n] + responses[n] (lists of ids).
    Returns logprobs (N, T) with 0 beyond a response's end, mask (N, T), hidden (N, D); T = the longest response.
    """
    model, device = prefix.model, prefix.model.device
    levels, heads = [], [s if prefix.share else prefix.prefixes[o] + s for o, s in zip(owner, suffixes)]
    if prefix.share:
        levels = [(prefix.leaves, prefix.mask, torch.tensor(owner, device=device))]
        if _shares_suffixes(owner, suffixes):
            (levels, _), heads = _branch(model, levels, owner, suffixes), [s[-1:] for s in suffixes]
    # Padding is at the right, where no real token can see it, so the mask need not tell of it.
    ids, _ = _pad([h + r for h, r in zip(heads, responses)], device)
    hidden, _ = _forward(model, ids, torch.ones_like(ids), levels)  # (N, S, D)

    starts = [len(h) for h in heads]
    mask = _pad(responses, device)[1].bool()
    last = torch.tensor([a + len(r) - 1 for a, r in zip(starts, responses)], device=device)
    # a token each, by the lists alone (asking the mask would wait for the GPU); the position before a token predicts it
    tokens = [(n, t, a + t - 1, token) for n, (a, r) in enumerate(zip(starts, responses)) for t, token in enumerate(r)]
    row, column, predicts, targets = torch.tensor(tokens, dtype=torch.long, device=device).view(-1, 4).unbind(1)
    flat = _token_logprobs(model.get_output_embeddings(), hidden[row, predicts], targets, temperature)
    logprobs = flat.new_zeros(mask.shape).index_put((row, column), flat)
    return logprobs, mask, hidden[torch.arange(len(owner), device=device), last]


def _token_logprobs(output_layer, hidden, targets, temperature):
    """log softmax(W h / temperature)[target] in float32, (M, D), (M,) -> (M,), a bounded number of logits at a time."""
    def piece(h, t):
        logits = output_layer(h).float()
        return -torch.nn.functional.cross_entropy(logits if temperature == 1 else logits / temperature, t, reduction="none")

    size = max(1, CHUNK_ELEMENTS // output_layer.weight.shape[0])
    if len(targets) <= size:
        return piece(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    if torch.is_grad_enabled():  # recompute a chunk's logits in its backward instead of keeping them all
        return torch.cat([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces])
    return torch.cat([piece(h, t) for h, t in pieces])


def micro_batches(model, prefixes, owner, suffixes, responses, micro_batch, share=True, rows=None):
    """Yield (SharedPrefix, owner within it, row numbers) such that every row of `rows` (None: all) comes once.

    As many lists as have together at most `micro_batch` rows share one pass over their prefixes, at least one list. Rows are
    ordered and cut into micro-batches. Under grad, run backward on each before taking the next: when a pass is through, its
    collected gradients are sent through the prefixes.
    """
    by_list = {}
    for n in range(len(owner)) if rows is None else rows:
        by_list.setdefault(owner[n], []).append(n)
    groups, size = [], micro_batch
    for index, members in by_list.items():
        if size + len(members) > micro_batch:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += len(members)
    for group in groups:
        # Where the rows are much the most work, running the prefixes twice is cheaper than room for their activations meanwhile.
        tokens = sum(len(suffixes[n]) + len(responses[n]) for i in group for n in by_list[i])
        recompute = torch.is_grad_enabled() and RECOMPUTE_BELOW * tokens > sum(len(prefixes[i]) for i in group)
        prefix = SharedPrefix(model, [prefixes[i] for i in group], share, recompute)
        members = [(group.index(owner[n]), suffixes[n], responses[n], n) for i in group for n in by_list[i]]
        members = _cheapest_order(members, micro_batch, share)
        for start in range(0, len(members), micro_batch):
            part = members[start:start + micro_batch]
            yield prefix, [o for o, _, _, _ in part], [n for _, _, _, n in part]
        if torch.is_grad_enabled():
            prefix.backward()


def _cheapest_order(members, micro_batch, share):
    """Rows (owner, suffix, response, number) by their length, which pads little, or with those of one prompt together, which then share
    the pass over it: whichever leaves fewer tokens to compute. Both depend on the rows' content alone."""
    longest = {}
    for o, s, r, _ in members:
        longest[o, tuple(s)] = max(longest.get((o, tuple(s)), 0), len(r))
    by_length = sorted(members, key=lambda m: (len(m[1]) + len(m[2]), *m[:3]))
    by_prompt = sorted(members, key=lambda m: (longest[m[0], tuple(m[1])], len(m[1]), *m[:3]))

    def tokens(order):
        total = 0
        for start in range(0, len(order), micro_batch):
            owner, suffixes, responses, _ = zip(*order[start:start + micro_batch])
            if share and _shares_suffixes(owner, suffixes):
                total += len({(o, tuple(s)) for o, s in zip(owner, suffixes)}) * (max(map(len, suffixes)) - 1)
                total += len(owner) * (max(map(len, responses)) + 1)
            else:
                total += len(owner) * max(len(s) + len(r) for s, r in zip(suffixes, responses))
        return total

    return min(by_length, by_prompt, key=tokens)


@torch.no_grad()
def all_logprobs(model, prefixes, owner, suffixes, responses, temperature=1.0, micro_batch=32, share=True):
    """row_logprobs of any number of rows, without gradients: logprobs (N, T), mask (N, T), hidden (N, D), in row order."""
    logprobs = torch.zeros(len(owner), max(map(len, responses), default=0), device=model.device)
    mask = torch.zeros_like(logprobs, dtype=torch.bool)
    hidden = None if owner else logprobs.new_zeros(0, model.get_output_embeddings().weight.shape[1])
    for prefix, local, part in micro_batches(model, prefixes, owner, suffixes, responses, micro_batch, share):
        lp, m, h = row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part], temperature)
        if hidden is None:
            hidden = h.new_zeros(len(owner), h.shape[-1])
        logprobs[part, :lp.shape[1]], mask[part, :m.shape[1]], hidden[part] = lp, m, h
    return logprobs, mask, hidden


def token_logprobs(model, prefix_ids, suffix_ids, response_ids, temperature=1.0, share_prefix=True):
    """The same for one list: prefix_ids, N suffix_ids, N response_ids -> logprobs (N, T), mask (N, T), hidden (N, D).

    Under grad, gradients reach the model through prefix and rows alike.
    """
    prefix = SharedPrefix(model, [prefix_ids], share_prefix)
    if share_prefix:
        prefix.leaves = prefix.pairs  # no micro-batches here: let autograd run straight through
    return row_logprobs(prefix, [0] * len(suffix_ids), suffix_ids, response_ids, temperature)


# --- losses on tokens --------------------------------------------------------------------------------------------------


def clipped_loss(logprobs, old_logprobs, advantages, clip=0.2):
    """PPO's clipped surrogate, a token each, to be minimised. All of one shape, or broadcastable; not reduced."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def k3_kl(logprobs, ref_logprobs):
    """Schulman's k3 estimate of KL(policy || reference), a token each; not reduced."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1
