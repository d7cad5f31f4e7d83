"""FLUX.1 opened for attacks: its two text encoders at their embeddings, its velocity, its noise.
openedqwen.py has the families that read one string.

A side is an encoder by its name. FLUX.1 reads two strings: one through CLIP (a vector), one through
T5 (a sequence). A shot is {side: string}, and what the sampler's call is to have instead.
Shapes: K searched tokens, V vocabulary, D embedding width, L text positions, T picture tokens of C
channels; x_s = (1 - s) x_0 + s noise, velocity v = noise - x_0, sigma s from 1 to 0.
"""

import copy
import math
from collections import Counter

import models  # noqa: F401  (first: it keeps transformers quiet)

# isort: split
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from erase import gated
from pictures import sample
from promptfiles import MINORS
from safely import UserError
from sites import fold

ROOM = 16  # tokens that a search or a probe may take
COSTS = ("network", "backward", "encoder", "pictures")
spent = Counter()  # how many of COSTS: evaluations, backward passes, texts encoded, pictures drawn


class Model:
    """A FLUX pipeline under a mask ({}: the base), its text encoders opened at their embeddings.

    call: what pipe(...) takes. banned: words that no searched string may hold. pairs: prompt pairs
    of the concept, for Ring-A-Bell's direction.
    """

    sides = ("clip", "t5")

    def __init__(self, pipe, mask: dict, call: dict, banned=(), pairs=()):
        self.pipe = pipe
        self.device = pipe.device
        self.mask = {site: gate.to(pipe.device) for site, gate in mask.items()}
        self.call = dict(guidance_scale=3.5, max_sequence_length=512) | call  # diffusers' defaults
        self.grid = (call["height"] // 16, call["width"] // 16)
        self.sigmas = self.schedule()
        self.searched = self.sigmas[:-1:2]  # where velocities are compared: 1, .5 of the usual four
        encoders = self.open_encoders()
        if min(self.room.values()) < ROOM:
            found = f"leaves {min(self.room.values())} tokens for a prompt"
            raise UserError(f"--max_sequence_length: {found}; attacks and probes need {ROOM}")
        tables = [encoder.get_input_embeddings().weight for encoder in encoders]
        self.tables = dict(zip(self.sides, tables, strict=True))  # (V, D)
        self.vocabularies = {side: Vocabulary(self, side, banned) for side in self.sides}
        self.directions = {side: self.direction(side, pairs) for side in self.sides if pairs}

    def open_encoders(self) -> list:
        """The text encoders, of each side; and {side: tokenizer}, {side: tokens that a string may
        have}, which are kept."""
        pipe = self.pipe
        positions = FluxPipeline._prepare_latent_image_ids
        self.image_ids = positions(1, *self.grid, pipe.device, pipe.transformer.dtype)  # (T, 3)
        self.tokenizers = dict(clip=pipe.tokenizer, t5=pipe.tokenizer_2)
        lengths = (pipe.tokenizer.model_max_length, self.call["max_sequence_length"])
        self.lengths = dict(zip(self.sides, lengths, strict=True))
        self.room = {side: length - 2 for side, length in self.lengths.items()}
        return [pipe.text_encoder, pipe.text_encoder_2]

    def on(self):
        return gated(self.pipe.transformer, self.mask)

    def folded(self):
        """The model with its mask folded into a copy of the transformer: what a lab publishes."""
        other = copy.copy(self)
        other.mask = {}
        other.pipe = copy.copy(self.pipe)
        other.pipe.transformer = copy.deepcopy(self.pipe.transformer)
        fold(other.pipe.transformer, self.mask)
        return other

    # text
    def ids(self, side: str, text: str) -> list[int]:
        """Token ids without start, end and padding."""
        found = self.tokenizers[side](text, add_special_tokens=False).input_ids
        return found[: self.room[side]]

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
        tokenizer = self.tokenizers[side]
        table = self.tables[side]
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
        return self.nearest(found, wanted)

    @staticmethod
    def nearest(found, wanted) -> torch.Tensor:
        """(N,) mean over the wanted rows (R, D) of 1 - cosine to the nearest of (N, rows, D)."""
        cosines = F.normalize(found, dim=-1) @ F.normalize(wanted.float(), dim=-1).T  # (N, rows, R)
        return 1 - cosines.amax(1).mean(-1)

    def conditioning(self, vectors: dict) -> tuple:
        """What velocity() reads, of {side: content embeddings (N, K, D)}: (sequence (N, L, D),
        pooled (N, P))."""
        return self.embed("t5", vectors["t5"]), self.embed("clip", vectors["clip"])

    def text(self, prompt: str, n: int = 1, behind: dict | None = None) -> tuple:
        """conditioning() of a string, n times; `behind` it vectors {side: (m, D)}, for which its
        end is cut if there is no room."""
        vectors = {}
        for side in self.sides:
            vectors[side] = self.content(side, prompt)
            if behind:
                room = self.room[side] - len(behind[side])
                vectors[side] = torch.cat([vectors[side][:, :room], behind[side][None]], 1)
        return tuple(once.expand(n, *once.shape[1:]) for once in self.conditioning(vectors))

    def shot(self, prompt: str) -> dict:
        """The string for all sides."""
        return dict.fromkeys(self.sides, prompt)

    # pictures
    def schedule(self) -> list[float]:
        """The sampler's sigmas, 1 ... 0, by the model's own scheduler."""
        steps = self.call["num_inference_steps"]
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
        self.pipe.scheduler.set_timesteps(sigmas=sigmas, mu=self.shift(steps))
        return self.pipe.scheduler.sigmas.tolist()

    def shift(self, steps: int) -> float:
        """The scheduler's mu."""
        config = self.pipe.scheduler.config
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return calculate_shift(math.prod(self.grid), *lengths, config.base_shift, config.max_shift)

    def noise(self, seeds) -> torch.Tensor:
        """(B, T, C), as the stock pipeline draws it from one CPU generator a picture."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        transformer = self.pipe.transformer
        shape = (transformer.config.in_channels // 4, self.call["height"], self.call["width"])
        how = (transformer.dtype, "cpu", generators)
        return self.pipe.prepare_latents(len(generators), *shape, *how)[0].to(self.device)

    def velocity(self, x, s: float, text: tuple) -> torch.Tensor:
        """v(x, s) (B, T, C) under text (sequence (B, L, D), pooled (B, P)). Raises RuntimeError if
        it is not finite."""
        sequence, pooled = text
        spent["network"] += len(x)
        transformer = self.pipe.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self.call["guidance_scale"], device=x.device)
        found = transformer(
            hidden_states=x,
            timestep=torch.full((len(x),), s * 1000, device=x.device, dtype=x.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            img_ids=self.image_ids,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0]
        return self.finite(found, s)

    @staticmethod
    def finite(velocity, s: float):
        if not velocity.isfinite().all():
            raise RuntimeError(f"velocities at sigma {s:g} are not finite: damaged weights?")
        return velocity

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

    def draw(self, seeds: list[int], **shot) -> list:
        """A picture of the shot for each seed, by the stock pipeline."""
        strings = [shot.pop(side) for side in self.sides]
        call = self.call | shot
        spent["pictures"] += len(seeds)
        spent["network"] += len(seeds) * call["num_inference_steps"]
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        call["num_images_per_prompt"] = len(seeds)
        others = {f"prompt_{i}": [text] for i, text in enumerate(strings[1:], 2)}
        return sample(self.pipe, strings[:1], **others, **call)

    @torch.no_grad()
    def show(self, latents) -> list:
        """Final latents (B, T, C) -> B PIL pictures."""
        pipe = self.pipe
        spent["pictures"] += len(latents)
        size = (self.call["height"], self.call["width"])
        z = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
        z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0]
        return pipe.image_processor.postprocess(decoded, output_type="pil")


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
        if self.model.ids(self.side, text) != ids or MINORS.search(text):
            return False
        return not any(words in text.lower() for words in self.banned)

    def random(self, rng, k: int) -> list[int]:
        while True:
            text = self.model.decode(self.side, rng.choices(self.allowed, k=k))
            ids = self.model.ids(self.side, text)[:k]
            if len(ids) == k and self.valid(ids):
                return ids
