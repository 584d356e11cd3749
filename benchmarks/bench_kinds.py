"""The kinds of step that the benchmark times: this suite's, as unlearn_harm.py takes it, and the published one."""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from bench_inputs import make_rows, model_of, parse_words, tokenizer_of

from engine.adapters import add_lora, enable_gradient_checkpointing, freeze, restrict_trainable
from engine.compiled_layers import KnownGraphs, compile_layers, why_not_compiled
from engine.optimizer import MasterWeightAdamW
from engine.prefetch import Prefetcher
from engine.reference import ReferenceCache
from engine.speedups import speed_up
from engine.tree import AnswerLogitsModel
from method.recipe import read_recipe
from method.sampler import UnlearnBatchSampler
from method.step import compute_gradients, prepare_step
from method.terms import draws_of, layers_of, sequences_needing_reference
from prompts.formatter import PromptFormatter


@dataclasses.dataclass
class StepFigures:
    """One step: seconds in all, and of them what the host launched, waited for the device, and had to prepare itself;
    tokens without padding, places with padding, logit rows."""

    seconds: float
    launch: float = 0.0
    wait: float = 0.0
    prepare: float = 0.0
    tokens: int = 0
    places: int = 0
    logit_rows: int = 0


def make_sampler(options, run, recipe) -> UnlearnBatchSampler:
    """Return the sampler of a run over the benchmark's rows."""
    forget, normal = make_rows(options.rows)
    sampler = UnlearnBatchSampler([forget], normal, draws_of(recipe.terms), seed=run.seed,
                                  steps=run.max_unlearn_steps, wording=recipe.wording)  # fmt: skip
    sampler.fill_responses(lambda rows, tokens: rows)
    return sampler


class OurStep:
    """A step as in unlearn_harm.py: plan on the host, one forward, fused head and losses, backward, update."""

    def __init__(self, options, dtype: torch.dtype, extra_answers: int = 0, optimizer: str = "adamw"):
        self.run = run = parse_words(options, extra_answers)
        self.recipe = recipe = read_recipe(run)
        self.accelerator = Accelerator(mixed_precision="no", cpu=options.device == "cpu")
        self.device = device = self.accelerator.device
        tokenizer = tokenizer_of(options)
        self.formatter = PromptFormatter(tokenizer, "auto" if run.method == "selective" else "qa", 512,
                                         run.max_answer_tokens)  # fmt: skip
        self.sampler = make_sampler(options, run, recipe)
        # a base that is not trained keeps no fp32 rests, so it can come as it is stored: in 16 bits
        stored = dtype if run.use_lora and device.type == "cuda" else torch.float32
        self.model = model = model_of(options, device, stored)
        speed_up(model)
        frozen = freeze(model, recipe.trainable.frozen_layers)
        if run.use_lora:
            add_lora(model, recipe.lora, frozen)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        restrict_trainable(model, recipe.trainable.parameters)
        if run.gradient_checkpointing:
            enable_gradient_checkpointing(model, recipe.trainable.frozen_layers)
        self.optimizer = MasterWeightAdamW(model, dataclasses.replace(recipe.optimizer, kind=optimizer), dtype)
        self.answer_model = AnswerLogitsModel(model, packed=True)
        self.compiled = not why_not_compiled(model, run.compile, 1000)
        self.graphs = KnownGraphs(trusted=True) if self.compiled and options.known_graphs else None
        if self.compiled:
            compile_layers(model, leave=layers_of(recipe.terms))
        scheduled = [s for step in range(self.sampler.steps) for s in self.sampler.sequences(step, self.formatter)]
        self.reference = ReferenceCache(
            self.answer_model, sequences_needing_reference(scheduled, recipe.terms), recipe.layout.pack_tokens,
            tokenizer.pad_token_id, layers=layers_of(recipe.terms),
        )  # fmt: skip
        self.prefetcher = Prefetcher(self.prepare, ahead=device.type != "cpu")
        self.ended = time.perf_counter()

    def prepare(self, step: int):
        """Return a step as the host prepares it."""

        def layout(sequences):
            return self.answer_model.layout(
                sequences, self.recipe.layout.pack_tokens, self.formatter.tokenizer.pad_token_id
            )

        sequences = self.sampler.sequences(step, self.formatter)
        return prepare_step(sequences, self.recipe.terms, layout, self.reference, self.accelerator, num_parts=1)

    def __call__(self, step: int) -> StepFigures:
        started = time.perf_counter()
        self.prepared = prepared = self.prefetcher.get(step)
        got = time.perf_counter()
        sums = compute_gradients(
            prepared, self.recipe.terms, self.answer_model, self.accelerator, sharded=False, signalled=False,
            graphs=self.graphs,
        )  # fmt: skip
        norm = self.optimizer.grad_norm()
        if step + 1 < self.sampler.steps:
            self.prefetcher.start(step + 1)
        launched = time.perf_counter()
        stats = sums.read(norm)
        read = time.perf_counter()
        if norm is None:
            self.optimizer.step()
        else:
            self.optimizer.step(stats.grad_norm)
        done = time.perf_counter()
        seconds, self.ended = done - self.ended, done
        (part,) = prepared.parts
        batch = part.plan.batch
        return StepFigures(seconds, launched - got + done - read, read - launched, got - started, batch.num_tokens,
                           batch.input_ids.numel(), len(batch.logit_positions))  # fmt: skip

    def checked(self) -> float | None:
        """Return by which fraction the last step's gradient norm changes without the graphs' checks; None if the steps
        so far had one width, since nothing is left out then."""
        if len(self.graphs.widths) < 2:
            return None
        norms = []
        for graphs in (None, self.graphs):
            compute_gradients(
                self.prepared, self.recipe.terms, self.answer_model, self.accelerator, sharded=False,
                signalled=False, graphs=graphs,
            )  # fmt: skip
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            parts = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            norms.append(torch.stack(parts).norm().item())
            del gradients
            self.optimizer.drop_gradients()
        return abs(norms[1] / norms[0] - 1)


