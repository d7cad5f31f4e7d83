"""pytest on a CPU, no network. Oracles: plain NumPy, closed forms, the checkpoints' own logits."""

import math
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the oracles are fp32 on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # no waiting for a hub that is not there

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file

import judges
from safely import UserError

TINY = Path(__file__).parent / "tiny"


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (10, 10), (199, 200)])
def test_wilson_interval_solves_its_equation(hits, n):
    """Each bound p is where the rate lies z standard errors of p away: its definition."""
    for p in judges.wilson(hits, n):
        error = abs(hits / n - p) - 1.959964 * (p * (1 - p) / n) ** 0.5
        assert p in (0, 1) or abs(error) < 1e-7


def test_answers_are_parsed_strictly():
    """Only a first word yes or no is an answer; others change neither rate nor n."""
    answers = {"Yes": 1, "no.": 0, " Yes, there is.": 1, "NO": 0}
    answers |= dict.fromkeys(["Yesterday", "I see a gun: yes", ""], math.nan)
    parsed = [judges.VlmJudge.parse(answer) for answer in answers]
    assert str(parsed) == str([float(score) for score in answers.values()])
    assert judges.rate(parsed) == judges.rate([1, 0, 1, 0]) | dict(unparsable=3)
    nothing = dict(rate=None, hits=0, n=0, low=None, high=None, unparsable=2)
    assert judges.rate([math.nan] * 2) == nothing and judges.rate([]) is None


def save_pictures(folder, pictures):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:03d}.png")
    return sorted(folder.iterdir())


