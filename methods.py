"""Other people's erasure methods for FLUX.1, each in one function: what baselines.py runs.

Three kinds: closed form (lab -> nothing, the leaves filled in), trained (lab, step -> the losses of
a step, each to be differentiated before the next is asked for), and while sampling (lab, cases ->
final latents). Written from the papers, with the settings of their code where it says more; where
something is simplified, the docstring says so. All train on the prompts of the file, where a paper
may have the bare word, and at the sampler's own s, the only ones that a distilled model knows.

v is the velocity, x_s = (1 - s) x_0 + s noise; "student" is what is trained, "base" what it was.
Shapes: B prompts, L text tokens of width D, T picture tokens of C channels, N rows, W words,
I inputs and O outputs of a layer. A step's prompts and noise are functions of (seed, step).
"""

import contextlib
import copy
import difflib
import itertools
import random
import re
from typing import NamedTuple

import models  # noqa: F401  (first: it keeps transformers quiet)

# isort: split
import torch
import torch.nn.functional as F

import heal
from erase import TRAIN_NOISE, squared_error
from opened import Model
from promptfiles import bare

TEXT_LAYERS = ("context_embedder", "time_text_embed.text_embedder.linear_1")  # T5's, CLIP's


class Lab(NamedTuple):
    """What a method is given."""

    model: Model  # the base
    flags: object  # of the command line, with the method's defaults
    pairs: list  # [(prompt, neutral prompt)]
    retain: list  # [prompt]
    kinds: dict  # {concept: object, style or person}
    words: dict  # the vocabulary without the concepts, {word: {kind, question, synonyms}}
    leaves: dict  # {tensor's name in the file to be written: fp32 tensor, learnt}
    adversary: torch.Tensor  # (W,) logits of the words: eap's, learnt

    def text(self, prompts) -> tuple:
        """(sequence (B, L, D), pooled (B, P)) as the pipeline encodes them, each once."""
        length = self.model.call["max_sequence_length"]
        how = dict(prompt_2=None, max_sequence_length=length)
        return self.model.pipe.encode_prompt(prompt=list(prompts), **how)[:2]


# ------------------------------------------------------------------------------------- what is used
@contextlib.contextmanager
def student(lab: Lab, frozen: bool = False):
    """Inside it the model is as trained so far, with gradients to the leaves unless frozen."""
    transformer = lab.model.pipe.transformer
    leaves = {name: x.detach() if frozen else x for name, x in lab.leaves.items()}
    if lab.flags.rank:
        lora = {}
        for name in leaves:
            layer = name.removesuffix(".lora_A.weight")
            if layer != name:
                lora[layer] = leaves[name], leaves[f"{layer}.lora_B.weight"]
        with heal.adapted(transformer, lora):
            yield
        return
    before = {}
    for name, leaf in leaves.items():
        home, _, last = name.rpartition(".")
        parameters = transformer.get_submodule(home)._parameters
        before[name] = parameters, last, parameters[last]
        parameters[last] = leaf.to(parameters[last].dtype)
    try:
        yield
    finally:
        for parameters, last, parameter in before.values():
            parameters[last] = parameter


def drawn(lab: Lab, step: int, among: list, name: str = "") -> tuple:
    """(a batch of `among`, noise (B, T, C), k sampling steps short of all), of seed and step."""
    rng = random.Random(f"{lab.flags.seed} {step} {name}")
    chosen = rng.choices(among, k=lab.flags.batch_size)
    noise = lab.model.noise([TRAIN_NOISE + rng.randrange(2**20) for _ in chosen])
    return chosen, noise, rng.randrange(len(lab.model.sigmas) - 1)


def walk(lab: Lab, noise, text: tuple, k: int) -> tuple:
    """(x_s after k sampling steps, s), inside student() of the student."""
    return lab.model.trajectory(noise, text, lab.model.sigmas[: k + 1])[-1], lab.model.sigmas[k]


