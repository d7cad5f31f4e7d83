"""A hub id or a folder in, a stock diffusers text-to-image pipeline out."""

import argparse
import contextlib
import inspect
import re
from pathlib import Path

import safely  # noqa: F401  (first: it keeps transformers quiet)

# isort: split
import diffusers
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only

from safely import UserError, first_line, number

# Files on this disk load within a second; what the hub sends keeps its own bars.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

# cuDNN's attention fails at FLUX's size: torch 2.11, an H200; as pytorch/pytorch#122695
torch.backends.cuda.enable_cudnn_sdp(False)

HERE = Path(__file__).resolve().parent
TINY = str(HERE / "tiny/flux")
SCHNELL = "black-forest-labs/FLUX.1-schnell"

# What each model's own card passes to its pipeline. 512 pixels for FLUX.1-schnell are the paper's.
CALLS = {
    "tiny/flux": dict(
        num_inference_steps=4, guidance_scale=0.0, height=64, width=64, max_sequence_length=24
    ),
    "tiny/flux2": dict(
        num_inference_steps=4, guidance_scale=1.0, height=64, width=64, max_sequence_length=32
    ),
    "tiny/zimage": dict(
        num_inference_steps=4, guidance_scale=0.0, height=64, width=64, max_sequence_length=32
    ),
    SCHNELL: dict(
        num_inference_steps=4, guidance_scale=0.0, height=512, width=512, max_sequence_length=256
    ),
    "black-forest-labs/FLUX.1-dev": dict(
        num_inference_steps=50, guidance_scale=3.5, height=1024, width=1024, max_sequence_length=512
    ),
    "black-forest-labs/FLUX.2-klein-4B": dict(
        num_inference_steps=4, guidance_scale=1.0, height=1024, width=1024
    ),
    "Tongyi-MAI/Z-Image-Turbo": dict(
        num_inference_steps=8, guidance_scale=0.0, height=1024, width=1024
    ),
    "stabilityai/stable-diffusion-3.5-large-turbo": dict(
        num_inference_steps=4, guidance_scale=0.0, height=1024, width=1024, max_sequence_length=512
    ),
    "Qwen/Qwen-Image": dict(
        num_inference_steps=50, true_cfg_scale=4.0, negative_prompt=" ", height=1328, width=1328
    ),
}
# Sana would draw another size than the one asked for.
FIXED = dict(use_resolution_binning=False)
# Flags that go to the sampler, under diffusers' own names.
CALL_FLAGS = dict(
    num_inference_steps=number(int, 1, 1000),
    guidance_scale=number(float, 0),
    true_cfg_scale=number(float, 0),
    negative_prompt=str,
    height=number(int, 16, 8192, 16),
    width=number(int, 16, 8192, 16),
    max_sequence_length=number(int, 1, 512),
)
# Texts that encode_prompt takes, one a picture; Lumina 2 has a system_prompt for all.
PROMPT = re.compile(r"(negative_)?prompt(_\d)?")
# Pipelines' names where a picture is asked for too.
NEEDS_PICTURE = re.compile(r"Img2Img|Inpaint|Fill|Edit|Control|Redux|Layered")
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError, HTTPError)


def add_flags(parser) -> None:
    help = f"hub id, id@revision or diffusers folder ({SCHNELL} with a CUDA GPU, else tiny/flux)"
    parser.add_argument("--model", help=help)
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    for name, kind in CALL_FLAGS.items():
        help = "as in diffusers (the model's own card)"
        parser.add_argument(f"--{name}", type=kind, help=help)


def local_name(name: str) -> str:
    """The inverse of portable_name: a path inside this kit made absolute, else as it is."""
    return str(HERE / name) if (HERE / name).exists() else name


def portable_name(name: str) -> str:
    """A hub id as it is, a path inside this kit relative to it, any other path absolute."""
    path = Path(name).resolve()
    if not path.exists():
        return name
    return str(path.relative_to(HERE) if path.is_relative_to(HERE) else path)


def address(model: str) -> tuple[str, str | None]:
    """(folder or hub id, the revision that follows a hub id's @)."""
    name, _, revision = model.partition("@")
    return (model, None) if Path(model).exists() or not revision else (name, revision)


def recorded(config: dict) -> str:
    """The model that a config.json names, as --model takes it; "" if it names none."""
    model = config.get("model", "")
    revision = config.get("revision")
    return f"{model}@{revision}" if revision else model and local_name(model)


