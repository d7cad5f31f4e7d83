"""Other tools' models. Oracles: weights changed by hand, load_erased, the stock pipeline."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import families
import foreign
import heal
import models
import sites
from artefacts import fingerprints, load_erased, save_mask, write_json
from safely import UserError

STATE = load_file(f"{models.TINY}/transformer/diffusion_pytorch_model.safetensors")
LAYER = "transformer_blocks.0.attn.to_q"
WEIGHT = f"{LAYER}.weight"
EDITED = {WEIGHT: STATE[WEIGHT] * 2, "context_embedder.bias": STATE["context_embedder.bias"] + 1}
A, B = torch.ones(2, 128) / 8, torch.arange(256.0).view(128, 2) / 256
LORA = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}


def prefixed(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def write(file, tensors, metadata=None):
    file.parent.mkdir(exist_ok=True)
    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, file, metadata)


def check(path, pipe, wanted, scale=None) -> foreign.Found:
    """It loads to the base with the tensors `wanted`, and leaves the base as it was."""
    found = foreign.find(path, pipe, scale)
    for key, tensor in found.load().transformer.state_dict().items():
        assert torch.allclose(tensor, wanted.get(key, STATE[key]), atol=1e-6, rtol=0), key
    assert all(torch.equal(x, STATE[key]) for key, x in pipe.transformer.state_dict().items())
    return found


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("form, tensors", [("whole", STATE | EDITED), ("partial", EDITED)])
def test_state_dicts(form, tensors, prefix, pipe, tmp_path):
    """Their tensors take the place of the base's; a folder with the file is the file."""
    write(tmp_path / "x.safetensors", prefixed(prefix, tensors))
    for path in (tmp_path, tmp_path / "x.safetensors"):
        found = check(path, pipe, EDITED)
        assert found.form == f"{form} state dict, 2 of 172 tensors differ" and found.closed == 0


META = dict(lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2}))
ALPHA = LORA | {f"{LAYER}.alpha": torch.tensor(1.0)}
LORAS = [  # prefix, tensors, metadata, adapter_config.json, --lora_scale, factor of B A
    ("", LORA, None, None, None, 1),
    ("transformer.", LORA, None, None, -0.5, -0.5),
    ("base_model.model.", LORA, None, dict(r=2, lora_alpha=4), None, 2),
    ("base_model.model.transformer.", LORA, None, dict(r=2, lora_alpha=4), 0.5, 1),
    ("transformer.", ALPHA, None, None, None, 0.5),
    ("transformer.", LORA, META, None, None, 4),
]


@pytest.mark.parametrize("prefix, tensors, metadata, config, scale, factor", LORAS)
def test_loras(prefix, tensors, metadata, config, scale, factor, pipe, tmp_path):
    """W + scale alpha / R B A, and nothing else."""
    write(tmp_path / "adapter_model.safetensors", prefixed(prefix, tensors), metadata)
    write_json(tmp_path / "adapter_config.json", config or {})
    found = check(tmp_path, pipe, {WEIGHT: STATE[WEIGHT] + factor * (B @ A)}, scale)
    assert found.form == f"LoRA on 1 layers, times {factor:g}, 1 of 172 tensors differ"


def test_peft(pipe, tmp_path):
    """What PEFT itself merges, where it is installed."""
    peft = pytest.importorskip("peft")
    how = dict(r=4, lora_alpha=10, init_lora_weights=False)
    config = peft.LoraConfig(target_modules=["to_q", "context_embedder"], **how)
    model = peft.get_peft_model(copy.deepcopy(pipe.transformer), config)
    model.save_pretrained(tmp_path)
    check(tmp_path, pipe, model.merge_and_unload().state_dict())


BAD = [  # tensors, adapter_config.json, message
    (STATE, None, "no tensor differs from the base's"),
    (LORA | {f"{LAYER}.lora_B.weight": B * 0}, None, "no tensor differs from the base's"),
    (EDITED | {"no.such": A}, None, "x.safetensors: no.such is not in the base's transformer"),
    ({WEIGHT: A}, None, "to_q.weight is [2, 128], the base's [128, 128]"),
    ({WEIGHT: STATE[WEIGHT].int()}, None, "to_q.weight holds other than finite"),
    (EDITED | prefixed("transformer.", EDITED), None, "is there twice"),
    ({"lora_unet_x.lora_down.weight": A}, None, "lora_unet_x.lora_down.weight: Kohya's form"),
    ({f"{LAYER}.lora.down.weight": A}, None, "diffusers' old form"),
    (prefixed("text_encoder.", LORA), None, "lora_A.weight: on a text encoder"),
    (LORA | {f"{LAYER}.lora_magnitude_vector": A}, None, "lora_magnitude_vector: a DoRA"),
    ({f"{LAYER}.hada_w1_a": A}, None, "hada_w1_a: a LyCORIS"),
    (LORA | {f"{LAYER}.lora_B.bias": B}, None, "lora_B.bias: no tensor of a LoRA"),
    ({f"{LAYER}.lora_A.weight": A}, None, "to_q are (2, 128) and (0,), not (R, 128) and (128, R)"),
    (LORA | {f"{LAYER}.lora_A.weight": A / 0}, None, "lora_A.weight holds other than finite"),
    (prefixed("x.", LORA), None, f"x.{LAYER} is no linear layer of the base's transformer"),
    (LORA | prefixed("transformer.", LORA), None, "is there twice"),
    (LORA, dict(r=3), "to_q has rank 2, its configuration 3"),
    (LORA, dict(use_rslora=True), "its configuration has use_rslora, which is not read here"),
    (LORA, dict(lora_alpha="4"), "its configuration has lora_alpha '4'"),
    (ALPHA, dict(lora_alpha=4), "to_q.alpha is no single number, or said twice"),
]