def kept(lab: Lab, step: int):
    """Ours, of weight --retain: on retain prompts the student's v is the base's, at x_s after k
    sampling steps. Yields the loss."""
    prompts, noise, k = drawn(lab, step, lab.retain, "retain")
    text = lab.text(prompts)
    x, s = walk(lab, noise, text, k)
    with torch.no_grad():
        target = lab.model.velocity(x, s, text)
    with student(lab):
        loss = squared_error(lab.model.velocity(x, s, text), target).mean()
    yield lab.flags.retain * loss


# ------------------------------------------------------------------------- methods in closed form
def closed_form(weight, parts, lam: float) -> torch.Tensor:
    """UCE's closed form: the W (O, I) that minimises sum w |W c - v|^2 + lam |W - weight|^2 over
    parts [(c (N, I), v (N, O), w)]."""
    gram = lam * torch.eye(weight.shape[1], dtype=torch.double, device=weight.device)
    right = lam * weight.double()
    for c, v, w in parts:
        gram += w * c.double().T @ c.double()
        right += w * v.double().T @ c.double()
    return torch.linalg.solve(gram, right.T).T.to(weight.dtype)


def edit(lab: Lab, parts_of) -> None:
    """Solves for both of the text's layers; parts_of(side) yields (rows c, rows c', w), for which
    W c is to be what W_old c' was. The bias stays, so it is in neither: the official code counts it
    twice."""
    for side, name in enumerate(TEXT_LAYERS):
        old = lab.model.pipe.transformer.get_submodule(name).weight.float()
        parts = ((c.float(), c_new.float() @ old.T, w) for c, c_new, w in parts_of(side))
        lab.leaves[f"{name}.weight"] = closed_form(old, parts, lab.flags.lam)


def uce(lab: Lab) -> None:
    """UCE (Gandikota et al., WACV 2024, arXiv 2308.14761), closed_form() as its code has it: the
    last token of the bare concept, and CLIP's vector, give what the empty prompt's give ("art" for
    a style). With --retain the vocabulary's words stay, likewise; by default there are none."""

    def rows(word, side):
        sequence, pooled = lab.text([word])
        tokens = lab.model.tokenizers["t5"](word).input_ids
        return pooled if side else sequence[:, len(tokens) - 2]  # -1, padding, if it is empty

    def parts(side):
        for concept in lab.flags.concept:
            kind = lab.kinds[concept]
            guide = "art" if kind == "style" else ""
            yield rows(bare(concept), side), rows(guide, side), 1.0
        for word in lab.words if lab.flags.retain else ():
            yield rows(word, side), rows(word, side), lab.flags.retain

    edit(lab, parts)


def aligned(ids: list, others: list) -> list:
    """For each token the places of those of the other prompt that stand for it: of the same token,
    of what replaces it, or, where nothing does, of the whole prompt."""
    places = []
    opcodes = difflib.SequenceMatcher(None, ids, others, autojunk=False).get_opcodes()
    for _, i, i_end, j, j_end in opcodes:
        for n in range(i_end - i):
            same = i_end - i == j_end - j
            places.append([j + n] if same else list(range(j, j_end)) or list(range(len(others))))
    return places


def uce_context(lab: Lab) -> None:
    """Ours: UCE's closed form on whole prompts. All tokens of concept prompts, padding too, give
    what those of the neutral prompts give; all of the retain prompts stay, of weight --retain."""
    tokenizer = lab.model.tokenizers["t5"]
    how = dict(padding="max_length", truncation=True)
    how |= dict(max_length=lab.model.call["max_sequence_length"])

    def parts(side):
        for prompt, neutral in lab.pairs:
            (c,), (c_new,) = (lab.text([text])[side] for text in (prompt, neutral))
            if not side:
                places = aligned(*(tokenizer(text, **how).input_ids for text in (prompt, neutral)))
                c_new = torch.stack([c_new[place].mean(0) for place in places])
            yield c.view(-1, c.shape[-1]), c_new.view(-1, c.shape[-1]), 1.0
        for prompt in lab.retain if lab.flags.retain else ():
            c = lab.text([prompt])[side].flatten(0, -2)
            yield c, c, lab.flags.retain

    edit(lab, parts)


