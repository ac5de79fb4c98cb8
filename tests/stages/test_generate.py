"""`hedgehog generate`: it answers a text of the user's with the models that evaluate scores, as evaluate does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hedgehog.pipeline import answer_screen, answers, cli, text_stream
from hedgehog.pipeline.answers import Answer, Question, answer, open_variants
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import dump_resolved, load_config
from hedgehog.pipeline.data.base_fingerprint import fingerprint_tokenizer
from hedgehog.pipeline.data.tokenize import load_tokenizer
from hedgehog.pipeline.errors import ConfigError
from hedgehog.pipeline.manifest import describe_artifact, read_manifest
from hedgehog.pipeline.row_log import read_complete_rows
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.runner import run_stage
from hedgehog.pipeline.text_stream import TextStream

VARIANTS = ("main", "softmax", "zero_shot")
TEXT = "Ida: Zoë's café opens today 😀 Jon: Let's go"


def invoke(*arguments: Any, code: int = 0, **options: Any) -> Any:
    done = CliRunner().invoke(cli.app, ["generate", *map(str, arguments)], **options)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def root(config: RunConfig) -> Path:
    return RunFolder.of(config).root


def write_config(config: RunConfig) -> None:
    """As a run that `hedgehog run` made has it: with the inputs that these runs are given ready-made."""
    model = config.model.model_copy(update={"base": "base"})
    data = config.data.model_copy(update={"train_file": "train.json", "test_file": "test.json"})
    text = dump_resolved(config.model_copy(update={"model": model, "data": data}))
    RunFolder.of(config).config_file.write_text(text)


@pytest.fixture
def run(copied_run: RunConfig) -> Path:
    write_config(copied_run)
    return root(copied_run)


def answered(run: Path, text: str = TEXT, *overrides: str, variant: str = "main", **options: Any) -> Answer:
    (found,) = answer(Question(text), open_variants(str(run), [variant], overrides), **options)
    return found


def edit_manifest(run: Path, stage: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = run / stage / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_answers_are_the_predictions_of_evaluate(copied_run: RunConfig) -> None:
    """Evaluate's batches are of three; the model computes in float32."""
    run_stage(copied_run, "evaluate")
    write_config(copied_run)
    folder = root(copied_run)
    rows = [json.loads(line) for line in (folder / "prepare" / "examples_test.jsonl").read_text().splitlines()]
    predictions = {name: read_complete_rows(folder / "evaluate" / "predictions" / f"{name}.jsonl") for name in VARIANTS}
    options = [word for name in VARIANTS for word in ("--variant", name)]
    for index, row in enumerate(rows):
        given = ("--text", row["prompt"], "--raw") if index % 2 else ("--text", f"\r\n {row['dialogue']} ")
        found = [json.loads(line) for line in invoke(folder, *given, *options, "--json").stdout.splitlines()]
        assert [entry["variant"] for entry in found] == list(VARIANTS)
        for entry in found:
            expected = predictions[entry["variant"]][index]
            assert entry["text"] == expected["prediction"]
            assert (entry["num_new_tokens"], entry["truncated"]) == (expected["num_tokens"], expected["truncated"])


def test_standard_output_has_the_text_and_nothing_else(run: Path) -> None:
    expected = json.loads(invoke(run, "--text", TEXT, "--json").stdout)
    assert expected["text"] and expected["num_prompt_tokens"] == 1 + len(f"{TEXT}\n=>".encode())
    done = invoke(run, "--text", TEXT)
    assert done.stdout == expected["text"] + "\n"
    assert done.stderr.startswith("linear attention: torch (no compiled kernel for cpu")
    assert f"main: {expected['num_prompt_tokens']} tokens read, {expected['num_new_tokens']} made" in done.stderr
    assert "cut at evaluate.max_new_tokens" in done.stderr and expected["truncated"]
    assert len(done.stderr.splitlines()) == 2, "what libraries say is nobody's business"
    both = invoke(run, "--text", TEXT, "--variant", "softmax", "--variant", "main", "--variant", "main").stdout
    assert both.startswith("softmax + LoRA:\n") and both.endswith(f"\n\nmain:\n{expected['text']}\n\n")