@pytest.mark.parametrize("tensors, config, message", BAD)
def test_bad_tensors(tensors, config, message, pipe, tmp_path):
    """Refused by name, on one line."""
    write(tmp_path / "x.safetensors", tensors)
    write_json(tmp_path / "adapter_config.json", config or {})
    with pytest.raises(UserError) as error:
        foreign.find(tmp_path / "x.safetensors", pipe)
    assert message in str(error.value) and "\n" not in str(error.value)


def erased_folder(folder, pipe, concept, nth):
    """Of ours: closes every nth gate, and adds a LoRA."""
    folder.mkdir()
    found = sites.gate_sites(pipe.transformer)
    mask = {name: (torch.arange(site.units) % nth > 0).float() for name, site in found.items()}
    about = dict(model="tiny/flux", modules=["ffn", "norm"], heal=1, call=models.CALLS["tiny/flux"])
    write_json(folder / "config.json", dict(concept=[concept]) | about)
    base = fingerprints(pipe)
    lora = {LAYER.replace("to_q", "to_out.0"): (torch.ones(1, 128), torch.ones(128, 1) / nth)}
    heal.save(folder / "heal.safetensors", lora, base, mask)
    save_mask(folder / "mask.safetensors", mask, base, ["ffn", "norm"])


def test_folders(pipe, tmp_path, monkeypatch):
    """Whole pipelines with their text encoders, transformers, ours put together as load_erased
    does it; everything else is refused by name."""
    monkeypatch.chdir(tmp_path)
    other = models.load_pipeline(models.TINY, "cpu")
    other.transformer.load_state_dict(STATE | EDITED)
    next(other.text_encoder.parameters()).mul_(2)
    other.save_pretrained("pipeline")
    shutil.copytree("pipeline/transformer", "folder/transformer")
    shutil.copytree("pipeline/transformer", "lacks")
    write(Path("lacks/diffusion_pytorch_model.safetensors"), EDITED, dict(format="pt"))
    for name in ("pipeline/transformer", "folder", "pipeline"):
        found = check(Path(name), pipe, EDITED)
        assert found.form.endswith("transformer, 2 of 172 tensors differ") == (name != "pipeline")
    assert found.form == "whole pipeline, text_encoder 1 of 36, transformer 2 of 172 tensors differ"
    first, base = (next(p.text_encoder.parameters()) for p in (found.load(), pipe))
    assert torch.equal(first, 2 * base)

    for name, nth in dict(gun=5, knife=7).items():
        erased_folder(Path(name), pipe, name, nth)
    both = Path("gun+knife")
    found = check(both, pipe, load_erased("gun", "knife", device="cpu").transformer.state_dict())
    assert found.form == "2264 of 7168 gates closed, LoRA on 1 layers"
    assert evaluate.read_subject([both], None, None, {}).concept == ["gun", "knife"]
    assert foreign.home(both) == Path("results/gun+knife")

    sizes = pipe.transformer.config | dict(num_layers=pipe.transformer.config.num_layers - 1)
    shallow = type(pipe.transformer).from_config(sizes)
    shallow.save_pretrained("shallow")
    other.transformer = shallow
    other.save_pretrained("shallow_pipeline")
    for name in ("part", "two/a", "two/b"):
        write(Path(f"{name}.safetensors"), EDITED)
    torch.save(EDITED, "pickle.pt")
    Path("sd3").mkdir()
    write_json(Path("sd3/config.json"), dict(_class_name="SD3Transformer2DModel"))
    for name, message in {
        "lacks": "has not the tensors of its class",
        "shallow": "^shallow: of another size than the base: .* is None, the base's ",
        "shallow_pipeline": "^shallow_pipeline: of another size than the base: ",
        "sd3": "sd3: is a SD3Transformer2DModel, the base's transformer a Flux",
        "two": "two: holds 2 .safetensors files",
        "pickle.pt": "is no .safetensors file",
        "gun/heal.safetensors": "goes with the mask beside it; name their folder",
        "gun+no_such": "^no_such: no such file or folder",
        "gun+": "^gun.: no such file or folder",
        models.TINY: "no tensor differs from the base's",
        "gun+part.safetensors": "part.safetensors: no folder that erase.py wrote",
    }.items():
        with pytest.raises(UserError, match=message):
            foreign.find(Path(name), pipe)


@pytest.mark.parametrize("family", families.FAMILIES | families.OTHERS)
def test_closed_units(family):
    """Of foreign weights, as many are closed as a mask closes where it is folded; one whose reader
    alone is zero, and one that is made of zeros, unless there is a bias."""
    transformer = (families.FAMILIES | families.OTHERS)[family]()[0].transformer
    found = sites.gate_sites(transformer)
    mask = {name: (torch.arange(site.units) % 9 > 0).float() for name, site in found.items()}
    gates = torch.cat(list(mask.values()))
    total = len(gates)
    folded = copy.deepcopy(transformer)
    sites.fold(folded, mask)
    assert sites.closed_share(folded) == round((gates == 0).sum().item() / total, 5)
    name, site = next((name, site) for name, site in found.items() if site.consumer)
    transformer.get_submodule(name).weight[:, -1] = 0
    assert sites.closed_share(transformer) == round(1 / total, 5)
    layer = transformer.get_submodule(site.producers[0])
    layer.weight[4] = 0
    if family == "schnell":
        assert sites.closed_share(transformer) == round(1 / total, 5)
        layer.bias[4] = 0
        assert sites.closed_share(transformer) == round(2 / total, 5)
