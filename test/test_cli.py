"""The commands `liger-kernel demo`, `compare` and `env`."""

import importlib.metadata
import json
import sys
import types

import pytest
import torch

from liger_kernel import __version__, backends, env_report
from liger_kernel.cli import UserError, compare, demo, main, plot, report, text, train
from liger_kernel.cli.memory import Meter
from liger_kernel.ops import core

transformers = pytest.importorskip("transformers")

VOCABULARY = 400


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A text file of a few thousand words."""
    path = tmp_path_factory.mktemp("data") / "story.txt"
    path.write_text("".join(f"the {n} small birds of day {n % 7} sang to the {n % 5} cats\n" for n in range(400)))
    return path


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory):
    """A tiny Llama saved without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory, bare_model, story):
    """The same with a tokenizer trained on the story."""
    folder = tmp_path_factory.mktemp("model")
    for file in bare_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = text.train_tokenizer([story.read_text()], VOCABULARY, lambda: None)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)
    return folder


def result(**changes):
    given = dict(
        losses=[3.0, 2.5, 2.0, 1.5], seconds=[9.0, 1.0, 1.0, 1.0], peak=2_000_000_000, head=800_000_000,
        memory="allocated", parameters=10, modules=5,
    )  # fmt: skip
    return train.Result(**(given | changes))


def fails(capsys, *argv):
    """The one sentence on stderr of a command that must end with exit code 2."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("liger-kernel: ") and said.err.count("\n") == 1, said.err
    return said.err


# compare


def test_compare_trains_the_same_model_twice(model, story, tmp_path, capfd):
    folder = tmp_path / "new"
    argv = ["compare", "--model", model, "--data", story, "--batch", 2, "--seq", 64, "--steps", 12, "--output", folder]
    assert main([*map(str, argv), "--device", "cpu"]) == 0
    said = capfd.readouterr().out
    for words in ("tokens per second", "peak memory", "memory of the loss head", "final loss", "largest loss diff"):
        assert words in said
    figures = json.loads((folder / "liger-compare.json").read_text())
    plain, patched = figures["plain"], figures["patched"]
    assert len(plain["losses"]) == len(patched["losses"]) == 12
    # Equal mathematics in fp32, another order of additions, twelve small optimiser steps.
    assert max(abs(a - b) for a, b in zip(plain["losses"], patched["losses"])) < 1e-4
    assert sum(plain["losses"][-4:]) < sum(plain["losses"][:4]), "nothing was learned, so nothing was compared"
    assert (plain["modules"], patched["modules"] > 0) == (0, True)
    assert sorted(p.name for p in folder.iterdir()) == ["liger-compare.json", "liger-compare.png"]
    assert (folder / "liger-compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_claims_no_gain_where_nothing_was_patched(model, story, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_DISABLE", "1")
    monkeypatch.setattr(compare, "run_worker", lambda job, scratch, advance: train.train(job))
    argv = ["compare", "--model", model, "--data", story, "--batch", 1, "--seq", 8, "--steps", 1, "--device", "cpu"]
    assert main([*map(str, argv), "--output", str(tmp_path / "new")]) == 2
    said = capfd.readouterr().out
    assert "Nothing was patched" in said and "LIGER_KERNEL_DISABLE is set" in said
    assert "times the speed" not in said and "same speed" not in said
    assert not (tmp_path / "new").exists()


def test_every_module_refused_says_why():
    refused = torch.nn.Sequential(torch.nn.Linear(4, 4))
    modules, why = train._patch(refused)
    assert modules == 0 and "head: its forward takes no labels" in why
    unpatched = result(modules=0, left=why, peak=1)
    for plain in (result(), None):
        said = report.sentence(plain, unpatched, 100, "cpu")
        assert "Nothing was patched" in said and why in said and "memory" not in said
        assert not any("%" in cell for cell in report.table(plain, unpatched, 100).columns[3].cells)


LIMITED = """
import resource, sys
from pathlib import Path
import torch, transformers.models.llama.modeling_llama
from liger_kernel.cli import train
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
sys.exit(train.main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of the workers")
def test_both_runs_out_of_memory_leave_nothing_and_exit_2(model, story, tmp_path, capfd, monkeypatch):
    """2^20 tokens per step take some GB; the workers may have one."""
    monkeypatch.setattr(compare, "WORKER", ["-c", LIMITED])
    argv = ["compare", "--model", model, "--data", story, "--seq", 128, "--steps", 1, "--output", tmp_path / "new"]
    assert main([*map(str, argv), "--batch", str(2**13), "--device", "cpu"]) == 2
    assert "Both runs were out of memory" in capfd.readouterr().out
    assert not (tmp_path / "new").exists()


def test_a_run_out_of_memory_is_a_result():
    alone = report.sentence(None, result(peak=1_500_000_000), 100, "cpu")
    assert "transformers alone is out of memory" in alone and "fits in 1.50 GB" in alone
    assert "liger_kernel the run was out of memory" in report.sentence(result(), None, 100, "cpu")
    made = report.table(None, result(), 100)
    assert list(made.columns[1].cells)[:4] == ["out of memory"] * 4


def test_a_worker_that_the_system_killed_was_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "WORKER", ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert compare.run_worker(job(), tmp_path, lambda: None) is None


def test_a_worker_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "WORKER", ["-c", "raise ValueError('no such thing')"])
    with pytest.raises(UserError, match="the run of transformers alone failed: ValueError: no such thing"):
        compare.run_worker(job(), tmp_path, lambda: None)