def test_the_text_may_come_from_a_file_or_standard_input(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "dialogue.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.replace(" Jon", "\r\nJon").encode())
    expected = invoke(run, "--text", TEXT.replace(" Jon", "\nJon")).stdout
    assert invoke(run, "--file", file).stdout == expected
    for option in ([], ["--file", "-"]):
        assert invoke(run, *option, input=file.read_bytes()).stdout == expected


def test_a_text_is_said_as_its_tokens_come(run: Path) -> None:
    """Here each byte is a token: no half of a character is shown, and no blank around the text."""
    tokenizer = load_tokenizer(str(run / "prepare" / "base_model"))
    text = "  Zoë: 😀  a\n b. \n"
    (token_ids,) = tokenizer([text], add_special_tokens=False).input_ids
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 5, 6]]))
    for token_id in [*token_ids, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token_id]))
    stream.end()
    assert pieces == ["Z", "o", "ë", ":", " 😀", "  a", "\n b", "."]


def test_a_long_text_costs_no_more_a_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(run / "prepare" / "base_model"))
    most = []
    stream = TextStream(tokenizer, lambda piece: None)
    monkeypatch.setattr(stream, "_decode", lambda ids: most.append(len(ids)) or tokenizer.decode(ids))
    stream.put(torch.tensor([[1]]))
    (token_ids,) = tokenizer(["a b " * 500], add_special_tokens=False).input_ids
    for token_id in token_ids:
        stream.put(torch.tensor([token_id]))
    assert len(token_ids) == 2000 and max(most) <= 2


def test_pieces_make_the_text(run: Path) -> None:
    pieces: list[str] = []
    found = answered(run, TEXT, "evaluate.max_new_tokens=200", say=pieces.append)
    assert "".join(pieces) == found.text and len(pieces) > 50
    assert found.num_new_tokens == 200 and 0 < (found.first_token_s or 0) < found.seconds
    assert found.tokens_per_s == pytest.approx(199 / (found.seconds - found.first_token_s))


def test_what_is_kept_between_tokens(run: Path) -> None:
    """Linear: a sum for each of 2 layers and 4 heads, F = 16, V = 8. Softmax: keys and values of 2 heads, and grows."""
    for text in ("a", 50 * "long "):
        for beams in (1, 2):
            found = answered(run, text, f"evaluate.num_beams={beams}")
            assert found.state_bytes == 2 * 4 * 16 * (8 + 1) * 4
        found = answered(run, text, variant="softmax")
        num_read = found.num_prompt_tokens + found.num_new_tokens - found.truncated  # the last token was only made
        assert found.state_bytes == 2 * 2 * 2 * 8 * 4 * num_read


def test_the_first_answer_of_a_process_is_timed_warm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's first pass takes, a kernel to build perhaps, is not called reading. The others take 1 s here."""
    load, passes, now_s = answers.load_variant_model, [], [0.0]

    def timed(*arguments: Any) -> Any:
        model = load(*arguments)
        forward = model.forward

        def one_pass(*inputs: Any, **named: Any) -> Any:
            now_s[0] += 1.0 if passes else 600.0
            passes.append(named["input_ids"].shape[1])
            return forward(*inputs, **named)

        model.forward = one_pass
        return model

    clock = SimpleNamespace(perf_counter=lambda: now_s[0])
    monkeypatch.setattr(answers, "time", clock)
    monkeypatch.setattr(text_stream, "time", clock)
    monkeypatch.setattr(answers, "load_variant_model", timed)
    found = answered(run)
    num_made = found.num_new_tokens + (not found.truncated)
    assert passes[-num_made:] == [found.num_prompt_tokens] + [1] * (num_made - 1) and len(passes) > num_made
    assert (found.seconds, found.first_token_s, found.tokens_per_s) == (num_made, 1.0, 1.0)


def test_tokens_are_drawn_from_the_seed(run: Path) -> None:
    def drawn(*options: Any) -> str:
        return invoke(run, "--text", TEXT, "--temperature", 1.5, *options).stdout

    greedy = invoke(run, "--text", TEXT).stdout
    assert drawn() == drawn("--seed", 0) != greedy
    assert len({drawn("--seed", seed) for seed in range(4)}) == 4
    nearly_greedy = invoke(run, "--text", TEXT, "--temperature", 1e-3, "--seed", 3).stdout
    assert nearly_greedy == greedy