def pinned(model: str) -> str:
    """A hub's model as id@commit, for main may move during a run. Raises UserError."""
    name, revision = address(model)
    if Path(name).exists():
        return model
    if Path(name).parts[:1] in (("erased",), ("tiny",)):  # not asked of the hub, which takes long
        raise UserError(f"--model: no folder {name}")
    try:
        file = hf_hub_download(name, "model_index.json", revision=revision)
    except LOADING_ERRORS as error:
        raise UserError(why_not(model, error, "is not a diffusers pipeline")) from None
    return f"{name}@{Path(file).parent.name}"  # the hub's cache has a folder for each commit


def why_not(model: str, error: Exception, what: str, flag: str = "--model") -> str:
    """A line that says why the model does not load: the hub's own error, which diffusers wraps in
    others, or else `what`."""
    name, revision = address(model)
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def has(*kinds):
        return any(isinstance(error, kinds) for error in chain)

    statuses = [getattr(getattr(error, "response", None), "status_code", None) for error in chain]
    is_away = has(LocalEntryNotFoundError, ConnectionError, HTTPError)
    if has(GatedRepoError) or 403 in statuses:
        page = f"https://huggingface.co/{name}"
        what = f"is gated: accept its licence on {page}, then `hf auth login`"
    elif has(RepositoryNotFoundError) or 401 in statuses:
        what = "is no folder, and not on the hub or private; if private, first `hf auth login`"
    elif has(RevisionNotFoundError):
        what = f"has no revision {revision} on the hub"
    elif is_away and not has(RemoteEntryNotFoundError):
        what = "is no folder and not whole in the hub's cache, and the hub is not reached"
    else:
        what = f"{what}: {first_line(error)}"
    return f"{flag}: {name} {what}"


def is_embedded(model: str) -> bool:
    """Whether it is one of tiny/, whose models have prompts and a judge of their own."""
    return Path(model).exists() and Path(model).resolve().is_relative_to(HERE / "tiny")


def prompt_folder(model: str) -> Path:
    return HERE / "prompts/tiny" if is_embedded(model) else HERE / "prompts"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_cpu(device) -> bool:
    """Under whatever index: a process group names it cpu:0."""
    return torch.device(device).type == "cpu"


def default_dtype(device, transformer=None) -> torch.dtype:
    """fp32 for a transformer of at most 10^9 parameters, else bf16; without one by the device."""
    if transformer is None:
        is_small = is_cpu(device)
    else:
        is_small = sum(p.numel() for p in transformer.parameters()) <= 10**9
    return torch.float32 if is_small else torch.bfloat16


def dtype_of(model: str, device) -> torch.dtype:
    """That which the model has by default on the device. Raises UserError."""
    return default_dtype(device, meta_transformer(model, pipeline_class(model)))


def default_model(device: str) -> str:
    return TINY if device.partition(":")[0] == "cpu" else SCHNELL


def check_device(device: str) -> None:
    """Raises UserError if torch cannot use it."""
    try:
        torch.zeros(1, device=device).item()  # which meta has not
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {device}: {first_line(error)}") from None


def pipeline_class(model: str, flag: str = "--model") -> type:
    """The pipeline's class, from its model_index.json alone. Raises UserError naming what it lacks
    of what this kit drives: a transformer, encode_prompt, a callback, final latents."""
    place, revision = address(model)
    if Path(model).exists() and not Path(model).is_dir():
        wanted = "a hub id, or a folder with a model_index.json, as diffusers saves a pipeline"
        raise UserError(f"{flag}: {model} is a file; wanted is {wanted}")
    if (Path(model) / "mask.safetensors").exists():
        raise UserError(f"{flag}: {model} is an erased folder; erase.py alone goes on from one")
    try:
        config = diffusers.DiffusionPipeline.load_config(place, revision=revision)
        name = config["_class_name"]
    except LOADING_ERRORS as error:
        raise UserError(why_not(model, error, "is not a diffusers pipeline", flag)) from None
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise UserError(f"{flag}: {model} is a {name}, which this diffusers does not have")
    parts = inspect.signature(kind.__init__).parameters
    accepts = inspect.signature(kind.__call__).parameters
    lacking = [part for part in ("transformer", "vae", "scheduler") if part not in parts]
    if not hasattr(kind, "encode_prompt"):
        lacking.append("encode_prompt")
    lacking += [
        f"{flag} in its __call__"
        for flag in ("prompt", "generator", "output_type", "callback_on_step_end")
        if flag not in accepts
    ]
    if not hasattr(kind.__call__, "__wrapped__"):
        lacking.append("torch.no_grad() around its __call__ that could be taken off")
    if lacking:
        raise UserError(f"{flag}: {model} is a {name}, which has no {lacking[0]}")
    if "num_frames" in accepts or NEEDS_PICTURE.search(name):
        raise UserError(f"{flag}: {model} is a {name}, which draws no pictures from text alone")
    return kind


