"""Who looks at an evaluation's pictures, and the figures that come from looking."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from artefacts import fingerprint
from cases import SCORED, Case
from columns import Column, my_batches
from judges import ClipJudge, JudgeFeatures, NudeNet, fid, fid_metric, load_judge, ssim
from pictures import check_picture, open_pictures
from safely import UserError

LLAVA = "llava-hf/llava-v1.6-mistral-7b-hf"  # the paper's judge
CLIP = "openai/clip-vit-large-patch14"
AT_ONCE = 32  # pictures


class Panel(NamedTuple):
    """Who looks at the pictures."""

    judge: Callable
    threshold: float  # the judge sees what it scores above this
    clip: ClipJudge | None  # backbone of the CLIP score
    fid: str = "none"  # whose features: judge, inception or none
    real: list[Path] = []  # pictures of a second FID
    nudenet: NudeNet | None = None

    def to(self, device) -> None:
        for each in filter(None, (self.judge, self.clip)):
            each.model.to(device)

    def features(self):
        """What judges.fid() takes; None: no FID. Raises UserError."""
        if self.fid == "judge" and not self.clip:
            needs = "takes the features of a SigLIP or CLIP model, but --clip is none"
            raise UserError(f"--fid judge: {needs}")
        if self.fid == "judge":
            return JudgeFeatures(self.clip)
        return 2048 if self.fid == "inception" else None

    def about(self) -> dict:
        judge = self.judge.model
        clip = self.clip and self.clip.model
        nudenet = self.nudenet and ("2" if self.nudenet.is_v2 else version("nudenet"))
        return dict(
            judge=models.portable_name(judge.name_or_path),
            judge_revision=getattr(judge.config, "_commit_hash", None),
            judge_fingerprint=fingerprint(judge),
            threshold=self.threshold,
            clip_backbone=clip and models.portable_name(clip.name_or_path),
            clip_fingerprint=clip and fingerprint(clip),
            fid_features=self.fid,
            real=str(self.real[0].parent) if self.real else None,
            nudenet=nudenet,
        )


def load_panel(model: str, dtype, judge=None, clip=None, threshold=None) -> Panel:
    """The judge and the CLIP score's backbone, on the CPU; names by default those that go with the
    model. Raises UserError."""
    own = str(models.HERE / "tiny/judge")
    is_tiny = models.is_embedded(model)
    name = judge or (own if is_tiny else LLAVA)
    judge = load_judge(name, "--judge", dtype)
    if threshold is None:
        threshold = judge.threshold
    if clip == "none":
        return Panel(judge, threshold, None)
    if not clip:
        clip = own if is_tiny else CLIP
        if isinstance(judge, ClipJudge):
            clip = name
    backbone = judge if clip == name else load_judge(clip, "--clip", dtype)
    if not isinstance(backbone, ClipJudge):
        raise UserError(f"--clip: {clip} is no SigLIP or CLIP model")
    return Panel(judge, threshold, backbone)


def check_fid(panel: Panel, pictures: int) -> None:
    """Raises UserError for real pictures that are none or have no use, or too few of any."""
    features = panel.features()
    if panel.real and not features:
        raise UserError("--real: goes with --fid judge or inception")
    for file in panel.real:
        check_picture(file)
    if features:
        fid_metric(features, min(pictures, len(panel.real) or pictures))


def judged(column: Column, cases: list[Case], judge, questions: dict) -> dict[tuple, float]:
    """{(set, name, metric, word): score} of all asks, the batches split over processes. questions:
    {word: question}."""
    is_quiet = not PartialState().is_local_main_process
    scores = []
    for part in tqdm(my_batches(cases, AT_ONCE), f"judge {column.name}", disable=is_quiet):
        asked = [[questions[word] for _, word in case.asks] for case in part]
        answers = judge(open_pictures(column.files(part)), asked)
        for case, row in zip(part, answers, strict=True):
            for (metric, word), score in zip(case.asks, row, strict=True):
                scores.append(((case.set, case.name, metric, word), score))
    return dict(sorted(gather_object(scores)))


def likeness(column: Column, base: Column, cases: list[Case], panel: Panel, device) -> dict:
    """The figures of a column's pictures but for the rates: CLIP scores, SSIM and FID."""
    out = {}
    for name in SCORED if panel.clip else ():
        some = [case for case in cases if case.set == name]
        scores = []
        for start in range(0, len(some), AT_ONCE):
            part = some[start : start + AT_ONCE]
            texts = [case.prompt for case in part]
            scores.append(panel.clip.similarity(open_pictures(column.files(part)), texts))
        score = 100 * torch.cat(scores).clamp(min=0).mean().item()
        out[f"clip score, {name} prompts"] = round(score, 3)
    retain = [case for case in cases if case.set == "retain"]
    before = base.files(retain)
    after = column.files(retain)
    out["ssim"] = round(ssim(before, after), 4)
    size = open_pictures(before[:1])[0].size
    features = panel.features()
    for name, real in (("base", before), ("real", panel.real)):
        if features and real:
            distance = fid(real, after, features, size, device)
            out[f"fid to {name}"] = max(0.0, round(distance, 4))  # rounding may leave it below 0
    if column.gates:
        gates = torch.cat(list(column.gates.values()))
        out["closed"] = round((gates <= 0.5).sum().item() / len(gates), 5)
    elif column.closed is not None:
        out["closed"] = column.closed
    return out
