"""The `hedgehog` command. It only parses and reports; what a command does is imported when the command runs.

Nothing heavy is imported here, so that `hedgehog --help` answers at once: no torch, no pydantic, no rich.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .distributed import slurm_variables
from .errors import ConfigError, HedgehogError, Interrupted, LeaseError
from .formatting import for_stream
from .go_on import own_command, shown
from .quiet_libraries import quiet_libraries

if TYPE_CHECKING:
    from .config import RunConfig

INTERRUPTED_EXIT_CODE = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name="hedgehog",
    help="Convert a pretrained Llama, GPT-2 or BERT to linear attention (Hedgehog): distill, finetune, evaluate, "
    "export.",
    epilog="Exit codes: 0 done, 2 a mistake or a refusal with its cure, 75 stopped by a signal with all saved (the "
    "same command goes on), 130 likewise by Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Stage(str, Enum):
    """The stages in order, as choices of --from and --to."""

    prepare = "prepare"
    distill = "distill"
    finetune = "finetune"
    evaluate = "evaluate"
    export = "export"


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value", help="Replace values of the config: finetune.epochs=3.", show_default=False
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its name under runs/, or its YAML.")]
Force = Annotated[bool, typer.Option("--force", help="Begin anew what is finished or has another config.")]
Variant = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="A variant of the config instead of the main conversion."),
]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    first: Annotated[Stage | None, typer.Option("--from", help="Stage to begin with.", show_default=False)] = None,
    last: Annotated[Stage | None, typer.Option("--to", help="Stage to end with.", show_default=False)] = None,
    force: Force = False,
) -> None:
    """Run the stages: prepare, distill, finetune, evaluate, export.

    Finished stages are skipped and interrupted ones go on. The config's variants are distilled and finetuned too and
    scored in the same table.

    \b
    Example: hedgehog run configs/tiny.yaml
             hedgehog run configs/llama2-7b-samsum.yaml --from finetune finetune.epochs=3
    """
    with _errors_shown(), _signals_noted():
        loaded = _load(config, overrides, first=first.value if first else None, force=force)
        from .runner import run_pipeline

        run_pipeline(
            loaded,
            first=first.value if first else None,
            last=last.value if last else None,
            force=force,
            command=own_command(sys.argv[1:]),
        )


@app.command()
def prepare(config: Config, overrides: Overrides = None, force: Force = False) -> None:
    """Check or make the inputs: base model, tokenizer, tokens.

    \b
    Example: hedgehog prepare configs/tiny.yaml
    """
    _run_stage("prepare", config, overrides, force=force)


@app.command()
def distill(
    config: Config,
    overrides: Overrides = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="8-15", help="Train these layers only; join them with `merge`.")
    ] = None,
    variant: Variant = None,
    force: Force = False,
) -> None:
    """Train feature maps to reproduce the frozen softmax attention.

    \b
    Example: hedgehog distill configs/tiny.yaml --layers 0-1
    """
    _run_stage("distill", config, overrides, {"distill.layers": layers}, variant=variant, force=force)


@app.command()
def merge(config: Config, overrides: Overrides = None, variant: Variant = None, force: Force = False) -> None:
    """Join the layers that several `distill --layers` trained.

    \b
    Example: hedgehog merge configs/tiny.yaml
    """
    with _errors_shown(), _signals_noted():
        loaded = _load(config, overrides, "merge", variant=variant)
        from .runner import merge_layers

        merge_layers(loaded, variant=variant, force=force, command=own_command(sys.argv[1:]))


@app.command()
def finetune(config: Config, overrides: Overrides = None, variant: Variant = None, force: Force = False) -> None:
    """Train a LoRA adapter (and the feature maps) on the summaries.

    \b
    Example: hedgehog finetune configs/tiny.yaml finetune.lora.rank=16
    """
    _run_stage("finetune", config, overrides, variant=variant, force=force)


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="0/4", help="Do this part of the test rows only; `evaluate` joins the parts."),
    ] = None,
    force: Force = False,
) -> None:
    """Score all variants on the test rows; one table.

    Dialogues are summarized (ROUGE, and the perplexity of the reference summaries), text is read (perplexity), rows
    with classes are classified (accuracy, F1, Matthews correlation). Goes on at the example where it stopped. Takes
    over the rows that `--shard` did, and scores all of them.

    \b
    Example: hedgehog evaluate configs/tiny.yaml evaluate.num_beams=4
    """
    _run_stage("evaluate", config, overrides, force=force, shard=shard)


@app.command()
def export(
    config: Config,
    overrides: Overrides = None,
    variant: Variant = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32 (export.dtype).")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="5GB", help="Largest file (export.max_shard_size).")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload it too (export.push_to_hub).")
    ] = None,
    force: Force = False,
) -> None:
    """Write one merged folder that plain transformers loads.

    The folder is loaded again in a clean process and its logits are compared with the unmerged model's.

    \b
    Example: hedgehog export configs/tiny.yaml --dtype float32
    """
    options = {"export.dtype": dtype, "export.max_shard_size": max_shard_size, "export.push_to_hub": push_to_hub}
    _run_stage("export", config, overrides, options, variant=variant, force=force)


@app.command()
def generate(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="section.key=value",
            help="How it answers: evaluate.max_new_tokens=40, engine.device=cpu; model.base where the base was moved.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="The dialogue; without it and --file: standard input.")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="A text file with the dialogue.")] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME", help="`main`, or a variant of the config; may be given again."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The text is the whole prompt: no data.prompt_template.")] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="Draw the tokens; 0: the most likely ones.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="With another one, --temperature draws others.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object per variant.")] = False,
) -> None:
    """Let a finetuned model summarize a dialogue of yours.

    Prints the summary as it comes, and what it took on standard error. `evaluate.*` says how, as for `evaluate`.

    \b
    Example: hedgehog generate runs/tiny --file dialogue.txt
             hedgehog generate runs/tiny --variant main --variant softmax --text "Ann: Lunch at one?
             Bob: Gladly."
    """
    with _errors_shown(), _interrupted_for_good():
        from .answer_screen import print_answers

        print_answers(
            run,
            text=text,
            file=file,
            raw=raw,
            variants=variants or [],
            overrides=overrides or [],
            temperature=temperature,
            seed=seed,
            as_json=json_output,
        )


@app.command()
def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|section.key=value", help="YAML files, and overrides for all of them."),
    ],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of processes, one per GPU, to reckon with.")] = 1,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object per config.")] = False,
) -> None:
    """Check configs: every error, batch arithmetic, estimated memory.

    Touches neither a GPU nor the network. What a config leaves open (configs/small-llama-*.yaml: base model, data) is
    given here as for `run`.

    \b
    Example: hedgehog validate configs/tiny.yaml configs/llama2-7b-*.yaml
             hedgehog validate configs/llama2-70b-samsum.yaml --gpus 8
    """
    with _errors_shown():
        from .validation import validate_configs

        files = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
        overrides = [argument for argument in arguments if argument not in files]
        if not files:
            raise ConfigError("no config file given; for example: hedgehog validate configs/tiny.yaml")
        if not validate_configs(files, overrides, world_size=gpus, as_json=json_output):
            raise typer.Exit(HedgehogError.exit_code)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", metavar="SWEEP.yaml", help="Several sets of overrides, a run folder each."),
    ] = None,
    first: Annotated[Stage | None, typer.Option("--from", help="Stage to begin with.", show_default=False)] = None,
    last: Annotated[Stage | None, typer.Option("--to", help="Stage to end with.", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the graph, the costs and the scripts; submit nothing.")
    ] = False,
) -> None:
    """Submit to Slurm what is missing of a run, as a graph of jobs.

    Each job waits for those it needs. Submitting again submits only what failed or never ran. The config's section
    `slurm` says what jobs ask for.

    \b
    Example: hedgehog submit configs/llama2-7b-samsum.yaml --dry-run
             hedgehog submit configs/llama2-7b-samsum.yaml slurm.partition=gpu slurm.layer_groups=8
    """
    with _errors_shown():
        from .slurm.submission import submit as submit_run

        submit_run(
            str(config),
            overrides or [],
            sweep=None if sweep is None else str(sweep),
            first=first.value if first else None,
            last=last.value if last else None,
            dry_run=dry_run,
        )


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until the run has ended.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks with --watch.")] = 10.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every stage, part and variant, and the results' paths.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far a run is, and the command that goes on.

    Also what Slurm says of its jobs. On a terminal it fits the screen: what is through or waits shares a row.

    \b
    Example: hedgehog status runs/tiny
             hedgehog status runs/llama2-7b-samsum --watch
    """
    with _errors_shown():
        from .status_report import print_status, watch_status

        if watch:
            watch_status(run, every_s=every, as_json=json_output, verbose=verbose)
        else:
            print_status(run, as_json=json_output, verbose=verbose)