def meta_module(model: str, kind: type, part: str):
    """A part of the pipeline without weights, on torch's meta device; None where it has no module
    there. Raises UserError."""
    place, revision = address(model)
    where = dict(subfolder=part, revision=revision)
    try:
        _, name = kind.load_config(place, revision=revision).get(part, (None, None))
        part_class = getattr(transformers if "text" in part else diffusers, str(name), None)
        if part_class is None:
            return None
        with torch.device("meta"):
            if "text" in part:
                return part_class(part_class.config_class.from_pretrained(place, **where))
            return part_class.from_config(part_class.load_config(place, **where))
    except (*LOADING_ERRORS, AttributeError, RuntimeError) as error:
        raise UserError(why_not(model, error, f"has no {part} that loads")) from None


def meta_transformer(model: str, kind: type):
    """The transformer without weights, on torch's meta device. Raises UserError."""
    transformer = meta_module(model, kind, "transformer")
    if transformer is None:
        raise UserError(f"--model: {model} has no transformer that loads: it names none")
    return transformer


def sampler_call(model: str, kind: type, **flags) -> dict:
    """What the sampler is called with: the model's own card (CALLS), and over it the flags that are
    not None. Raises UserError for a flag that its pipeline does not take, or a missing size."""
    accepts = inspect.signature(kind.__call__).parameters
    name = address(model)[0]
    if is_embedded(model):  # whatever folder of tiny/ it was trained into
        name = f"tiny/{Path(model).resolve().name}"
    call = dict(CALLS.get(name, {}))
    call |= {flag: value for flag, value in FIXED.items() if flag in accepts}
    for flag, value in flags.items():
        if value is None:
            continue
        if flag not in accepts:
            raise UserError(f"--{flag}: {kind.__name__} takes none")
        call[flag] = value
    for flag in ("num_inference_steps", "height", "width"):
        if flag not in call:
            raise UserError(f"--{flag}: needed, for {model} is not in models.py's table")
    return call


