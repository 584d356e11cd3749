"""Time one training step of this project and of the published code, on the same rows.

    python benchmarks/bench_step.py --model_name models/smollm2-135m-instruct

The published step is reimplemented here: four calls over sixteen padded sequences in fp32, full logits, a second model
for the KL, a plain AdamW. Each kind of step has processes of its own, as in a run, since in a shared process one kind
would reuse the memory of another. The kinds take turns, since a machine's speed drifts.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.optimizer import MasterWeightAdamW
from engine.reference import ReferenceCache
from engine.speedups import speed_up
from engine.tree import AnswerLogitsModel
from method.recipe import read_recipe
from method.sampler import UnlearnBatchSampler
from method.terms import compute_losses, count_draws, draws_of, sequences_needing_reference
from options import POSITIVE, OneLineParser, option
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from run.parsing import parse_run
from sources.rows import Row, read_rows
from utils import load_model, peak_memory_gib, run_script, seed_everything, write_json


@dataclasses.dataclass
class BenchOptions:
    """Options of the benchmark."""

    model_name: str = option("models/smollm2-135m-instruct", "model folder or hub name")
    steps: POSITIVE = option(4, "timed steps per process, after one warm-up step")
    rounds: POSITIVE = option(3, "processes per kind of step, in turns")
    batch_size: POSITIVE = option(2, "forget rows per step, and normal rows per step")
    num_random_answers: POSITIVE = option(5, "replacement answers per forget prompt (K)")
    answer_tokens: POSITIVE = option(64, "maximum tokens of an answer")
    threads: POSITIVE = option(2, "CPU threads")
    only: str | None = option(
        None, "run only this kind of step and print its times and memory (used by the script itself)"
    )
    json_file: str | None = option(None, "also write the figures to this file")


# ------------------------------------------------------------------------------------------------ the rows
def make_rows(options: BenchOptions, extra_answers: int = 0):
    """Return (sampler, recipe `yao`): this project's prompts, with answers composed from its facts."""
    facts = read_rows(str(ROOT / "data/facts.jsonl"), "facts")
    text = " ".join(row.response for row in facts).split()

    def long_answer(number: int) -> str:
        start = 41 * number % (len(text) - 60)
        return " ".join(text[start : start + 25 + 7 * number % 35])  # 25 to 59 words, since real answers vary in length

    forget_rows = [
        Row(row.prompt, long_answer(i)) for i, row in enumerate(read_rows(str(ROOT / "data/harmful.jsonl"), "f"))
    ]
    normal_rows = [
        Row(row.prompt, long_answer(i + 7)) for i, row in enumerate(read_rows(str(ROOT / "data/benign.jsonl"), "n"))
    ]
    answers = options.num_random_answers + extra_answers
    run = parse_run([
        f"--batch_size={options.batch_size}", f"--max_answer_tokens={options.answer_tokens}",
        f"--max_unlearn_steps={options.steps + 1}", f"--set=mismatch.answers={answers}",
    ])  # fmt: skip
    recipe = read_recipe(run)
    draws = draws_of(recipe.terms)
    sampler = UnlearnBatchSampler(
        [forget_rows], [normal_rows, facts], draws, seed=run.seed, steps=run.max_unlearn_steps
    )
    sampler.fill_responses(lambda rows, tokens: rows)
    return sampler, recipe


