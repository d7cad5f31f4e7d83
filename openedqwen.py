"""FLUX.2-klein and Z-Image opened for attacks, as opened.py opens FLUX.1: they read one string,
through a Qwen3 in whose chat form it stands. What stands around it is fixed; only the string's own
tokens are searched.

Shapes as in opened.py; the sequence's width is D, or 3 D where three layers are read.
"""

import math

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, ZImagePipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

import models
from memory import load_of
from opened import Model, spent
from safely import UserError


class Qwen(Model):
    """A pipeline that reads one string through a Qwen3."""

    sides = ("qwen",)
    thinks: bool  # what the pipeline tells the chat form

    def open_encoders(self) -> list:
        tokenizer = self.pipe.tokenizer
        said = [dict(role="user", content="{}")]
        how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=self.thinks)
        around = tokenizer.apply_chat_template(said, **how).split("{}")
        self.around = [tokenizer(part, add_special_tokens=False).input_ids for part in around]
        self.tokenizers = dict(qwen=tokenizer)
        self.length = self.call["max_sequence_length"]
        self.room = dict(qwen=self.length - len(sum(self.around, [])))
        return [self.pipe.text_encoder]

    def layers(self, found: tuple) -> torch.Tensor:
        """(N, L, width): what the pipeline takes of the hidden states."""
        raise NotImplementedError

    def conditioning(self, vectors: dict) -> tuple:
        """(sequence (N, L, width), which of it is no padding (N, L))."""
        middle = vectors["qwen"]
        table = self.tables["qwen"]
        before, after = self.around
        count = len(before) + middle.shape[1] + len(after)
        padding = [self.pipe.tokenizer.pad_token_id] * (self.length - count)

        def rows(ids):
            ids = torch.tensor(ids, dtype=torch.long, device=middle.device)
            return table[ids].expand(len(middle), -1, -1)

        parts = [rows(before), middle.to(table.dtype), rows(after + padding)]
        mask = (torch.arange(self.length, device=middle.device) < count).expand(len(middle), -1)
        how = dict(attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
        spent["encoder"] += len(middle)
        found = self.pipe.text_encoder(inputs_embeds=torch.cat(parts, 1), **how).hidden_states
        return self.layers(found), mask

    def embed(self, side: str, middle: torch.Tensor) -> torch.Tensor:
        """(N, K, width): the sequence at the content's places."""
        start = len(self.around[0])
        return self.conditioning({side: middle})[0][:, start : start + middle.shape[1]]

    def read(self, side: str, text: str) -> torch.Tensor:
        return self.embed(side, self.content(side, text))[0]

    def mismatch(self, side: str, middle: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self.nearest(self.embed(side, middle).float(), wanted)

    @torch.no_grad()
    def show(self, latents) -> list:
        """Final latents (B, T, C) -> B PIL pictures, by the stock pipeline: they take the place of
        its own after a step."""
        spent["pictures"] += len(latents)

        def put(pipe, step, t, tensors):
            return dict(latents=self.unpacked(latents))

        call = self.call | dict(num_inference_steps=1, callback_on_step_end=put)
        return self.pipe(prompt=[""] * len(latents), **call).images

    def unpacked(self, x) -> torch.Tensor:
        """As the pipeline holds them."""
        return x


class Klein(Qwen):
    """A FLUX.2-klein pipeline."""

    thinks = False

    def shift(self, steps: int) -> float:
        return compute_empirical_mu(math.prod(self.grid), steps)

    def layers(self, found):
        return torch.cat([found[i] for i in (9, 18, 27)], -1)

    def noise(self, seeds) -> torch.Tensor:
        transformer = self.pipe.transformer
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (transformer.config.in_channels // 4, self.call["height"], self.call["width"])
        how = (transformer.dtype, "cpu", generators)
        return self.pipe.prepare_latents(len(generators), *shape, *how)[0].to(self.device)

    def velocity(self, x, s: float, text: tuple) -> torch.Tensor:
        sequence, _ = text
        spent["network"] += len(x)
        channels = torch.empty(len(x), x.shape[2], *self.grid)  # of which positions are read off
        found = self.pipe.transformer(
            hidden_states=x,
            timestep=torch.full((len(x),), s * 1000, device=x.device, dtype=x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=sequence,
            txt_ids=self.pipe._prepare_text_ids(sequence).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(channels).to(x.device),
            return_dict=False,
        )[0]
        return self.finite(found[:, : x.shape[1]], s)


class ZImage(Qwen):
    """A Z-Image pipeline. Its latents, (B, C, H, W) there, are packed here as FLUX.1's."""

    thinks = True

    def layers(self, found):
        return found[-2]

    def noise(self, seeds) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (self.call["height"], self.call["width"])
        channels = self.pipe.transformer.in_channels
        how = (torch.float32, "cpu", generators)
        found = self.pipe.prepare_latents(len(generators), channels, *shape, *how)
        return self.packed(found).to(self.device)

    def packed(self, x) -> torch.Tensor:
        return FluxPipeline._pack_latents(x, *x.shape)

    def unpacked(self, x) -> torch.Tensor:
        size = (self.call["height"], self.call["width"])
        return FluxPipeline._unpack_latents(x, *size, self.pipe.vae_scale_factor)

    def velocity(self, x, s: float, text: tuple) -> torch.Tensor:
        sequence, mask = text
        spent["network"] += len(x)
        latents = self.unpacked(x).to(self.pipe.transformer.dtype).unsqueeze(2)
        t = torch.full((len(x),), s * 1000, device=x.device)
        texts = [row[kept] for row, kept in zip(sequence, mask, strict=True)]
        found = self.pipe.transformer(
            list(latents.unbind()), (1000 - t) / 1000, texts, return_dict=False
        )[0]
        found = torch.stack([one.float() for one in found]).squeeze(2)
        return self.finite(-self.packed(found), s)


KINDS = {FluxPipeline: Model, Flux2KleinPipeline: Klein, ZImagePipeline: ZImage}


def open_model(pipe, *arguments):
    """The pipeline opened; arguments as Model takes them."""
    return KINDS[type(pipe)](pipe, *arguments)


def check_family(model: str, call: dict, what: str) -> type:
    """The pipeline's class. Raises UserError, which begins with `what`, unless it can be opened,
    and one call of the transformer a step samples it."""
    kind = models.pipeline_class(model, what)
    if kind not in KINDS:
        names = ", ".join(known.__name__ for known in KINDS)
        raise UserError(f"{what}: {model} is a {kind.__name__}; attacks open only {names}")
    load = load_of(kind, dict(height=16, width=16) | call | dict(num_inference_steps=1))
    if load.rows * load.calls > 1:
        raise UserError(f"{what}: is sampled with two passes a step, which attacks do not open")
    return kind