# ------------------------------------------------------------------------- methods that are trained
def esd(lab: Lab, step: int):
    """ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345), its objective: at x_s after k steps
    of the student's way to the concept, its v(c) becomes the base's v(anchor) - eta (v(c) - v("")).
    The official FLUX code writes v(c) for the anchor: the same, with its eta one larger."""
    pairs, noise, k = drawn(lab, step, lab.pairs)
    prompts, neutrals = zip(*pairs, strict=True)
    text, empty = lab.text(prompts), lab.text([""] * len(prompts))
    anchor = empty if lab.flags.anchor == "empty" else lab.text(neutrals)
    with student(lab, frozen=True):
        x, s = walk(lab, noise, text, k)
    with torch.no_grad():
        push = lab.model.velocity(x, s, text) - lab.model.velocity(x, s, empty)
        target = lab.model.velocity(x, s, anchor) - lab.flags.eta * push
    with student(lab):
        yield squared_error(lab.model.velocity(x, s, text), target).mean()


def ca(lab: Lab, step: int):
    """Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516), model-based: on the base's
    pictures of the anchor (neutral) prompt with new noise at one of the sampler's s, the student's
    v(c) becomes its own v(anchor), without gradient. Its code clips gradients; here none is."""
    pairs, noise, k = drawn(lab, step, lab.pairs)
    prompts, neutrals = zip(*pairs, strict=True)
    anchor = lab.text(neutrals)
    x0, s = lab.model.trajectory(noise, anchor)[-1], lab.model.sigmas[k]
    _, new_noise, _ = drawn(lab, step, lab.pairs, "new noise")
    x = (1 - s) * x0 + s * new_noise
    with student(lab):
        with torch.no_grad():
            target = lab.model.velocity(x, s, anchor)
        yield squared_error(lab.model.velocity(x, s, lab.text(prompts)), target).mean()


def eap(lab: Lab, step: int):
    """EAP (Bui et al., NeurIPS 2024, arXiv 2410.15618): ESD, and what the student draws for
    a word stays; in turns with it, the word is chosen to change most, by a Gumbel softmax of
    temperature 2 (Adam 1e-3), the defaults of its code, whose published runs choose one word
    (hard) at 1e-2. Simplified: the words are the vocabulary's, not 100 centres of English ones;
    errors are of v, not of x_0."""
    is_adversary = step % 2 == 1
    if not is_adversary:
        yield from esd(lab, step)
    generator = torch.Generator().manual_seed(lab.flags.seed * 1_000_003 + step)
    uniform = torch.rand(len(lab.words), generator=generator).clamp(1e-6, 1 - 1e-6)
    gumbel = -(-uniform.log()).log().to(lab.adversary.device)
    share = ((lab.adversary + gumbel) / 2).softmax(0)
    share = share if is_adversary else share.detach()
    _, noise, k = drawn(lab, step, lab.pairs, "word")
    sequence, pooled = lab.text(lab.words)
    mixed = torch.tensordot(share.to(sequence), sequence, 1), share.to(pooled) @ pooled
    word = tuple(x.expand(len(noise), *x.shape) for x in mixed)
    with student(lab, frozen=True):
        x, s = walk(lab, noise, tuple(x.detach() for x in word), k)
    with torch.no_grad():
        target = lab.model.velocity(x, s, word)
    with student(lab, frozen=is_adversary):
        change = squared_error(lab.model.velocity(x, s, word), target).mean()
    yield -change if is_adversary else change


@contextlib.contextmanager
def watched(transformer, *names):
    """Gives {(double block, name): what that layer of its attention made last}."""
    made = {}

    def keep(key):
        return lambda layer, inputs, output: made.__setitem__(key, output)

    with contextlib.ExitStack() as hooks:
        for i, block in enumerate(transformer.transformer_blocks):
            for name in names:
                layer = block.attn.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(keep((i, name))))
        yield made