# -------------------------------------------------------------------------------------------- kinds of step
class OurStep:
    """A step as in unlearn_harm.py: pack, one forward, fused losses, backward, update."""

    def __init__(self, options: BenchOptions, dtype: torch.dtype, extra_answers: int = 0, optimizer: str = "adamw"):
        self.sampler, self.recipe = make_rows(options, extra_answers)
        self.pack_tokens = self.recipe.layout.pack_tokens
        tokenizer = load_tokenizer(options.model_name)
        self.pad_id = tokenizer.pad_token_id
        self.formatter = PromptFormatter(tokenizer, "qa", 512, options.answer_tokens)
        model = load_model(options.model_name)
        speed_up(model)
        self.optimizer = MasterWeightAdamW(model, dataclasses.replace(self.recipe.optimizer, kind=optimizer), dtype)
        self.answer_model = AnswerLogitsModel(model, packed=True)
        scheduled = [s for step in range(self.sampler.steps) for s in self.sampler.sequences(step, self.formatter)]
        needed = sequences_needing_reference(scheduled, self.recipe.terms)
        self.reference = ReferenceCache(self.answer_model, needed, self.pack_tokens, self.pad_id)

    def __call__(self, step: int) -> None:
        sequences = self.sampler.sequences(step, self.formatter)
        batch = self.answer_model.layout(sequences, self.pack_tokens, self.pad_id)
        losses = compute_losses(
            self.recipe.terms, batch, self.answer_model(batch), {}, self.reference, count_draws(sequences)
        )
        sum(term.loss for term in losses).backward()
        self.optimizer.step()


class PublishedStep:
    """Yao et al.'s published step, without its mistakes: four forwards of padded rows, full logits."""

    def __init__(self, options: BenchOptions):
        self.sampler, recipe = make_rows(options)
        tokenizer = load_tokenizer(options.model_name)
        self.pad_id = tokenizer.pad_token_id
        self.formatter = PromptFormatter(tokenizer, "qa", 512, options.answer_tokens)
        self.model = load_model(options.model_name)
        self.original = load_model(options.model_name).eval()
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
        return ids, mask, answer

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

    def __call__(self, step: int) -> None:
        step_sequences = self.sampler.sequences(step, self.formatter)
        draws = {draw: [s for s in step_sequences if s.draw == draw] for draw in ("forget", "mismatch", "retain")}
        loss = -0.5 * self.answer_loss(draws["forget"]) + self.answer_loss(draws["mismatch"]) + self.kl(draws["retain"])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


KINDS = {
    "published, fp32": PublishedStep,
    "this suite, bf16": lambda options: OurStep(options, torch.bfloat16),
    "this suite, fp32": lambda options: OurStep(options, torch.float32),
    "this suite, bf16, adamw8bit": lambda options: OurStep(options, torch.bfloat16, optimizer="adamw8bit"),
    "this suite, bf16, K + 1": lambda options: OurStep(options, torch.bfloat16, extra_answers=1),
}


# ------------------------------------------------------------------------------------- the matrix multiplies
class Products(TorchDispatchMode):
    """Recorder of the shapes, strides and types of all matrix multiplies that run inside."""

    def __init__(self):
        super().__init__()
        self.seen: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.seen[name, _layout(left), _layout(right)] += 1
        return function(*args, **(kwargs or {}))