def job(**changes):
    given = dict(model="m", tokens="", batch=1, seq=8, steps=1, device="cpu", dtype="float32", lr=1e-3)
    return train.Job(**(given | changes))


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert train._out_of_memory(error) is expected


# Bad input


def test_missing_file(capsys, model):
    assert "there is no file nowhere.txt" in fails(capsys, "compare", "--model", model, "--data", "nowhere.txt")


def test_empty_file(capsys, model, tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    assert "is empty" in fails(capsys, "compare", "--model", model, "--data", path)


def test_file_without_text(capsys, model, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("\n\n  \n")
    assert "holds no text" in fails(capsys, "compare", "--model", model, "--data", path)


def test_unknown_kind_of_file(capsys, model, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n")
    assert "is none of .txt, .jsonl, .parquet" in fails(capsys, "compare", "--model", model, "--data", path)


def test_file_that_is_not_text(capsys, model, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not UTF-8 text" in fails(capsys, "compare", "--model", model, "--data", path)


def test_unknown_field_lists_the_known_ones(capsys, model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    assert "has no field 'text'; it has answer, prompt" in fails(capsys, "compare", "--model", model, "--data", path)


def test_unknown_field_of_parquet_lists_the_known_ones(capsys, model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), path)
    said = fails(capsys, "compare", "--model", model, "--data", path, "--text-field", "story")
    assert "has no field 'story'; it has answer, prompt" in said


def test_field_that_is_not_text(capsys, model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ["a"]}\n')
    assert "holds list, not text" in fails(capsys, "compare", "--model", model, "--data", path)


def test_line_that_is_not_json(capsys, model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 of" in fails(capsys, "compare", "--model", model, "--data", path)


def test_text_shorter_than_a_sequence(capsys, model, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("the birds")
    assert "fewer than one sequence of 512" in fails(capsys, "compare", "--model", model, "--data", path)


def test_unknown_model(capsys, story, tmp_path):
    said = fails(capsys, "compare", "--model", tmp_path / "nowhere", "--data", story)
    assert "cannot find a model at" in said


def test_model_that_is_not_a_causal_lm(capsys, story, tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    said = fails(capsys, "compare", "--model", tmp_path, "--data", story)
    assert "is of type 'vit', which is not a causal language model" in said


def test_model_without_tokenizer(capsys, story, bare_model):
    assert "has no tokenizer" in fails(capsys, "compare", "--model", bare_model, "--data", story)


def test_tokenizer_of_another_model(capsys, story, model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 16}))
    assert "the model has 16 of them" in fails(capsys, "compare", "--model", tmp_path, "--data", story)


def test_unusable_device(capsys, story, model):
    said = fails(capsys, "compare", "--model", model, "--data", story, "--device", "moon")
    assert "device 'moon' cannot be used" in said


def test_device_without_values(capsys, story, model):
    """A tensor can be made on "meta"; nothing can be trained there."""
    said = fails(capsys, "compare", "--model", model, "--data", story, "--device", "meta")
    assert "device 'meta' cannot be used" in said


def test_output_that_is_a_file(capsys, story, model):
    said = fails(capsys, "compare", "--model", model, "--data", story, "--output", story / "deeper")
    assert "cannot write into" in said


@pytest.mark.parametrize("argv", [["demo", "--steps", "0"], ["demo", "--batch", "x"], ["compare"], []])
def test_bad_arguments_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "liger_kernel.cli.compare")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "pip install 'liger-kernel[train]'" in fails(capsys, "compare", "--model", "m", "--data", "d")


# Data


def test_parquet_and_jsonl_give_the_same_texts(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one"}, {"text": None}, {"text": "two\nlines"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    texts = [list(text.read(tmp_path / name, "text")) for name in ("a.parquet", "a.jsonl")]
    assert texts == [["one", "", "two\nlines"]] * 2


def test_a_large_file_is_read_no_further_than_needed():
    def texts():
        yield "abc"
        yield "def"
        raise AssertionError("read too far")

    assert text.tokens(texts(), lambda t: [ord(c) for c in t], 5, "a file") == [97, 98, 99, 100, 101]


def test_a_short_text_is_read_again(tmp_path):
    torch.save(torch.arange(25), tmp_path / "tokens.pt")
    batches = train._batches(job(tokens=str(tmp_path / "tokens.pt"), batch=2, steps=9), torch.device("cpu"))
    assert [b[:, 0].tolist() for b in batches] == [[0, 8], [16, 0], [8, 16]]  # then the cycle is complete


def test_standard_library_is_real_text_in_one_order():
    texts = text.standard_library()
    assert texts == text.standard_library()
    assert any("class OrderedDict" in t for t in texts)


def test_demo_takes_a_larger_model_where_there_is_more_memory():
    hidden = [demo.size_for(gb)[0]["hidden_size"] for gb in (80, 40, 39.9, 12, 11.9, 0)]
    assert hidden == [2048, 2048, 1024, 1024, 256, 256]


def test_demo_trains_on_the_standard_library(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(demo, "SIZES", ((0, dict(num_hidden_layers=1, hidden_size=64), 2, 32),))
    monkeypatch.setattr(demo, "VOCABULARY", VOCABULARY)
    every = text.standard_library()
    monkeypatch.setattr(text, "standard_library", lambda: every[:20])  # enough for two steps
    assert main(["demo", "--device", "cpu", "--steps", "2", "--output", str(tmp_path / "new")]) == 0
    assert "A Llama with random weights" in capfd.readouterr().out
    figures = json.loads((tmp_path / "new" / "liger-demo.json").read_text())
    assert figures["job"]["tokens"] == 2 * 32 * 2 and figures["job"]["model"]["vocab_size"] == VOCABULARY
    plain, patched = figures["plain"], figures["patched"]
    assert len(plain["losses"]) == len(patched["losses"]) == 2
    # Equal mathematics in fp32, another order of additions, two optimiser steps.
    assert max(abs(a - b) for a, b in zip(plain["losses"], patched["losses"])) < 1e-4
    assert patched["modules"] >= 4  # three norms and the head at least
    assert (tmp_path / "new" / "liger-demo.png").read_bytes().startswith(b"\x89PNG")


# Measures


def test_training_the_demo_model_takes_at_most_60_percent_of_its_memory(tmp_path):
    """In fp32, as the demo runs on a CPU, at its 32768 words; the second step has the optimiser's state beside it."""
    size, batch, seq = demo.size_for(0)
    torch.manual_seed(0)
    torch.save(torch.randint(0, demo.VOCABULARY, (2 * batch * seq,)), tmp_path / "tokens.pt")
    given = dict(model=demo._llama(**size), tokens=str(tmp_path / "tokens.pt"), batch=batch, seq=seq, steps=2)
    peaks = [
        compare.run_worker(job(**given, patched=patched), tmp_path, lambda: None).peak for patched in (False, True)
    ]
    assert 0 < peaks[1] <= 0.6 * peaks[0], peaks


def test_meter_sees_a_tensor_that_is_gone():
    meter = Meter(torch.device("cpu"))
    torch.ones(64 << 20, dtype=torch.uint8)
    # Other threads of the process may touch a few MB of their own.
    assert 64e6 <= meter.peak() < 96e6
    meter.reset()
    assert meter.peak() < 32e6


def test_head_memory_is_that_of_the_logits():
    config = transformers.LlamaConfig(
        vocab_size=32768, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    batch = torch.randint(0, 32768, (4, 64))
    logits = 4 * 64 * 32768 * 4
    measured = train.head_memory(model, batch, Meter(torch.device("cpu")))
    # Logits, their log-softmax and a gradient exist at once; the backbone's part (2 % of that) is not counted.
    assert 2 * logits < measured < 5 * logits
    assert "forward" not in model.model.__dict__ and model.lm_head.weight.grad is None


def test_warm_up_is_not_timed():
    assert report.tokens_per_second(result(seconds=[50.0, 9.0, 9.0, 2.0, 2.0, 2.0]), 100) == 50
    assert report.settled([5.0]) == [5.0]


def test_sentence_says_what_was_lost_too():
    slower = result(seconds=[4.0] * 4, peak=2_200_000_000, head=400_000_000)
    said = report.sentence(result(seconds=[2.0] * 4), slower, 100, "cpu")
    assert "10 % more memory (50 % less in the loss head) at 0.50 times the speed" in said


def test_loss_difference_is_the_largest_along_the_run():
    assert report.loss_difference(result(losses=[1.0, 2.0]), result(losses=[1.5, 2.1])) == 0.5


def test_picture_with_a_run_out_of_memory(tmp_path):
    plot.save(None, result(), 100, tmp_path / "p")
    assert (tmp_path / "p").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def broken(beside):
        beside.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        compare.write(path, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"] and path.read_text() == "old"


# env


def test_env_says_what_runs_each_op_and_why(capsys, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_DEBUG", "1")
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    device_type = backends.current().device_type
    found = core.resolve("rms_norm", device_type)
    assert f"rms_norm on {device_type}: {found.source} ({found.why})" in said
    assert f"liger_kernel  {__version__}" in said
    assert f"torch         {importlib.metadata.version('torch')}" in said
    assert "LIGER_KERNEL_DEBUG=1" in said


def test_env_names_a_distribution_installed_over_ours(monkeypatch):
    names = {"liger_kernel": ["liger-kernel", "Liger_Kernel.Nightly"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: names)
    [said] = env_report.shadowing()
    assert "liger-kernel-nightly installs liger_kernel too" in said


def test_env_names_a_version_that_is_not_ours(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.5")
    assert "liger-kernel is version 0.8.5" in list(env_report.shadowing())[-1]


def test_env_names_a_backend_that_does_not_load(monkeypatch, capsys):
    monkeypatch.setitem(backends.failures, "acme.liger", "ImportError: no acme")
    assert main(["env"]) == 0
    assert "backend acme.liger could not be loaded: ImportError: no acme" in capsys.readouterr().out


def test_env_says_which_op_cannot_run(monkeypatch):
    def refuse(op, device_type):
        raise RuntimeError("no such device")

    monkeypatch.setattr(env_report, "core", types.SimpleNamespace(resolve=refuse))
    assert all("cannot run: no such device" in line for line in env_report.ops())