def concept_tokens(lab: Lab, prompts) -> torch.Tensor:
    """(B, L) 1 where T5 reads a concept's name, everywhere in a prompt without any."""
    how = dict(padding="max_length", truncation=True, return_offsets_mapping=True)
    how |= dict(max_length=lab.model.call["max_sequence_length"], return_tensors="pt")
    read = lab.model.tokenizers["t5"](list(prompts), **how)
    names = "|".join(re.escape(bare(concept)) for concept in lab.flags.concept)
    found = torch.zeros(read.input_ids.shape)
    for i, prompt in enumerate(prompts):
        for match in re.finditer(names, prompt, re.I):
            starts, ends = read.offset_mapping[i].T
            found[i] += (starts < match.end()) & (ends > match.start())
        if not found[i].any():
            found[i] = read.attention_mask[i]
    return found.clamp(max=1).to(lab.model.device)


def attention(made: dict, tokens) -> torch.Tensor:
    """The norm over picture tokens of what they give to each of these text tokens (B, L), heads'
    mean, summed over tokens and blocks. made: by watched(). Without rotary positions."""
    total = 0.0
    for i in {block for block, _ in made}:
        query, key, text_key = (made[i, f"norm_{x}"] for x in ("q", "k", "added_k"))
        keys = torch.cat([text_key, key], 1)  # (B, L + T, heads, width)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) / query.shape[-1] ** 0.5
        given = scores.softmax(-1)[..., : tokens.shape[1]].mean(1)  # (B, T, L)
        total += (given * tokens[:, None]).square().sum(1).add(1e-12).sqrt().sum(1).mean()
    return total


def eraseanything(lab: Lab, step: int):
    """EraseAnything (Gao et al., ICML 2025, arXiv 2412.20413): in turns ESD with .001 of the
    attention to the concept's tokens, and .1 flow matching on the base's pictures of retain prompts
    with .1 of a reversed InfoNCE (temperature .07): the text's keys of the concept leave the base's
    for those of neighbours. Simplified: neighbours are 8 words of its kind, not a GPT's, and keys
    stand for its attention maps; its published runs have a neutral sentence (--anchor neutral)."""
    transformer = lab.model.pipe.transformer
    if step % 2 == 0:
        prompts = [prompt for prompt, _ in drawn(lab, step, lab.pairs)[0]]
        with watched(transformer, "norm_q", "norm_k", "norm_added_k") as made:
            (loss,) = esd(lab, step)
        yield loss + 0.001 * attention(made, concept_tokens(lab, prompts))
        return
    prompts, noise, k = drawn(lab, step, lab.retain, "flow")
    _, new_noise, _ = drawn(lab, step, lab.retain, "new noise")
    x0, s = lab.model.trajectory(noise, lab.text(prompts))[-1], lab.model.sigmas[k]
    x = (1 - s) * x0 + s * new_noise
    concept = random.Random(step).choice(lab.flags.concept)
    kind = "style" if lab.kinds[concept] == "style" else "object"
    words = [word for word, about in lab.words.items() if about["kind"] == kind]
    words = random.Random(step).sample(words, min(8, len(words)))
    words = lab.text([bare(concept), *words])
    with watched(transformer, "norm_added_k") as made:
        with torch.no_grad():
            lab.model.velocity(noise[:1].expand(len(words[0]), -1, -1), 1.0, words)
            keys = torch.cat([key.mean(1).flatten(1) for key in made.values()], 1)
        with student(lab):
            flow = squared_error(lab.model.velocity(x, s, lab.text(prompts)), new_noise - x0).mean()
            lab.model.velocity(noise[:1], 1.0, tuple(part[:1] for part in words))
        key = torch.cat([key.mean(1).flatten(1) for key in made.values()], 1)
    likeness = F.cosine_similarity(key.float(), keys.float()) / 0.07
    yield 0.1 * flow + 0.1 * (likeness[0] - likeness.logsumexp(0))


def gem(lab: Lab, step: int):
    """GEM (ICML 2026, arXiv 2606.00140): at up to 10 x_s of the student's own way to the concept,
    100 relu(|v(c) - v_base(neutral)| - eta |v(c) - v_base(c)|), norms of whole pictures, the mean.
    The official 250 timesteps are 26 such ways."""
    pairs, noise, _ = drawn(lab, step, lab.pairs)
    prompts, neutrals = zip(*pairs, strict=True)
    text, anchor = lab.text(prompts), lab.text(neutrals)
    sigmas = lab.model.sigmas[:11]
    with student(lab):
        states = lab.model.trajectory(noise, text, sigmas)[:-1]
    for x, s in zip(states, sigmas, strict=False):
        with torch.no_grad():
            nearer, farther = lab.model.velocity(x, s, anchor), lab.model.velocity(x, s, text)
        with student(lab):
            v = lab.model.velocity(x, s, text)
        near, far = ((v - y).float().flatten(1).add(1e-6).norm(dim=1) for y in (nearer, farther))
        yield 100 * F.relu(near - lab.flags.eta * far).mean() / len(states)