@app.command()
def report(
    run: Run,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it; report.html in the run folder if not."),
    ] = None,
) -> None:
    """Write one HTML file that shows a run to others.

    Scores, charts, what each stage took, sample summaries, how it was made; of an unfinished run, what there is. The
    file needs nothing beside it. An earlier one is replaced.

    \b
    Example: hedgehog report runs/tiny
             hedgehog report runs/llama2-7b-samsum --output samsum.html
    """
    with _errors_shown():
        from .report.writing import write_report

        print(write_report(run, output))


@app.command()
def cancel(run: Run) -> None:
    """Take a run's jobs out of Slurm. What they saved stays; `submit` goes on from it.

    \b
    Example: hedgehog cancel runs/llama2-7b-samsum
    """
    with _errors_shown():
        from .slurm.cancelling import cancel as cancel_run

        cancel_run(run)


@app.command()
def env(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and optional packages.

    \b
    Example: hedgehog env
    """
    with _errors_shown():
        from .environment import print_environment

        print_environment(as_json=json_output)


def main() -> None:
    """Entry point of the `hedgehog` command."""
    quiet_libraries()
    try:
        app(prog_name="hedgehog")  # also under `python -m` and torchrun
    except OSError as error:  # stages tell of their own files
        if error.errno not in _FULL:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is left in the old one's buffer would fail at exit)
        where = error.filename or "what this command writes"
        _tell(f"error: no room for {where}: disk or quota is full. Free some space, then run the same command again.")
        sys.exit(2)


def _run_stage(
    stage: str,
    config: Path,
    overrides: list[str] | None,
    options: dict[str, str | None] | None = None,
    *,
    variant: str | None = None,
    force: bool = False,
    shard: str | None = None,
) -> None:
    with _errors_shown(), _signals_noted():
        given = [f"{key}={value}" for key, value in (options or {}).items() if value is not None]
        loaded = _load(config, [*(overrides or []), *given], stage, variant=variant, force=force)
        from .runner import run_stage

        command = own_command(sys.argv[1:])
        run_stage(loaded, stage, variant=variant, shard=shard, force=force, command=command)


def _load(
    path: Path,
    overrides: list[str] | None,
    stage: str | None = None,
    *,
    variant: str | None = None,
    first: str | None = None,
    force: bool = False,
) -> RunConfig:
    """The config, after all that can be refused before a stage (None: all from `first` on) starts."""
    from .config_loading import read_config

    submitted = os.environ.get("HEDGEHOG_SUBMITTED_CONFIG")  # a job of `hedgehog submit`
    if submitted:
        from .slurm.frozen_config import check_visible

        check_visible(Path(submitted))
    reading = read_config(path, overrides or [])
    from .preflight import refuse_mistakes

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = refuse_mistakes(reading, stage, world_size=world_size, variant=variant, first=first, force=force)
    if submitted:
        from .slurm.frozen_config import check_unchanged

        check_unchanged(config, Path(submitted))
    return config


@contextmanager
def _errors_shown() -> Iterator[None]:
    """A user's mistake becomes one message and exit code 2; all else crashes loudly.

    After an interruption the exit code is 75 (130 after Ctrl-C), and the message has the command that goes on.

    What is wrong with a config is the same on every rank and told once, by rank 0. Other errors may concern one
    rank's machine only, so every rank tells its own.
    """
    if "WORLD_SIZE" not in os.environ:
        with suppress(ConfigError):  # told by the stage that needs them
            os.environ.update(slurm_variables(os.environ))
    try:
        yield
    except Interrupted as error:
        if _rank() == 0:
            _tell_how_to_go_on(str(error), error.goes_on_by_itself)
        raise typer.Exit(error.exit_code) from None
    except HedgehogError as error:
        rank = _rank()
        if rank == 0:
            _tell(f"error: {error}")
        elif not isinstance(error, (ConfigError, LeaseError)):
            _tell(f"error (rank {rank}): {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if _rank() == 0:
            _tell_how_to_go_on("\ninterrupted")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _tell(message: str) -> None:
    print(for_stream(message, sys.stderr), file=sys.stderr)


def _tell_how_to_go_on(what: str, by_itself: bool = False) -> None:
    """On a terminal the command has a line of its own, which is not wrapped: it is there to be copied."""
    message = what if by_itself else f"{what}."
    command = "" if by_itself else f"To go on: {shown(own_command(sys.argv[1:]))}"
    between = "\n" if sys.stderr.isatty() else " "
    print(f"{for_stream(message, sys.stderr)}{between * bool(command)}{command}", file=sys.stderr)


def _rank() -> int:
    """Asked for when there is something to say: under srun the rank is found out on the way."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def _interrupted_for_good() -> Iterator[None]:
    """For what keeps nothing: after Ctrl-C there is nothing to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Before the slow imports, so that a signal that comes early is not lost."""
    from .interrupts import listening

    with listening():
        yield


if __name__ == "__main__":
    main()