def test_beams_are_said_at_once(run: Path) -> None:
    pieces: list[str] = []
    found = answered(run, TEXT, "evaluate.num_beams=3", say=pieces.append)
    assert pieces == [found.text] and found.text
    assert found.first_token_s is None and found.tokens_per_s is None
    wrong = invoke(run, "--text", TEXT, "--temperature", 1, "evaluate.num_beams=3", code=2)
    assert "--temperature draws one text" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " \n "], "the text is empty: give a dialogue"),
        (["--text", "a", "--file", "b"], "--text and --file: give one of them"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
        (["--file", __file__ + "/x"], "cannot be read (Not a directory)"),
        (["--text", "a", "--variant", "t2r"], "no such variant in run (there are: main, softmax, zero_shot)"),
        (["--text", "a", "evaluate.max_tokens=4"], "evaluate.max_tokens (command line): unknown key"),
        (["--text", "a", "finetune.enabled=false"], "finetune.enabled: a finished run answers as it is"),
        (["--text", "a", "seed=7"], "seed: a finished run answers as it is"),
        (["--text", "a\udcff"], "--text: is not UTF-8 text"),
        (["--text", "a", "--seed", 2**63], "--seed 9223372036854775808: give a number from 0 to 2^63 - 1"),
        (["--text", "a", "--seed", -1], "--seed -1: give"),
        (["--text", "a", "--temperature", 1e-39], "--temperature 1e-39: give 0"),
        (["--text", "a", "--temperature", "nan"], "--temperature nan: give 0"),
        (["--text", "a", "--temperature", "inf"], "--temperature inf: give 0"),
    ],
)
def test_mistakes_are_told(run: Path, arguments: list[str], message: str) -> None:
    done = invoke(run, *arguments, code=2)
    assert message in done.stderr and not done.stdout


def test_what_is_no_text_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    assert "is not UTF-8 text" in invoke(run, "--file", tmp_path / "picture", code=2).stderr
    assert "no run folder" in invoke(tmp_path / "nothing", "--text", "a", code=2).stderr
    assert "File name too long" in invoke("Ann: Lunch? " * 30, "--text", "a", code=2).stderr
    monkeypatch.setattr(answer_screen.sys, "stdin", None)
    with pytest.raises(ConfigError, match="the text is empty"):
        answered(run, answer_screen.read_text(None, None))


def test_a_model_that_gives_nan_is_named(run: Path) -> None:
    adapter = run / "finetune" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(adapter).items()}, adapter)
    artifact = describe_artifact(run / "finetune", "adapter").model_dump()
    edit_manifest(run, "finetune", lambda manifest: manifest["artifacts"].update(adapter=artifact))
    for options in ([], ["--temperature", 1], ["evaluate.num_beams=2"]):
        done = invoke(run, "--text", "a", *options, code=2)
        assert "the model gives NaN" in done.stderr and not done.stdout.strip()


def test_where_memory_ends_it_says_what_lowers_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")

    monkeypatch.setattr(answers, "_generate", ends)
    said = invoke(run, "--text", "a", code=2).stderr
    assert "main: out of memory (CUDA out of memory. Tried to allocate 2 GiB.). What lowers it: a shorter text" in said


def test_it_answers_with_the_template_of_prepare(run: Path) -> None:
    """A later command may have another in the config, which evaluate, with its tokenized prompts, does not notice."""
    expected = invoke(run, "--text", TEXT).stdout
    prepared_with = {"data.prompt_template": "{dialogue}\n=>"}
    edit_manifest(run, "prepare", lambda manifest: manifest["config"].update(prepared_with))
    template = "TL;DR {dialogue}"
    config = load_config(run / "config.resolved.yaml", [f"data.prompt_template={template}"])
    RunFolder(run).config_file.write_text(dump_resolved(config))
    assert invoke(run, "--text", TEXT).stdout == expected
    asked_for = invoke(run, "--text", TEXT, f"data.prompt_template={template}").stdout
    assert asked_for == invoke(run, "--text", f"TL;DR {TEXT}", "--raw").stdout != expected


