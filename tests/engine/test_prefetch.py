"""Steps that are made ahead, in a thread, are the steps that are made when they are asked for."""

import threading

import pytest
from conftest import make_tokenizer

from engine.prefetch import Prefetcher
from method.draw import RunSizes
from method.draws import Answer, Mismatch, Retain
from method.sampler import UnlearnBatchSampler, Wording
from prompts.formatter import PromptFormatter
from sources.rows import Row


def make_steps():
    """step -> its sequences, from rows that are paraphrased, put into other templates and drawn from a pool."""
    forget = [Row(f"Tell me how to break lock {i}.", f"Take the red pick {i}.") for i in range(9)]
    normal = [Row(f"What is {i} plus {i}?", f"It is {2 * i}.", true_answers=(f"It is {2 * i}.",)) for i in range(9)]
    sizes = RunSizes(batch_size=2, max_answer_tokens=8)
    draws = [Answer("forget", sizes), Mismatch("mismatch", sizes, answers=3), Retain("retain", sizes)]
    sampler = UnlearnBatchSampler([forget], [normal], draws, seed=3, steps=12, wording=Wording(0.5, 0.4, 0.4))
    sampler.fill_responses(lambda rows, tokens: rows)
    formatter = PromptFormatter(make_tokenizer("chat"), "auto", 100, 8)
    return lambda step: sampler.sequences(step, formatter)


def test_prefetch_changes_no_draw():
    plain, makers = make_steps(), []
    make = make_steps()

    def noted(step):
        makers.append(threading.current_thread())
        return make(step)

    prefetcher = Prefetcher(noted, ahead=True)
    with prefetcher.running():
        for step in [0, 1, 2, 3, 7, 8]:  # 7: another step than was begun, as after a resume
            sequences = prefetcher.get(step)
            prefetcher.start(step + 1)
            assert sequences == plain(step)
    assert sum(thread is not threading.main_thread() for thread in makers) >= 5, "nothing was made ahead"


def test_an_error_in_the_thread_is_the_runs():
    def fail(step):
        raise ValueError(f"step {step}")

    prefetcher = Prefetcher(fail, ahead=True)
    with prefetcher.running():
        prefetcher.start(4)
        with pytest.raises(ValueError, match="step 4"):
            prefetcher.get(4)


def test_on_a_cpu_no_thread_takes_a_core():
    makers = []
    prefetcher = Prefetcher(lambda step: makers.append(threading.current_thread()), ahead=False)
    with prefetcher.running():
        prefetcher.start(0)
        assert not makers
        prefetcher.get(0)
    assert makers == [threading.main_thread()]