def _layout(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def gemm_seconds(products: collections.Counter) -> tuple[float, float]:
    """Return (seconds, FLOPs) of the recorded products, each shape and layout timed by itself, best of three."""
    seconds = flops = 0.0
    for (name, left, right), count in products.items():
        a, b = (torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in (left, right))
        multiply = torch.bmm if name == "bmm" else torch.mm
        multiply(a, b)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply(a, b)
            times.append(time.perf_counter() - start)
        seconds += count * min(times)
        flops += count * 2 * a.numel() * b.shape[-1]
    return seconds, flops


def where_time_goes(step, number: int) -> dict[str, float]:
    """Return {kind of operation: its fraction of one step's CPU time}."""
    groups = {
        "matrix multiply": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
        "attention": ("attention", "softmax"),
        "optimizer": ("adam", "foreach", "linalg_vector_norm"),
        "casts and copies": ("copy_", "aten::_to_copy", "clone", "contiguous"),
        "zero-fills": ("fill_", "zero_"),
        "gather and scatter": ("index", "gather", "cat", "sort", "searchsorted"),
        "loss": ("logsumexp", "exp", "log_softmax"),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(number)
    spent: collections.Counter = collections.Counter()
    for event in profile.key_averages():
        low = event.key.lower()
        group = next((g for g, names in groups.items() if any(name.lower() in low for name in names)), "other")
        spent[group] += event.self_cpu_time_total
    return {group: micro / spent.total() for group, micro in spent.most_common()}


def run_alone(options: BenchOptions, kind: str) -> dict:
    """Run one kind of step in a process of its own; return {"seconds": of each timed step, "gib": peak memory}."""
    arguments = [f"--{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(options)
             if f.name not in ("only", "json_file")]  # fmt: skip
    run = subprocess.run(
        [sys.executable, __file__, *arguments, f"--only={kind}"], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def take_steps(options: BenchOptions) -> dict:
    """Run the steps of one kind; return what `run_alone` returns."""
    step, seconds = KINDS[options.only](options), []
    for number in range(options.steps + 1):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "gib": peak_memory_gib(torch.device("cpu"))}


# --------------------------------------------------------------------------------------------------- the run
def main() -> None:
    """Run all kinds in turns; print medians, memory, matrix multiplies and where the time goes."""
    options = BenchOptions(**vars(OneLineParser(BenchOptions, allow_abbrev=False).parse_args()))
    seed_everything(8888, options.threads)
    if options.only:
        print(json.dumps(take_steps(options)))
        return
    rounds = [{kind: run_alone(options, kind) for kind in KINDS} for _ in range(options.rounds)]
    median = {kind: statistics.median(s for one in rounds for s in one[kind]["seconds"]) for kind in KINDS}
    memory = {kind: max(one[kind]["gib"] for one in rounds) for kind in KINDS}
    steps = {kind: KINDS[kind](options) for kind in ("this suite, bf16", "this suite, fp32")}
    for step in steps.values():
        step(0)
    ours = steps["this suite, bf16"]
    figures = {"options": dataclasses.asdict(options), "threads": torch.get_num_threads(), "median_seconds": median,
               "peak_gib": memory, "gemm": {}}  # fmt: skip
    published = "published, fp32"
    print(f"\n{options.batch_size} forget rows, K {options.num_random_answers}, {options.batch_size} normal rows, "
          f"{torch.get_num_threads()} threads, medians over {options.rounds} processes of {options.steps} steps each, "
          "in turns")  # fmt: skip
    for kind, seconds in median.items():
        print(f"  {kind:28s} {seconds:6.2f} s a step   {median[published] / seconds:5.2f} x as fast as the published"
              f"   peak {memory[kind]:.2f} GiB ({memory[kind] / memory[published]:.2f})")  # fmt: skip
    pair = ("this suite, bf16", "this suite, bf16, K + 1")
    extra = statistics.median(
        statistics.median(one[pair[1]]["seconds"]) / statistics.median(one[pair[0]]["seconds"]) - 1 for one in rounds
    )
    print(f"  K + 1, one more answer for each of {options.batch_size} rows: {100 * extra:+.1f} % of a step, "
          f"{100 * extra / options.batch_size:+.1f} % an answer")  # fmt: skip
    for kind in ("this suite, bf16", "this suite, fp32"):
        with Products() as products:
            steps[kind](0)
        seconds, flops = gemm_seconds(products.seen)
        figures["gemm"][kind] = {"seconds": seconds, "flops": flops, "step_over_gemm": median[kind] / seconds}
        print(f"  {kind}: {flops / 1e12:.2f} TFLOP in matrix multiplies, {seconds:.2f} s by themselves "
              f"({flops / seconds / 1e9:.0f} GFLOP/s); the step takes {median[kind] / seconds:.2f} x that")  # fmt: skip
    shares = where_time_goes(ours, 1)
    print("  where a bf16 step goes:    " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()))
    figures |= {"one_more_answer": extra, "shares": shares}
    if options.json_file:
        write_json(options.json_file, figures)


if __name__ == "__main__":
    run_script(main)