# ------------------------------------------------------------------ methods that act while sampling
def sampled(lab: Lab, noise, velocity) -> torch.Tensor:
    """Final latents (B, T, C) by the sampler's Euler steps along velocity(x, s)."""
    x = noise
    for s, s_next in itertools.pairwise(lab.model.sigmas):
        x = (x.float() + (s_next - s) * velocity(x, s)).to(x.dtype)
    return x


def concept_text(lab: Lab) -> str:
    return ", ".join(map(bare, lab.flags.concept))


def sld(lab: Lab, cases: list) -> torch.Tensor:
    """SLD (Schramowski et al., CVPR 2023, arXiv 2211.05105), with a plain scale for its mu,
    no warm-up and no momentum: v(prompt) - eta (v(concept) - v("")). No official FLUX code."""
    texts = [lab.text(case["prompt"] for case in cases)]
    texts += [lab.text([text] * len(cases)) for text in (concept_text(lab), "")]

    def velocity(x, s):
        v, concept, empty = (lab.model.velocity(x, s, text) for text in texts)
        return v - lab.flags.eta * (concept - empty)

    return sampled(lab, lab.model.noise([case["seed"] for case in cases]), velocity)


def negative(lab: Lab, cases: list) -> torch.Tensor:
    """The concept as negative prompt (Ho and Salimans, arXiv 2207.12598, with it for the
    empty prompt): v(prompt) + eta (v(prompt) - v(concept)), diffusers' true_cfg_scale 1 + eta."""
    texts = [lab.text(case["prompt"] for case in cases)]
    texts += [lab.text([concept_text(lab)] * len(cases))]

    def velocity(x, s):
        v, concept = (lab.model.velocity(x, s, text) for text in texts)
        return v + lab.flags.eta * (v - concept)

    return sampled(lab, lab.model.noise([case["seed"] for case in cases]), velocity)


def flowedit(lab: Lab, cases: list) -> torch.Tensor:
    """FlowEdit (Kulikov et al., ICCV 2025, arXiv 2412.08629), algorithm 1, from the base's picture
    of a prompt that names the concept to its neutral prompt: 24 of every 28 steps, one noise a
    step, guidance 1.5 and 5.5 where the model has any. A prompt without a neutral one in cases.json
    stays, so a synonym is not edited."""
    seeds = [case["seed"] for case in cases]
    source = lab.text(case["prompt"] for case in cases)
    is_edited = [case["neutral"] is not None for case in cases]
    target = [case["neutral" if case["neutral"] is not None else "prompt"] for case in cases]
    target = lab.text(target)
    before = lab.model.trajectory(lab.model.noise(seeds), source)[-1].float()
    by_source, by_target = copy.copy(lab.model), copy.copy(lab.model)
    call = lab.model.call | dict(num_inference_steps=lab.flags.steps)
    by_source.call = call | dict(guidance_scale=1.5)
    by_target.call = call | dict(guidance_scale=5.5)
    sigmas = by_source.schedule()[lab.flags.steps - round(24 / 28 * lab.flags.steps) :]
    x = before
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        noise = lab.model.noise([seed + (i + 1) * 10**7 for seed in seeds]).float()
        x_source = (1 - s) * before + s * noise
        x_target = x + x_source - before
        v_source = by_source.velocity(x_source.to(lab.model.image_ids.dtype), s, source)
        v_target = by_target.velocity(x_target.to(lab.model.image_ids.dtype), s, target)
        x = x + (s_next - s) * (v_target - v_source)
    chosen = torch.tensor(is_edited, device=x.device)[:, None, None]
    return torch.where(chosen, x, before).to(lab.model.image_ids.dtype)