def check_call(call, where: str) -> None:
    """Raises UserError, which begins with `where`, unless it is a dict of CALL_FLAGS as the command
    line takes them."""
    if not isinstance(call, dict):
        raise UserError(f"{where} is not a JSON object")
    for flag, value in call.items():
        if FIXED.get(flag, ...) is value:
            continue
        kind = CALL_FLAGS.get(flag)
        if kind is None:
            raise UserError(f"{where} has {flag!r}, which is no flag of the sampler")
        if type(value) not in ((str,) if kind is str else (int, float)):
            raise UserError(f"{where}: {flag} is {value!r}")
        try:
            kind(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{where}: {flag}: {error}") from None


def inspect_model(model: str, **flags) -> tuple:
    """(its pipeline's class, its transformer without weights, {other part: parameters}, what the
    sampler is called with), from configuration files alone. flags: CALL_FLAGS, None where not
    given. Raises UserError."""
    kind = pipeline_class(model)
    transformer = meta_transformer(model, kind)
    call = sampler_call(model, kind, **flags)
    place, revision = address(model)
    if kind.load_config(place, revision=revision).get("is_distilled"):  # FLUX.2 klein: not guided
        call.setdefault("guidance_scale", 1.0)
    others = {}
    for part in inspect.signature(kind.__init__).parameters:
        if part == "vae" or part.startswith("text_encoder"):
            module = meta_module(model, kind, part)
            others[part] = sum(p.numel() for p in module.parameters()) if module else 0
    return kind, transformer, others, call


def folder_of(model: str) -> Path:
    """Where its files lie; a pinned model's in the hub's cache, where load_pipeline left them: no
    network is needed at the end of a run."""
    place, revision = address(model)
    if Path(place).is_dir():
        return Path(place)
    return Path(hf_hub_download(place, "model_index.json", revision=revision)).parent


def stored_transformer(model: str, kind: type):
    """The model's transformer in the dtype it is stored in, its weights mapped from their files."""
    folder = folder_of(model)
    transformer_class = getattr(diffusers, kind.load_config(folder)["transformer"][1])
    files = (folder / "transformer").glob("*.safetensors")
    file = min(file for file in files if file.name.count(".") == 1)  # not .fp16.safetensors
    with safe_open(file, "pt") as f:  # diffusers would make it fp32
        dtype = f.get_tensor(next(iter(f.keys()))).dtype
    how = dict(subfolder="transformer", dtype=dtype, use_safetensors=True)
    transformer = transformer_class.from_pretrained(folder, **how)
    check_whole(model, transformer)
    return transformer


def check_whole(model: str, module) -> None:
    """Raises UserError for a module that was loaded from files without some of its weights."""
    missing = [name for name, p in module.named_parameters() if p.is_meta]
    if missing:
        raise UserError(f"--model: {model} has no weights for {missing[0]}")


def load_whole(kind, name: str, flag: str, **how):
    """A transformers model from safetensors alone, by its class or an Auto class. Raises UserError
    for weights that its files lack or have in another shape: those would be drawn at random."""
    how |= dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    try:
        module, found = kind.from_pretrained(name, **how)
    except (*LOADING_ERRORS, RuntimeError) as error:
        raise UserError(why_not(name, error, "does not load", flag)) from None
    part = "/".join(filter(None, (name, how.get("subfolder"))))
    if found["missing_keys"]:
        raise UserError(f"{flag}: {part} has no weights for {min(found['missing_keys'])}")
    if found["mismatched_keys"]:
        key, stored, wanted = min(found["mismatched_keys"])
        raise UserError(f"{flag}: {part} has {key} of {tuple(stored)}, not {tuple(wanted)}")
    return module.eval()


def load_text_encoders(model: str, kind: type, dtype) -> dict:
    """The parts of a pipeline that are models of transformers."""
    loaded = {}
    place, revision = address(model)
    for part, source in kind.load_config(place, revision=revision).items():
        if isinstance(source, (list, tuple)) and source[0] == "transformers":
            part_class = getattr(transformers, source[1], None)
            if inspect.isclass(part_class) and issubclass(part_class, torch.nn.Module):
                how = dict(subfolder=part, dtype=dtype, revision=revision)
                loaded[part] = load_whole(part_class, place, "--model", **how)
    return loaded


def stored_bytes(model: str, transformer, others: dict) -> dict:
    """What the safetensors files of its transformer take, those of all its parts, and those of them
    that are still to come from the hub. Where the hub is not reached nothing comes, and what is
    written is as if stored in bf16. others: {other part: parameters}."""
    name, revision = address(model)
    files = {}
    if Path(name).is_dir():
        files = {str(f.relative_to(name)): f.stat().st_size for f in Path(name).glob("*/*")}
    else:
        with contextlib.suppress(*LOADING_ERRORS):
            about = HfApi().model_info(name, revision=revision, files_metadata=True)
            files = {file.rfilename: file.size for file in about.siblings}
    sizes = dict(transformer=0, all=0, download=0)
    for path, size in files.items():
        part, _, file = path.partition("/")
        if part in ("transformer", *others) and re.fullmatch(r"[^.]+\.safetensors", file):
            cached = Path(name).is_dir() or try_to_load_from_cache(name, path, revision=revision)
            sizes["all"] += size
            sizes["transformer"] += size * (part == "transformer")
            sizes["download"] += size * (not cached)
    if not sizes["transformer"]:
        size = 2 * sum(p.numel() for p in transformer.parameters())
        sizes |= dict(transformer=size, all=size + 2 * sum(others.values()))
    return sizes


def load_pipeline(model: str, device=None, dtype=None):
    """A stock pipeline, frozen, without progress bars, from safetensors alone. Raises UserError."""
    device = device or default_device()
    dtype = dtype or dtype_of(model, device)
    kind = pipeline_class(model)
    place, revision = address(model)
    encoders = load_text_encoders(model, kind, dtype)
    how = dict(dtype=dtype, use_safetensors=True)
    try:
        pipe = kind.from_pretrained(place, revision=revision, **how, **encoders)
    except LOADING_ERRORS as error:
        raise UserError(why_not(model, error, "does not load")) from None
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            check_whole(model, part.eval().requires_grad_(False))
    return pipe.to(device)


# --------------------------------------------------------------------------------- prompts, encoded
def collate(encoded: list):
    """What encode_prompt gave for single prompts -> what it gives for all of them at once."""
    first = encoded[0]
    if len(encoded) == 1 or first is None:
        return first
    if isinstance(first, list):  # one entry a prompt: Z-Image, ERNIE-Image
        return [entry for part in encoded for entry in part]
    if isinstance(first, tuple):
        parts = [collate(part) for part in zip(*encoded, strict=True)]
        lengths = [part[0].shape[1] for part in encoded if torch.is_tensor(part[0])]
        if parts[1:] == [None] and len(set(lengths)) > 1:  # Qwen-Image: no mask for one prompt
            parts[1] = pad_sequence([torch.ones(n).long() for n in lengths], batch_first=True)
        has_mask = any(
            torch.is_tensor(part) and part.shape[1:] == (max(lengths),) for part in parts
        )
        if len(set(lengths)) > 1 and not has_mask:
            raise UserError("--model: its text encoder has no mask for prompts of other lengths")
        return tuple(parts)
    if len(first) != 1:  # without a batch: FLUX's text ids
        return first
    return pad_sequence([part[0] for part in encoded], batch_first=True)


def remember_prompts(pipe) -> None:
    """Makes pipe.encode_prompt encode each prompt once, by itself, and keep it on the CPU."""
    if hasattr(pipe.encode_prompt, "known"):  # it does already
        return
    if getattr(pipe, "pe", None) is not None:
        pipe.pe = None  # ERNIE-Image's, which writes each prompt anew before it is encoded
    stock = pipe.encode_prompt
    signature = inspect.signature(stock)
    known = {}

    def encode_prompt(*args, **kwargs):
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        device = arguments.pop("device", None) or pipe._execution_device
        lists = {}
        for name, value in arguments.items():
            if PROMPT.fullmatch(name) and isinstance(value, (str, list)):
                lists[name] = [value] if isinstance(value, str) else value
        encoded = []
        for i in range(max(map(len, lists.values()), default=1)):
            # a single negative prompt goes with all prompts
            one = arguments | {name: [texts[i % len(texts)]] for name, texts in lists.items()}
            key = repr(one)  # made before encoding: Z-Image writes its template into the list
            if key not in known:
                with torch.no_grad():
                    result = stock(**one, device=device)
                known[key] = tree_map_only(torch.Tensor, torch.Tensor.cpu, result)
            encoded.append(known[key])
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), collate(encoded))

    encode_prompt.known = known
    pipe.encode_prompt = encode_prompt


