"""The trained ranker, the paper's own oracle: the video-language model with a scalar head, taught by pairs.

It reads video, question and one answer and gives a score; only differences of scores mean anything:
P(a is preferred to b) = sigmoid(score_a - score_b) (Bradley and Terry, 1952). It is given no caption and no
known answer. CLIP and the bridge stay those of the folder that it started from; the decoder is its own.

    python pretrain.py --stage ranker --out DIR      # makes DIR/ranker, from the policy in DIR
    python train.py --oracle trained --ranker DIR/ranker
"""

import os

import torch
from safetensors.torch import save
from torch import Tensor, nn

from checkpoints.policies import load_model, model_digest
from checkpoints.supervised import states_behind
from checkpoints.word_tokenizer import WordTokenizer
from data import BOS_ID, EOS_ID, collate_completions, embed_videos
from model import VideoLM
from oracle import Ranking, checked_groups, competition_ranks
from plumbing.options import BadInput, read_tensors, write_whole
from videoqa.answers import Question, prompt_text


class Ranker(nn.Module):
    """A VideoLM and one linear layer, no bias, on the state of the end token."""

    def __init__(self, model: VideoLM, tokenizer: WordTokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.head = nn.Linear(model.cfg.dim, 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.1 * model.cfg.dim**-0.5)

    def forward(self, video_embeds: Tensor, rows: list[list[tuple[str, str]]]) -> Tensor:
        """video_embeds (P, N_video, D), for each video the same number R of (question, answer) -> scores
        (P, R) float32. One pass: the R rows share the video's keys and values."""
        P, device, encode = len(video_embeds), video_embeds.device, self.tokenizer.encode
        # The second end token is never read: a decoder gives the states that predict the tokens it is given
        flat = [encode(question) + encode(answer) + 2 * [EOS_ID] for row in rows for question, answer in row]
        ids, mask = (x.unflatten(0, (P, -1)).to(device) for x in collate_completions(flat))
        states = states_behind(self.model, [BOS_ID], video_embeds, ids, mask)  # (P, R, T, D)
        last = (mask.sum(dim=2) - 1)[..., None, None].expand(-1, -1, 1, states.shape[3])
        return self.head(states.gather(2, last)).flatten(1).float()


def save_ranker(ranker: Ranker, base: str):
    """Writes base/ranker/ranker.safetensors: decoder and head in bfloat16, and which base they belong to."""
    os.makedirs(os.path.join(base, "ranker"), exist_ok=True)
    tensors = {f"decoder.{name}": x for name, x in ranker.model.decoder.state_dict().items()}
    tensors["head"] = ranker.head.weight.data
    tensors = {name: x.to("cpu", torch.bfloat16).contiguous() for name, x in tensors.items()}
    path = os.path.join(base, "ranker", "ranker.safetensors")
    write_whole(path, save(tensors, metadata={"base": model_digest(base)}))


def load_ranker(folder: str, device="cpu") -> Ranker:
    """What save_ranker wrote, float32, frozen; its base is the folder above. BadInput: none, or another's."""
    path, base = os.path.join(folder, "ranker.safetensors"), os.path.dirname(os.path.abspath(folder))
    remedy = f"make it with python pretrain.py --stage ranker --out {base}"
    tensors, metadata = read_tensors(path, remedy)
    if (digest := model_digest(base)) and metadata.get("base") != digest:
        raise BadInput(f"{path}: was trained from another {base}/model.safetensors; {remedy}")
    model = load_model(base)
    ranker = Ranker(model, WordTokenizer.load(os.path.join(base, "tokenizer.json"), model.cfg.vocab_size))
    try:
        ranker.head.weight.data.copy_(tensors.pop("head"))
        ranker.model.decoder.load_state_dict({k.removeprefix("decoder."): x for k, x in tensors.items()})
    except (KeyError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: not what save_ranker wrote ({words}); {remedy}") from error
    return ranker.to(device).float().eval().requires_grad_(False)


class TrainedOracle:
    """Ranks by the trained ranker's scores (log-odds), all candidates of all groups in one batch.

    margin: log-odds. Answers that score at most this below the best of their level tie with it: what the
    ranker hardly tells apart is no signal (oracle.py). A video is decoded when it is first asked about.
    """

    def __init__(self, ranker: Ranker, margin: float):
        self.ranker, self.margin, self.embeds = ranker, margin, {}

    @torch.no_grad()
    def rank(self, batch: list[Question], texts: list[list[str]]) -> Ranking:
        """P lists of G texts -> ranks and scores (P, G). Never fails. Identical texts tie."""
        groups = checked_groups(batch, texts)
        new = sorted({question.shown for question in batch} - self.embeds.keys())
        if new:
            self.embeds |= dict(zip(new, embed_videos(self.ranker.model, new)[0], strict=True))
        pairs = zip(batch, groups, strict=True)
        rows = [[(prompt_text(question), text) for text in group] for question, group in pairs]
        found = self.ranker(torch.stack([self.embeds[question.shown] for question in batch]), rows)
        if not found.isfinite().all():
            raise BadInput(
                "--ranker: its scores are not finite; make it anew with pretrain.py --stage ranker"
            )
        scores = []
        for group, values in zip(groups, found.tolist(), strict=True):
            score_of = dict(zip(group, values, strict=True))  # one score a text, so identical ones tie
            scores.append([score_of[text] for text in group])
        ranks = torch.tensor([tied_ranks(group, self.margin) for group in scores])
        return Ranking(ranks, scores=torch.tensor(scores, dtype=torch.float64))


def tied_ranks(scores: list[float], margin: float) -> list[int]:
    """Competition ranks, 0 = highest; a score at most `margin` below the first of a level belongs to it."""
    level_of, first = {}, float("inf")
    for score in sorted(set(scores), reverse=True):
        first = score if first - score > margin else first
        level_of[score] = -first
    return competition_ranks([level_of[score] for score in scores])
