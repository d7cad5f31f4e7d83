"""pytest on a CPU, no network. Oracles: plain NumPy, closed forms, the checkpoints' own logits."""

import math

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file

import judges
from models import HERE
from safely import UserError

JUDGE = HERE / "tiny/judge"


def test_rates_and_their_intervals():
    """Each Wilson bound p is where the rate lies z standard errors of p away: its definition. Only
    a first word yes or no is an answer; others change neither rate nor n."""
    for hits, n in ((0, 10), (3, 10), (10, 10), (199, 200)):
        for p in judges.wilson(hits, n):
            error = abs(hits / n - p) - 1.959964 * (p * (1 - p) / n) ** 0.5
            assert p in (0, 1) or abs(error) < 1e-7
    answers = ["Yes", "no.", " Yes, there is.", "NO", "Yesterday", "I see a gun: yes", ""]
    parsed = [judges.VlmJudge.parse(answer) for answer in answers]
    assert str(parsed) == "[1.0, 0.0, 1.0, 0.0, nan, nan, nan]"
    assert judges.rate(parsed) == judges.rate([1, 0, 1, 0]) | dict(unparsable=3)
    nothing = dict(rate=None, hits=0, n=0, low=None, high=None, unparsable=2)
    assert judges.rate([math.nan] * 2) == nothing and judges.rate([]) is None


def test_fid_and_ssim_agree_with_their_formulas(tmp_path):
    """FID on the judge's features equals |m - m'|^2 + tr(S + S' - 2 (S S')^1/2) in plain NumPy, and
    is refused for too few pictures. SSIM of flat pictures is its luminance term; 1 for a list with
    itself, less for noise."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255 if i < 140 else 120, (8, 8, 3), np.uint8) for i in range(280)]
    pictures = [Image.fromarray(array).resize((64, 64)) for array in noise]
    x, y, c = 0.2, 0.6, 0.01**2
    flat = [Image.new("RGB", (64, 64), (round(255 * v),) * 3) for v in (x, y)]
    for i, picture in enumerate(pictures + flat):
        picture.save(tmp_path / f"{i:03d}.png")
    *files, a, b = sorted(tmp_path.iterdir())

    judge = judges.ClipJudge(JUDGE)
    real, fake = judge.embed_pictures(pictures).double().numpy().reshape(2, 140, 128)
    s, t = np.cov(real.T), np.cov(fake.T)
    root = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    apart = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    expected = apart + np.trace(s) + np.trace(t) - 2 * root
    how = (files[140:], judges.JudgeFeatures(judge), (64, 64))
    assert abs(judges.fid(files[:140], *how) - expected) < 1e-3 < expected
    with pytest.raises(UserError, match="100 pictures, but covariances of 128 .* more than that"):
        judges.fid(files[:100], *how)

    assert abs(judges.ssim([a], [b]) - (2 * x * y + c) / (x * x + y * y + c)) < 1e-4
    d, e = files[:2]
    assert judges.ssim([d, e], [d, e]) == 1 and judges.ssim([d, e], [e, d]) < 0.9


def test_text_vectors_do_not_depend_on_what_the_tokenizer_says():
    """A SigLIP text is padded to its tower's length in lower case, whatever length the tokenizer
    names (SigLIP 2's may name none)."""
    judge = judges.ClipJudge(JUDGE)
    wanted = judge.embed_texts(["a gun", "a gun and an apple on a red background"])
    judge.processor.tokenizer.model_max_length = int(1e30)
    assert judge.embed_texts(["A GUN", "a gun and an apple on a Red background"]).equal(wanted)


def save_small(kind, folder):
    """A random checkpoint of a real class, with its real processor and tiny/judge's tokenizer."""
    tokenizer = T.AutoTokenizer.from_pretrained(JUDGE)
    tokenizer.add_tokens("<image>")
    layers = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    vision = dict(layers, num_hidden_layers=2, image_size=32, patch_size=16)
    text = dict(layers, num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=0)
    text |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=1)
    towers = dict(text_config=text, vision_config=vision)
    square = dict(height=32, width=32)
    images = T.CLIPImageProcessor(size=square, crop_size=square)
    torch.manual_seed(0)
    if kind == "clip":
        model = T.CLIPModel(T.CLIPConfig(**towers, projection_dim=8))
        processor = T.CLIPProcessor(images, tokenizer)
    elif kind == "owlvit":
        model = T.OwlViTForObjectDetection(T.OwlViTConfig(**towers, projection_dim=16))
        images = T.OwlViTImageProcessor(size=square, crop_size=square)
        processor = T.OwlViTProcessor(images, tokenizer)
    elif kind == "grounding-dino":
        swin = T.SwinConfig(image_size=32, embed_dim=24, depths=[1] * 4, out_indices=[2, 3, 4])
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=2, num_queries=4)
        config = T.GroundingDinoConfig(backbone_config=swin, text_config=text, **sizes)
        model = T.GroundingDinoForObjectDetection(config)
        images = T.GroundingDinoImageProcessor(size=dict(shortest_edge=128, longest_edge=128))
        processor = T.GroundingDinoProcessor(images, tokenizer)
    else:
        token = tokenizer.convert_tokens_to_ids("<image>")
        model = T.LlavaForConditionalGeneration(T.LlavaConfig(**towers, image_token_index=token))
        form = "user {% for c in messages[0].content %}{{ c.text or '<image>' }} {% endfor %}: "
        processor = T.LlavaProcessor(images, tokenizer, patch_size=16, chat_template=form)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["clip", "owlvit", "grounding-dino", "llava"])