def for_prompts(call: dict, prompts) -> dict:
    """What pipe(...) takes for these prompts: a negative prompt, if any, once for each."""
    arguments = call | dict(prompt=list(prompts))
    if "negative_prompt" in call:
        arguments["negative_prompt"] = [call["negative_prompt"]] * len(arguments["prompt"])
    return arguments


class Encoded(Exception):
    """Raised where the sampler first calls its transformer: by then its prompts are encoded."""


@contextlib.contextmanager
def refused(pipe):
    """What the pipeline says of its arguments becomes a UserError."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"--model: {type(pipe).__name__} says: {first_line(error)}") from None


def encode_all(pipe, device, prompts, call: dict) -> None:
    """Has the sampler encode the prompts, each once, and draw nothing; then the text encoders go.
    They encode on the device if they fit there. call: what pipe(...) takes."""
    encoders = {name: part for name, part in pipe.components.items() if "text_encoder" in name}
    modules = [part for part in encoders.values() if isinstance(part, torch.nn.Module)]
    size = sum(p.nbytes for module in modules for p in module.parameters())
    if torch.device(device).type == "cuda" and size + 2**30 < torch.cuda.mem_get_info(device)[0]:
        for module in (pipe.vae, *modules):  # the VAE's device is the pipeline's
            module.to(device)

    def stop(*_):
        raise Encoded

    prompts = list(dict.fromkeys(prompts))
    with pipe.transformer.register_forward_pre_hook(stop):
        for start in range(0, len(prompts), 16):  # fewer calls of the sampler, not larger batches
            part = prompts[start : start + 16]
            with refused(pipe), contextlib.suppress(Encoded):
                pipe(output_type="latent", **for_prompts(call, part))
    for name in encoders:
        setattr(pipe, name, None)
    torch.cuda.empty_cache()
