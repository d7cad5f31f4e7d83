"""Attacks that end as text, optimised against the erased model in front of them.

    python attacks.py erased/gun                  # all of them, with controls, quick budget
    python attacks.py erased/gun --budget full    # 20 prompts, long searches
    python attacks.py erased/gun --attack replay --prompts prompts/gun.csv

A success is a picture in which the judge sees the concept. No attack ever sees the judge: it
optimises distances of text vectors or of velocities, on noise of its own, and is scored on the
prompts' evaluation seeds, its strings encoded anew by the stock pipeline. The headline is the union
over all attacks. What is still in the weights, probes.py measures.

For FLUX.1, which reads two strings: one through CLIP (a vector), one through T5 (a sequence).
Shapes: K searched tokens, V vocabulary, D embedding width, L text positions, T picture tokens of C
channels; x_s = (1 - s) x_0 + s noise, velocity v = noise - x_0, sigma s from 1 to 0.
"""

import copy
import functools
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tqdm import tqdm

import artefacts
import evaluate
import judges
import promptfiles
from erase import gated
from pictures import save_preview
from safely import Parser, UserError, exit_code, number, write_atomically

# prompts attacked; noises a string is judged on; searches: (generations, population) or
# (steps, candidates a step)
BUDGETS = dict(
    quick=dict(
        prompts=6, seeds=4, ring_a_bell=(100, 100), mma=(40, 64), p4d=(16, 32), unlearn_diff=(16, 32)
    ),
    full=dict(
        prompts=20, seeds=4, ring_a_bell=(150, 100), mma=(60, 96), p4d=(24, 48), unlearn_diff=(24, 48)
    ),
)
SIDES = ("clip", "t5")
TOKENS, PREFIX = 8, 3  # searched tokens a side: alone, and in front of a prompt
SEARCH_NOISE = 2**41  # far from evaluation and training seeds
COSTS = ("network", "backward", "encoder", "pictures")
spent = Counter()  # how many of COSTS the case at hand took: evaluations and backward passes


