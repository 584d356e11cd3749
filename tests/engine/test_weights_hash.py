"""What an evaluation takes for the same model: answers of an earlier one stand in wherever the hash is the same."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.weights_hash import weights_hash

ROWS = torch.arange(6.0).reshape(3, 2)


def write_model(folder: Path, rows: torch.Tensor = ROWS) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"rows": rows.contiguous()}, folder / "model.safetensors")
    return str(folder)


def change_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    made_later(file)


def made_later(file: Path) -> None:
    """As a file of another second: clocks of file systems are coarse, and these tests are not."""
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 1))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modeling_own.py"])
def test_one_changed_byte_is_another_model(tmp_path, name):
    model = write_model(tmp_path / "model")
    (tmp_path / "model/modeling_own.py").write_text("x = 1\n")
    first = weights_hash(model)
    change_last_byte(tmp_path / "model" / name)
    assert weights_hash(model) != first


def test_swapped_rows_are_another_model_and_a_copy_is_the_same(tmp_path):
    first = weights_hash(write_model(tmp_path / "a"))
    assert weights_hash(write_model(tmp_path / "copy")) == first
    assert weights_hash(write_model(tmp_path / "swapped", ROWS[[1, 0, 2]])) != first


def test_an_adapter_is_another_model_on_another_base(tmp_path):
    write_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    save_file({"lora": ROWS}, adapter / "adapter_model.safetensors")
    first = weights_hash(str(adapter))
    assert first != weights_hash(str(tmp_path / "base"))
    write_model(tmp_path / "base", ROWS + 1)
    made_later(tmp_path / "base/model.safetensors")
    second = weights_hash(str(adapter))
    save_file({"lora": ROWS + 1}, adapter / "adapter_model.safetensors")
    made_later(adapter / "adapter_model.safetensors")
    assert len({first, second, weights_hash(str(adapter))}) == 3


def test_a_model_that_stays_as_it_was_is_read_once(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    first = weights_hash(model)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read again"))
    assert weights_hash(model) == first