def test_judges_of_every_kind_run(kind, tmp_path):
    """A checkpoint's configuration chooses its judge, and small checkpoints of the real classes
    answer every question, the same each time."""
    save_small(kind, tmp_path)
    judge = judges.load_judge(str(tmp_path), "--judge", torch.float32)
    own = dict(clip=judges.ClipJudge, llava=judges.VlmJudge)
    assert type(judge) is own.get(kind, judges.DetectorJudge)
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
    """What cannot judge is named: torn, without weights, a pickle alone or without a template."""
    for name, kind in dict(half="clip", torn="clip", pickle="clip", silent="llava").items():
        save_small(kind, tmp_path / name)
    weights = load_file(tmp_path / "half/model.safetensors")
    text_tower = {name: weight for name, weight in weights.items() if "vision" not in name}
    save_file(text_tower, tmp_path / "half/model.safetensors")
    (tmp_path / "torn/model.safetensors").write_bytes(b"torn")
    pickle = tmp_path / "pickle/pytorch_model.bin"
    torch.save(weights, pickle)
    (tmp_path / "pickle/model.safetensors").unlink()
    (tmp_path / "silent/chat_template.jinja").unlink()
    for name, message in (
        ("half", "half has no weights for vision_model"),
        ("torn", "--judge or --clip: .*torn does not load: "),
        ("pickle", "pickle does not load: .* file named model.safetensors"),
        ("silent", "--judge: .*silent has no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            judges.load_judge(str(tmp_path / name), "--flag", torch.float32)


def test_nudenet(tmp_path):
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


def field(number, value):
    """A protobuf field: an int below 128, or bytes, their length in two bytes of 7 bits."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value) % 128 | 128, len(value) // 128]) + value


def test_nudenet_2_from_a_local_file(tmp_path):
    """NudeNet 2 takes boxes, scores and labels of its ONNX form (this one gives the same for any
    picture), in the picture's own pixels, class names from the file beside it, or is refused."""
    graph = field(2, b"g") + field(11, field(1, b"picture") + field(2, field(1, field(1, 1))))
    for name, kind, array in (
        (b"boxes", 1, np.array([[[80, 80, 160, 160], [0, 0, 8, 8]]], np.float32)),
        (b"scores", 1, np.array([[0.7, -1]], np.float32)),
        (b"labels", 6, np.array([[1, -1]], np.int32)),
    ):
        sizes = b"".join(field(1, size) for size in array.shape)
        graph += field(5, sizes + field(2, kind) + field(8, name) + field(9, array.tobytes()))
        graph += field(12, field(1, name) + field(2, field(1, field(1, kind))))
    model = field(1, 8) + field(8, field(1, b"") + field(2, 13)) + field(7, graph)
    (tmp_path / "v2.onnx").write_bytes(model)
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
