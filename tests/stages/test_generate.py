"""`hedgehog generate`: it answers a text of the user's with the models that evaluate scores, as evaluate does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hedgehog.pipeline import cli
from hedgehog.pipeline.answers import Question, WordStream, answer
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import dump_resolved
from hedgehog.pipeline.data.tokenize import load_tokenizer
from hedgehog.pipeline.row_log import read_complete_rows
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.runner import run_stage

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


def test_words_are_said_when_they_are_whole(run: Path) -> None:
    """Here each byte is a token: no half of a character is shown, no half of a word, no blank around the text."""
    tokenizer = load_tokenizer(str(run / "prepare" / "base_model"))
    text = "  Zoë's café 😀  opens\n at 1.</s>\n"
    (token_ids,) = tokenizer([text.removesuffix("</s>\n")], add_special_tokens=False).input_ids
    pieces: list[str] = []
    words = WordStream(tokenizer, pieces.append)
    words.put(torch.tensor([[1, 5, 6]]))
    for token_id in [*token_ids, tokenizer.eos_token_id]:
        words.put(torch.tensor([token_id]))
    words.end()
    assert pieces == ["Zoë's", " café", " 😀", "  opens", "\n at", " 1."]


def test_pieces_make_the_text(run: Path) -> None:
    pieces: list[str] = []
    (found,) = answer(str(run), Question(TEXT), overrides=["evaluate.max_new_tokens=200"], say=pieces.append)
    assert "".join(pieces) == found.text
    assert found.num_new_tokens == 200 and 0 < (found.first_token_s or 0) < found.seconds


def test_what_is_kept_between_tokens(run: Path) -> None:
    """Linear: a sum for each of 2 layers and 4 heads, F = 16, V = 8. Softmax: keys and values of 2 heads, and grows."""

    def kept(variant: str, text: str, *overrides: str) -> tuple[int, int]:
        (found,) = answer(str(run), Question(text), variants=[variant], overrides=overrides)
        num_read = found.num_prompt_tokens + found.num_new_tokens - found.truncated  # the last token was only made
        return found.state_bytes, num_read

    for text in ("a", 50 * "long "):
        assert kept("main", text)[0] == 2 * 4 * 16 * (8 + 1) * 4
        assert kept("main", text, "evaluate.num_beams=2")[0] == 2 * 4 * 16 * (8 + 1) * 4
        num_bytes, num_tokens = kept("softmax", text)
        assert num_bytes == 2 * 2 * 2 * 8 * 4 * num_tokens


def test_tokens_are_drawn_from_the_seed(run: Path) -> None:
    def drawn(*options: Any) -> str:
        return invoke(run, "--text", TEXT, "--temperature", 1.5, *options).stdout

    greedy = invoke(run, "--text", TEXT).stdout
    assert drawn() == drawn("--seed", 0) != greedy
    assert len({drawn("--seed", seed) for seed in range(4)}) == 4
    nearly_greedy = invoke(run, "--text", TEXT, "--temperature", 1e-4, "--seed", 3).stdout
    assert nearly_greedy == greedy


def test_beams_are_said_at_once(run: Path) -> None:
    pieces: list[str] = []
    (found,) = answer(str(run), Question(TEXT), overrides=["evaluate.num_beams=3"], say=pieces.append)
    assert pieces == [found.text] and found.text and found.first_token_s is None
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
        (["--text", "a", "model.feature_map=relu"], "made with another model section:\n  model.feature_map: "),
    ],
)
def test_mistakes_are_told(run: Path, arguments: list[str], message: str) -> None:
    edit_manifest(
        run, "finetune", lambda manifest: manifest["config"].update({"model.feature_map": "hedgehog_softmax"})
    )
    done = invoke(run, *arguments, code=2)
    assert message in done.stderr and not done.stdout


def test_what_is_no_text_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    assert "is not UTF-8 text" in invoke(run, "--file", tmp_path / "picture", code=2).stderr
    assert "no run folder" in invoke(tmp_path / "nothing", "--text", "a", code=2).stderr


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
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invoke(os.path.relpath(moved), "--text", TEXT).stdout == expected