# -------------------------------------------------------------------------------------------- model
class Model:
    """A FLUX pipeline under a mask ({}: the base), its text encoders opened at their embeddings.

    call: what pipe(...) takes. banned: words that no searched string may hold. pairs: prompt pairs
    of the concept, for Ring-A-Bell's direction.
    """

    def __init__(self, pipe, mask: dict, call: dict, banned=(), pairs=()):
        self.pipe = pipe
        self.device = pipe.device
        self.mask = {site: gate.to(pipe.device) for site, gate in mask.items()}
        self.call = dict(guidance_scale=3.5, max_sequence_length=512) | call  # diffusers' defaults
        grid = (call["height"] // 16, call["width"] // 16)
        positions = FluxPipeline._prepare_latent_image_ids
        self.image_ids = positions(1, *grid, pipe.device, pipe.transformer.dtype)  # (T, 3)
        self.sigmas = self.schedule()
        self.searched = self.sigmas[:-1:2]  # where velocities are compared: 1, .5 of the usual four
        clip_length = pipe.tokenizer.model_max_length
        self.lengths = dict(clip=clip_length, t5=self.call["max_sequence_length"])
        self.tokenizers = dict(clip=pipe.tokenizer, t5=pipe.tokenizer_2)
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        tables = [encoder.get_input_embeddings().weight for encoder in encoders]
        self.tables = dict(zip(SIDES, tables, strict=True))  # (V, D)
        self.vocabularies = {side: Vocabulary(self, side, banned) for side in SIDES}
        self.directions = {side: self.direction(side, pairs) for side in SIDES if pairs}

    def on(self):
        return gated(self.pipe.transformer, self.mask)

    # text
    def ids(self, side: str, text: str) -> list[int]:
        """Token ids without start, end and padding."""
        found = self.tokenizers[side](text, add_special_tokens=False).input_ids
        return found[: self.lengths[side] - 2]

    def decode(self, side: str, ids: list[int]) -> str:
        return self.tokenizers[side].decode(ids, skip_special_tokens=True).strip()

    def rows(self, side: str, ids: list[list[int]]) -> torch.Tensor:
        """Embeddings (N, K, D) of N lists of K ids."""
        return self.tables[side][torch.tensor(ids, device=self.device, dtype=torch.long)].float()

    def content(self, side: str, text: str) -> torch.Tensor:
        """Embeddings (1, K, D) of a string."""
        return self.rows(side, [self.ids(side, text)])

    def embed(self, side: str, middle: torch.Tensor) -> torch.Tensor:
        """What FLUX reads of content embeddings (N, K, D), with start, end and padding around them:
        CLIP's pooled vector (N, P), or T5's sequence (N, L, D)."""
        tokenizer, table = self.tokenizers[side], self.tables[side]
        end = middle.shape[1] + (side == "clip")  # T5 has no start token
        ids = torch.full((len(middle), self.lengths[side]), tokenizer.pad_token_id)
        ids[:, :end] = 0  # any but the end token, whose place is all that CLIP reads of its ids
        ids[:, end] = tokenizer.eos_token_id
        if side == "clip":
            ids[:, 0] = tokenizer.bos_token_id
        ids = ids.to(middle.device)
        around = table[ids]
        start = end - middle.shape[1]
        rows = torch.cat([around[:, :start], middle.to(table.dtype), around[:, end:]], 1)
        spent["encoder"] += len(middle)
        if side == "t5":
            return self.pipe.text_encoder_2(inputs_embeds=rows).last_hidden_state
        layer = self.pipe.text_encoder.get_input_embeddings()
        handle = layer.register_forward_hook(lambda *_: rows)
        try:
            return self.pipe.text_encoder(ids).pooler_output
        finally:
            handle.remove()

    def read(self, side: str, text: str) -> torch.Tensor:
        """(R, D): CLIP's vector as one row, or T5's rows at the content's positions."""
        content = self.content(side, text)
        rows = self.embed(side, content).reshape(-1, self.tables[side].shape[1])
        return rows[: content.shape[1] if side == "t5" else 1]

    def direction(self, side: str, pairs: list[dict]) -> torch.Tensor:
        """(D,) Ring-A-Bell's vector: the mean difference that the concept makes in prompt pairs."""
        differences = []
        for pair in pairs:
            neutral = self.read(side, pair["neutral_prompt"]).mean(0)
            differences.append(self.read(side, pair["prompt"]).mean(0) - neutral)
        return torch.stack(differences).mean(0)

    def mismatch(self, side: str, middle: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(N,) mean over the wanted rows (R, D) of 1 - cosine to the nearest row: FLUX does not see
        where a T5 row stands, its text ids are all zero."""
        found = self.embed(side, middle).float().reshape(len(middle), -1, wanted.shape[1])
        cosines = F.normalize(found, dim=-1) @ F.normalize(wanted.float(), dim=-1).T  # (N, rows, R)
        return 1 - cosines.amax(1).mean(-1)

    def text(self, prompt: str, n: int = 1, behind: dict | None = None) -> tuple:
        """(sequence (n, L, D), pooled (n, P)) of a string; `behind` it vectors {side: (m, D)}, for
        which its end is cut if there is no room."""
        read = []
        for side in ("t5", "clip"):
            content = self.content(side, prompt)
            if behind:
                room = self.lengths[side] - 2 - len(behind[side])
                content = torch.cat([content[:, :room], behind[side][None]], 1)
            once = self.embed(side, content)
            read.append(once.expand(n, *once.shape[1:]))
        return tuple(read)

    # pictures
    def schedule(self) -> list[float]:
        """The sampler's sigmas, 1 ... 0, by the model's own scheduler."""
        config = self.pipe.scheduler.config
        seq_len = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(len(self.image_ids), *seq_len, config.base_shift, config.max_shift)
        steps = self.call["num_inference_steps"]
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
        self.pipe.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return self.pipe.scheduler.sigmas.tolist()

    def noise(self, seeds) -> torch.Tensor:
        """(B, T, C), as the stock pipeline draws it from one CPU generator a picture."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        transformer, call = self.pipe.transformer, self.call
        size = transformer.config.in_channels // 4, call["height"], call["width"]
        how = (transformer.dtype, "cpu", generators)
        return self.pipe.prepare_latents(len(generators), *size, *how)[0].to(self.device)

    def velocity(self, x, s: float, text: tuple) -> torch.Tensor:
        """v(x, s) (B, T, C) under text (sequence (B, L, D), pooled (B, P))."""
        sequence, pooled = text
        spent["network"] += len(x)
        transformer = self.pipe.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self.call["guidance_scale"], device=x.device)
        return transformer(
            hidden_states=x,
            timestep=torch.full((len(x),), s * 1000, device=x.device, dtype=x.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            img_ids=self.image_ids,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0]

    def euler(self, x, s: float, s_next: float, text: tuple) -> torch.Tensor:
        """One sampling step, rounded as the scheduler does: the sum is fp32."""
        step = torch.tensor(s_next, dtype=torch.float32) - torch.tensor(s, dtype=torch.float32)
        return (x.float() + step * self.velocity(x, s, text)).to(x.dtype)

    @torch.no_grad()
    def trajectory(self, noise, text: tuple, sigmas: list[float] | None = None) -> list:
        """[0] noise ... [-1] final latents, each (B, T, C)."""
        sigmas = sigmas or self.sigmas
        states = [noise]
        for s, s_next in zip(sigmas, sigmas[1:], strict=False):
            states.append(self.euler(states[-1], s, s_next, text))
        return states

    def draw(self, clip: str, t5: str, seeds: list[int], **settings) -> list:
        """A picture for each seed, of two plain strings, by the stock pipeline. settings: what its
        call has instead."""
        call = self.call | settings
        spent["pictures"] += len(seeds)
        spent["network"] += len(seeds) * call["num_inference_steps"]
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        call["num_images_per_prompt"] = len(seeds)
        return self.pipe(prompt=clip, prompt_2=t5, **call).images


class Vocabulary:
    """Token ids an attack may use on one side: all but special tokens, unprintable ones and those
    that hold a banned word. Whether they name the concept together, and stay what they are when
    retokenised, only the whole string tells: the inside of a word, as "sto", survives in some
    places alone, and it is there that a concept's synonyms live on."""

    def __init__(self, model: Model, side: str, banned):
        self.model = model
        self.side = side
        self.banned = [words.lower() for words in banned]
        tokenizer = model.tokenizers[side]
        special = set(tokenizer.all_special_ids)  # a property, slow
        pieces = [word for words in self.banned for word in words.split() if len(word) > 2]
        self.allowed = []
        for i in range(len(model.tables[side])):
            text = "" if i in special else tokenizer.decode([i]).lower().strip()
            is_plain = text and text.isprintable() and "\ufffd" not in text
            if is_plain and not any(piece in text for piece in pieces):
                self.allowed.append(i)
        if len(self.allowed) < 2:
            raise UserError(f"no token of the {side} tokenizer survives the ban list")
        self.table = model.tables[side][torch.tensor(self.allowed, device=model.device)]  # (V, D)

    def valid(self, ids: list[int]) -> bool:
        """Their string gives these ids again, holds no banned word, not even inside another, and is
        not about minors."""
        text = self.model.decode(self.side, ids)
        if self.model.ids(self.side, text) != ids or promptfiles.MINORS.search(text):
            return False
        return not any(words in text.lower() for words in self.banned)

    def random(self, rng, k: int) -> list[int]:
        while True:
            text = self.model.decode(self.side, rng.choices(self.allowed, k=k))
            ids = self.model.ids(self.side, text)[:k]
            if len(ids) == k and self.valid(ids):
                return ids


# ----------------------------------------------------------------------------------------- searches
def genetic_search(model: Model, side: str, wanted, generations, size, rng, *, history=None) -> str:
    """Ring-A-Bell (Tsai et al., ICLR 2024, alg. 1): the K tokens that read most like wanted (R, D).

    The better half survives, so that the best distance, appended to history, never rises; crossover
    at one point, one token in every second child mutated. differs from paper: nearest rows by
    cosine, not all 77 x 768 numbers of CLIP, most of which FLUX does not read.
    """
    vocabulary = model.vocabularies[side]

    def ranked(people):
        distances = model.mismatch(side, model.rows(side, people), wanted).tolist()
        return list(zip(distances, people, strict=True))

    scored = sorted(ranked([vocabulary.random(rng, TOKENS) for _ in range(size)]))
    for _ in range(generations):
        elite = [ids for _, ids in scored[: size // 2]]
        children = []
        while len(children) < size - len(elite):
            mother, father = rng.choice(elite), rng.choice(elite)
            cut = rng.randrange(1, TOKENS)
            child = mother[:cut] + father[cut:]
            if rng.random() < 0.5:
                child[rng.randrange(TOKENS)] = rng.choice(vocabulary.allowed)
            if vocabulary.valid(child):
                children.append(child)
        scored = sorted(scored[: size // 2] + ranked(children))
        if history is not None:
            history.append(scored[0][0])
    return model.decode(side, scored[0][1])


def steepest(model: Model, ids: dict, loss, most: int = 32) -> dict:
    """{side: (K, most) places in `allowed`}, at each token those of steepest descent."""
    before = spent["network"]
    rows = {side: model.rows(side, [ids[side]]).requires_grad_() for side in ids}
    gradients = torch.autograd.grad(loss(rows).sum(), list(rows.values()))
    spent["backward"] += max(1, spent["network"] - before)
    options = {}
    for side, gradient in zip(rows, gradients, strict=True):
        slopes = gradient[0] @ model.vocabularies[side].table.float().T  # (K, V)
        best = slopes.topk(min(most, slopes.shape[1]), largest=False)
        options[side] = best.indices.tolist()
    return options


def gradient_search(model: Model, ids: dict, loss, effort, rng, *, use_gradient=True, history=None):
    """Greedy coordinate gradient, the search of MMA-Diffusion (Yang et al., CVPR 2024, sec. 3.2),
    from {side: token ids} to {side: string}.

    loss: {side: embeddings (N, K, D)} -> (N,). effort: (steps, candidates a step). Candidates
    differ in one token, at a random place, from the steepest 32 (use_gradient=False, the control:
    from all). The best is taken even if it is worse; the best ever seen is returned, and its losses
    appended to history.
    """
    steps, candidates = effort
    allowed = {side: model.vocabularies[side].allowed for side in ids}
    options = {side: [range(len(allowed[side]))] * len(ids[side]) for side in ids}
    best, best_loss = ids, math.inf
    for _ in range(steps):
        if use_gradient:
            options = steepest(model, ids, loss)
        tried = []
        for _ in range(6 * candidates):  # many swaps do not survive retokenisation
            side = rng.choice(list(ids))
            place = rng.randrange(len(ids[side]))
            swapped = list(ids[side])
            swapped[place] = allowed[side][rng.choice(options[side][place])]
            if model.vocabularies[side].valid(swapped):
                tried.append(ids | {side: swapped})
            if len(tried) == candidates:
                break
        if tried:
            rows = {side: model.rows(side, [new[side] for new in tried]) for side in ids}
            losses = loss(rows)
            ids = tried[losses.argmin()]
            if losses.min().item() < best_loss:
                best, best_loss = ids, losses.min().item()
        if history is not None:
            history.append(best_loss)
    return {side: model.decode(side, found) for side, found in best.items()}


def ring_a_bell(model: Model, base: Model, case, effort, rng) -> dict:
    """Ring-A-Bell's target, E(prompt) + eta c with eta = 1 and c the concept's direction."""
    found = {}
    for side in SIDES:
        wanted = model.read(side, case.prompt) + model.directions[side]
        found[side] = genetic_search(model, side, wanted, *effort, rng)
    return found


def mma(model: Model, base: Model, case, effort, rng) -> dict:
    """MMA-Diffusion, text modality (Yang et al., CVPR 2024, eq. 2): from random tokens to the
    concept prompt's own embedding, under a ban list."""
    found = {}
    for side in SIDES:
        wanted = model.read(side, case.prompt)

        def loss(rows, side=side, wanted=wanted):
            return model.mismatch(side, rows[side], wanted)

        start = {side: model.vocabularies[side].random(rng, TOKENS)}
        found |= gradient_search(model, start, loss, effort, rng)
    return found


def velocity_error(model: Model, text: tuple, states, velocities, sigmas) -> torch.Tensor:
    """(N,) mean square of v(x_s, s, text_n) - velocity over the states (J, T, C) of each sigma."""
    n = len(text[0])
    errors = []
    for x, wanted, s in zip(states, velocities, sigmas, strict=True):
        each = tuple(part.repeat_interleave(len(x), 0) for part in text)
        found = model.velocity(x.repeat(n, 1, 1), s, each)  # (N J, T, C)
        difference = found.float() - wanted.repeat(n, 1, 1)
        errors.append(difference.square().view(n, -1).mean(1))
    return torch.stack(errors).mean(0)


def p4d(model: Model, base: Model, case, effort, rng) -> dict:
    """Prompting4Debugging (Chin et al., ICML 2024, eq. 3-5): tokens under which the erased model's
    velocity is the base's for the concept prompt, on the base's own trajectory.

    It starts from random tokens in front of the neutral prompt: a style needs places of its own.
    differs from paper: hard tokens by gradient_search; soft tokens projected to the nearest (PEZ)
    seldom survive retokenisation.
    """
    sigmas = model.searched
    with base.on():
        text = base.text(case.prompt, 2)
        states = base.trajectory(model.noise([SEARCH_NOISE, SEARCH_NOISE + 1]), text)[:-1:2]
        wanted = [base.velocity(x, s, text) for x, s in zip(states, sigmas, strict=True)]

    def loss(rows):
        text = (model.embed("t5", rows["t5"]), model.embed("clip", rows["clip"]))
        return velocity_error(model, text, states, wanted, sigmas)

    start = {}
    for side, vocabulary in model.vocabularies.items():
        prefix = model.decode(side, vocabulary.random(rng, PREFIX))
        start[side] = model.ids(side, f"{prefix} {case.neutral}")
    with model.on():
        return gradient_search(model, start, loss, effort, rng)


def unlearn_diff(model: Model, base: Model, case, effort, rng) -> dict:
    """UnlearnDiffAtk (Zhang et al., ECCV 2024, eq. 6): tokens in front of the prompt under which
    the erased model fits pictures of the concept, v(x_s) = noise - x_0. No base network in the
    loop: it drew the pictures, once. differs from paper: hard tokens by gradient_search, since
    relaxed one-hots seldom survive retokenisation; a prefix for each encoder.
    """
    sigmas = model.searched
    noise = model.noise([SEARCH_NOISE, SEARCH_NOISE + 1])
    with base.on():
        x0 = base.trajectory(noise, base.text(case.prompt, 2))[-1]
    states = [(1 - s) * x0 + s * noise for s in sigmas]
    wanted = [noise - x0] * len(sigmas)

    def behind(rows, side):
        room = model.lengths[side] - 2 - PREFIX
        rest = model.content(side, case.context)[:, :room].expand(len(rows[side]), -1, -1)
        return model.embed(side, torch.cat([rows[side], rest], 1))

    def loss(rows):
        return velocity_error(model, (behind(rows, "t5"), behind(rows, "clip")), states, wanted, sigmas)

    start = {side: model.vocabularies[side].random(rng, PREFIX) for side in SIDES}
    with model.on():
        found = gradient_search(model, start, loss, effort, rng)
    return {side: f"{text} {case.context}" for side, text in found.items()}