class PublishedStep:
    """Yao et al.'s published step, without its mistakes: four forwards of padded rows, full logits."""

    compiled = False

    def __init__(self, options):
        run = parse_words(options, 0)
        recipe = read_recipe(run)
        self.sampler = make_sampler(options, run, recipe)
        tokenizer = tokenizer_of(options)
        self.pad_id = tokenizer.pad_token_id
        self.formatter = PromptFormatter(tokenizer, "qa", 512, options.answer_tokens)
        self.device = torch.device(options.device)
        self.model = model_of(options, self.device, torch.float32)
        self.original = model_of(options, self.device, torch.float32).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.optimizer.lr)

    def padded(self, sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (ids (R, T), attention mask (R, T), answer mask (R, T))."""
        width = max(len(s.prompt_ids) + len(s.answer_ids) for s in sequences)
        ids = torch.full((len(sequences), width), self.pad_id)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
        for r, s in enumerate(sequences):
            start, end = len(s.prompt_ids), len(s.prompt_ids) + len(s.answer_ids)
            ids[r, :end] = torch.tensor(s.prompt_ids + s.answer_ids)
            mask[r, :end], answer[r, start:end] = 1, 1
        return ids.to(self.device), mask.to(self.device), answer.to(self.device)

    def answer_loss(self, sequences) -> torch.Tensor:
        """Return the mean NLL of the answer tokens."""
        ids, mask, answer = self.padded(sequences)
        logits = self.model(input_ids=ids, attention_mask=mask).logits  # (R, T, V)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (loss * answer[:, 1:].flatten()).sum() / answer.sum()

    def kl(self, sequences) -> torch.Tensor:
        """Return the published KL: the cross-entropy to the original, over all tokens."""
        ids, mask, _ = self.padded(sequences)
        with torch.no_grad():
            original = self.original(input_ids=ids, attention_mask=mask).logits.softmax(-1)  # (R, T, V)
        model = self.model(input_ids=ids, attention_mask=mask).logits.softmax(-1)
        return -(original * torch.log(model + 1e-12)).sum(-1).mean()

    def __call__(self, step: int) -> StepFigures:
        started = time.perf_counter()
        step_sequences = self.sampler.sequences(step, self.formatter)
        draws = {draw: [s for s in step_sequences if s.draw == draw] for draw in ("forget", "mismatch", "retain")}
        loss = -0.5 * self.answer_loss(draws["forget"]) + self.answer_loss(draws["mismatch"]) + self.kl(draws["retain"])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return StepFigures(time.perf_counter() - started, tokens=sum(s.length for s in step_sequences))


PUBLISHED, OURS, OURS_FP32 = "published, fp32", "this suite, bf16", "this suite, fp32"
ONE_MORE = "this suite, bf16, K + 1"
KINDS = {
    PUBLISHED: PublishedStep,
    OURS: lambda options: OurStep(options, torch.bfloat16),
    OURS_FP32: lambda options: OurStep(options, torch.float32),
    "this suite, bf16, adamw8bit": lambda options: OurStep(options, torch.bfloat16, optimizer="adamw8bit"),
    ONE_MORE: lambda options: OurStep(options, torch.bfloat16, extra_answers=1),
}