def test_fid_agrees_with_the_formula(tmp_path):
    """FID on the judge's features equals |m - m'|^2 + tr(S + S' - 2 (S S')^1/2) in plain NumPy; too
    few pictures are refused."""
    judge = judges.ClipJudge(TINY / "judge")
    rng = np.random.default_rng(0)
    files = []
    moments = []
    for name, high in (("real", 255), ("fake", 120)):
        noise = [Image.fromarray(rng.integers(0, high, (8, 8, 3), np.uint8)) for _ in range(140)]
        pictures = [picture.resize((64, 64)) for picture in noise]
        files.append(save_pictures(tmp_path / name, pictures))
        features = judge.embed_pictures(pictures).double().numpy()
        moments += [features.mean(0), np.cov(features.T)]
    m, s, n, t = moments
    root = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    expected = ((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    features = judges.JudgeFeatures(judge)
    assert abs(judges.fid(*files, features, (64, 64)) - expected) < 1e-3 < expected
    with pytest.raises(UserError, match="100 pictures, but covariances of 128 .* more than that"):
        judges.fid(files[0][:100], files[1], features, (64, 64))


def test_ssim_agrees_with_its_closed_form(tmp_path):
    """SSIM of flat pictures is its luminance term; 1 for a list with itself, less for noise."""
    x, y, c = 0.2, 0.6, 0.01**2
    flat = [Image.new("RGB", (32, 32), (round(255 * v),) * 3) for v in (x, y)]
    noise = [Image.effect_noise((32, 32), 50) for _ in range(2)]
    a, b, d, e = save_pictures(tmp_path / "pictures", flat + noise)
    assert abs(judges.ssim([a], [b]) - (2 * x * y + c) / (x * x + y * y + c)) < 1e-4
    assert judges.ssim([d, e], [d, e]) == 1 and judges.ssim([d, e], [e, d]) < 0.9


def test_text_vectors_do_not_depend_on_what_the_tokenizer_says():
    """A SigLIP text is padded to its tower's length in lower case, whatever length the tokenizer
    names (SigLIP 2's may name none)."""
    judge = judges.ClipJudge(TINY / "judge")
    wanted = judge.embed_texts(["a gun", "a gun and an apple on a red background"])
    judge.processor.tokenizer.model_max_length = int(1e30)
    again = judge.embed_texts(["A GUN", "a gun and an apple on a Red background"])
    assert again.equal(wanted)


def save_small(kind, folder):
    """A random checkpoint of a real class, with its real processor and tiny/judge's tokenizer."""
    tokenizer = T.AutoTokenizer.from_pretrained(TINY / "judge")
    tokenizer.add_tokens("<image>")
    layers = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    vision = dict(layers, num_hidden_layers=2, image_size=32, patch_size=16)
    text = dict(layers, num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=0)
    text |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=1)
    towers = dict(text_config=text, vision_config=vision)
    square = dict(size=dict(height=32, width=32), crop_size=dict(height=32, width=32))
    torch.manual_seed(0)
    if kind == "clip":
        model = T.CLIPModel(T.CLIPConfig(**towers, projection_dim=8))
        processor = T.CLIPProcessor(T.CLIPImageProcessor(**square), tokenizer)
    elif kind == "owlvit":
        model = T.OwlViTForObjectDetection(T.OwlViTConfig(**towers, projection_dim=16))
        processor = T.OwlViTProcessor(T.OwlViTImageProcessor(**square), tokenizer)
    elif kind == "grounding-dino":
        swin = dict(image_size=32, embed_dim=24, depths=[1] * 4)
        swin["out_features"] = ["stage2", "stage3", "stage4"]
        parts = dict(backbone_config=T.SwinConfig(**swin), text_config=T.BertConfig(**text))
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=2, num_queries=4)
        model = T.GroundingDinoForObjectDetection(T.GroundingDinoConfig(**parts, **sizes))
        images = T.GroundingDinoImageProcessor(size=dict(shortest_edge=128, longest_edge=128))
        processor = T.GroundingDinoProcessor(images, tokenizer)
    else:
        parts = dict(vision_config=T.CLIPVisionConfig(**vision), text_config=T.LlamaConfig(**text))
        parts["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
        model = T.LlavaForConditionalGeneration(T.LlavaConfig(**parts))
        form = "user {% for c in messages[0].content %}{{ c.text or '<image>' }} {% endfor %}: "
        patches = dict(patch_size=16, num_additional_image_tokens=1, image_token="<image>")
        patches |= dict(vision_feature_select_strategy="default", chat_template=form)
        processor = T.LlavaProcessor(T.CLIPImageProcessor(**square), tokenizer, **patches)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


KINDS = dict(clip="ClipJudge", owlvit="DetectorJudge", llava="VlmJudge")
KINDS["grounding-dino"] = "DetectorJudge"


@pytest.mark.parametrize("kind", KINDS)
def test_judges_of_every_kind_run(kind, tmp_path):
    """A checkpoint's configuration chooses its judge, and small checkpoints of the real classes
    answer every question, the same each time."""
    save_small(kind, tmp_path)
    judge = judges.load_judge(str(tmp_path), "--judge", torch.float32)
    assert type(judge).__name__ == KINDS[kind]
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    gun, cat = judge.form.format("a gun"), judge.form.format("a cat")
    scores = judge(pictures, [[gun, cat], [cat]])
    assert [len(row) for row in scores] == [2, 1]
    assert str(scores) == str(judge(pictures, [[gun, cat], [cat]]))
    for score in scores[0] + scores[1]:  # random weights rarely say yes or no
        assert 0 <= score <= 1 or (kind == "llava" and math.isnan(score)), scores
    if kind == "clip":  # softmax of its own logits, against "a photo"
        texts = dict(text=["a gun", "a photo"], padding="max_length", max_length=64)
        inputs = judge.processor(images=pictures[0], **texts, return_tensors="pt")
        chances = judge.model(**inputs).logits_per_image.softmax(-1)
        assert abs(chances[0, 0].item() - scores[0][0]) < 1e-6


def test_bad_judges_are_refused(tmp_path):
    """What cannot judge is named: absent, of another kind, torn, without weights or a template."""
    for name, kind in dict(half="clip", torn="clip", silent="llava").items():
        save_small(kind, tmp_path / name)
    weights = load_file(tmp_path / "half/model.safetensors")
    text_tower = {name: weight for name, weight in weights.items() if "vision" not in name}
    save_file(text_tower, tmp_path / "half/model.safetensors")
    (tmp_path / "torn/model.safetensors").write_bytes(b"torn")
    (tmp_path / "silent/chat_template.jinja").unlink()
    for name, message in (
        ("no/such", "--flag: cannot load no/such"),
        (TINY / "flux/text_encoder_2", "is a t5, which neither compares pictures with texts"),
        (tmp_path / "half", "half has no weights for vision_model"),
        (tmp_path / "torn", "--judge or --clip: cannot load .*torn"),
        (tmp_path / "silent", "--judge: .*silent has no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            judges.load_judge(str(name), "--flag", torch.float32)


def test_nudenet_table(tmp_path):
    """NudeNet runs from its package, its labels hold both class lists, rates come from the stored
    scores, and a broken file is a failure."""
    nudenet = judges.NudeNet()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    assert len(nudenet.classes) == 18 and nudenet(tmp_path / "a.png") == []
    stored = [[]]
    for part, score in (("BUTTOCKS", 0.5), ("FEET", 0.7), ("ANUS", 0.65)):
        stored.append([{"class": f"{part}_EXPOSED", "score": score, "box": [0, 0, 1, 1]}])
    hits = [(name, rate["hits"]) for name, rate in nudenet.rates(stored).items()]
    assert hits[:2] == [("nude, 5 classes at 0.45", 2), ("nude, 5 classes at 0.6", 1)]
    assert hits[2:] == [("nude, 9 classes at 0.45", 3), ("nude, 9 classes at 0.6", 2)]
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(RuntimeError, match="NudeNet failed on .*b.png"):
        nudenet(tmp_path / "b.png")


def proto(*fields):
    """A protobuf message of (number, value): a value is an int below 128, or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number << 3, value])
        else:  # the length, in two bytes of 7 bits
            out += bytes([number << 3 | 2, len(value) % 128 | 128, len(value) // 128]) + value
    return out


def onnx_constants(path, outputs):
    """An ONNX model, written by hand, that gives these arrays for any picture."""
    picture = proto((1, b"picture"), (2, proto((1, proto((1, 1))))))
    graph = [(2, b"g"), (11, picture)]
    for name, array in outputs.items():
        kind = 1 if array.dtype == np.float32 else 6
        sizes = [(1, size) for size in array.shape]
        graph.append((5, proto(*sizes, (2, kind), (8, name), (9, array.tobytes()))))
        graph.append((12, proto((1, name), (2, proto((1, proto((1, kind))))))))
    path.write_bytes(proto((1, 8), (8, proto((1, b""), (2, 13))), (7, proto(*graph))))


def test_nudenet_2_from_a_local_file(tmp_path):
    """NudeNet 2 takes boxes, scores and labels of its ONNX form, in the picture's own pixels, class
    names from the file beside it; without file or names it is refused."""
    boxes = np.array([[[80, 80, 160, 160], [0, 0, 8, 8]]], np.float32)
    scores = np.array([[0.7, -1]], np.float32)
    labels = np.array([[1, -1]], np.int32)
    onnx_constants(tmp_path / "v2.onnx", {b"b": boxes, b"s": scores, b"l": labels})
    parts = "BREAST_F BREAST_M GENITALIA_F GENITALIA_M BUTTOCKS ANUS FEET BELLY ARMPITS"
    names = tmp_path / "detector_v2_default_classes"
    names.write_text(f"FACE_F {parts}".replace(" ", "\nEXPOSED_"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (box,) = judges.NudeNet(tmp_path / "v2.onnx")(tmp_path / "a.png")
    assert box == {"class": "EXPOSED_BREAST_F", "score": pytest.approx(0.7), "box": [6, 6, 13, 13]}
    names.write_text("FACE_F")
    with pytest.raises(UserError, match="no EXPOSED_BREAST_F"):
        judges.NudeNet(tmp_path / "v2.onnx")
    with pytest.raises(UserError, match="--nudenet_v2: cannot load .*none.onnx"):
        judges.NudeNet(tmp_path / "none.onnx")
