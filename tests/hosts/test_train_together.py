"""Two processes that train one model together."""

import json

import numpy as np
import pytest
from helpers import training_runs
from helpers.processes import finish, free_port, start
from helpers.programs import path_of

import lsjax

CONFIG = training_runs.CONFIG | {"num_key_value_heads": 2, "tie_word_embeddings": False}


@pytest.mark.slow("steps on meshes and runs of two processes are tested apart")
def test_together_they_train_and_write_one_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    ids = [[(7 * i + i * j) % 264 for j in range(33)] for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    folder = tmp_path / "out"
    flags = [
        f"--config={tmp_path / 'config.json'}", f"--data={tmp_path / 'data.jsonl'}",
        f"--eval_data={tmp_path / 'data.jsonl'}", "--seq_length=32", "--batch_size=2", "--steps=6",
        "--learning_rate=1e-2", "--mesh=context=2,model=2", f"--output_dir={folder}",
        f"--coordinator_address=localhost:{free_port()}", "--num_processes=2",
    ]  # fmt: skip
    program = path_of("train.py")
    both = [start(program, *flags, f"--process_id={i}", devices=2) for i in range(2)]
    said = [finish(process) for process in both]
    assert [one.returncode for one in said] == [0, 0], said
    assert ["done: the model is in" in one.stdout for one in said] == [True, False]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    before, after = [line["eval_losses"]["32"] for line in lines if "eval_losses" in line]
    assert after < before
    assert np.mean(lsjax.load(folder / "model").token_nll(ids)) == pytest.approx(after, rel=1e-5)