def test_what_was_made_from_something_else_is_refused(run: Path) -> None:
    digest = read_manifest(run / "distill").output_fingerprint
    edit_manifest(run, "finetune", lambda manifest: manifest["consumed"].update(distill=digest))
    invoke(run, "--text", "a")
    edit_manifest(run, "finetune", lambda manifest: manifest["consumed"].update(distill="another"))
    said = invoke(run, "--text", "a", code=2).stderr
    assert "finetune: was made from an earlier distill than there is now; `hedgehog finetune CONFIG --force`" in said
    edit_manifest(run, "finetune", lambda manifest: manifest["consumed"].clear())
    edit_manifest(run, "finetune", lambda manifest: manifest["config"].update({"model.feature_map": "relu"}))
    said = invoke(run, "--text", "a", code=2).stderr
    assert "was made with another model section" in said and 'model.feature_map: "relu" → ' in said
    edit_manifest(run, "prepare", lambda manifest: manifest["artifacts"].pop("base_model"))
    edit_manifest(run, "finetune", lambda manifest: manifest["config"].clear())
    assert "does not say which base model was prepared" in invoke(run, "--text", "a", code=2).stderr


def test_another_tokenizer_is_told_of(run: Path) -> None:
    tokenizer = load_tokenizer(str(run / "prepare" / "base_model"))
    fingerprint = fingerprint_tokenizer(tokenizer)
    edit_manifest(run, "prepare", lambda manifest: manifest["summary"].update(tokenizer_fingerprint=fingerprint))
    assert "tokenizer" not in invoke(run, "--text", "a").stderr
    edit_manifest(run, "prepare", lambda manifest: manifest["summary"].update(tokenizer_fingerprint="another"))
    assert "base_model is another tokenizer than the one that prepare read" in invoke(run, "--text", "a").stderr


def test_stages_that_are_needed_must_be_finished_and_unchanged(run: Path) -> None:
    adapter = run / "finetune" / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x7f")
    assert "changed since the stage wrote it" in invoke(run, "--text", "a", code=2).stderr
    edit_manifest(run, "finetune", lambda manifest: manifest.update(status="running"))
    assert "stage finetune is not finished" in invoke(run, "--text", "a", code=2).stderr
    shutil.rmtree(run / "finetune")
    assert "run `hedgehog finetune CONFIG` first" in invoke(run, "--text", "a", code=2).stderr
    assert invoke(run, "--text", "a", "--variant", "softmax").stdout.strip(), "it needs none of the main conversion's"
    RunFolder(run).config_file.unlink()
    assert "has no config.resolved.yaml" in invoke(run, "--text", "a", code=2).stderr


def test_it_is_one_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, str(value))
    assert "without torchrun" in invoke(run, "--text", "a", code=2).stderr


def test_a_run_that_was_moved_is_found_with_its_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own making; or given as a path relative to where prepare ran, and asked about from elsewhere."""
    expected = invoke(run, "--text", TEXT).stdout
    moved = shutil.move(run, tmp_path / "moved")
    edit_manifest(moved, "prepare", lambda manifest: manifest["summary"].update(base_model="gone", tokenizer="gone"))
    assert invoke(moved, "--text", TEXT).stdout == expected

    base = moved / "prepare" / "base_model"
    (tmp_path / "llamas").mkdir()
    shutil.move(base, tmp_path / "llamas" / "base")
    base.write_text("{}")
    given = {"base_model": "llamas/base", "tokenizer": "llamas/base"}
    edit_manifest(moved, "prepare", lambda manifest: manifest.update(directory=str(tmp_path)))
    edit_manifest(moved, "prepare", lambda manifest: manifest["summary"].update(given))
    (tmp_path / "elsewhere" / "llamas" / "base").mkdir(parents=True)  # of the same name, and another's
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invoke(os.path.relpath(moved), "--text", TEXT).stdout == expected

    shutil.move(tmp_path / "llamas" / "base", tmp_path / "new place")
    assert "no tokenizer could be loaded" in invoke(moved, "--text", TEXT, code=2).stderr
    assert invoke(moved, "--text", TEXT, f"model.base={tmp_path / 'new place'}").stdout == expected
