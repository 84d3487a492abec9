"""The command line: verbs to functions. It parses, loads and calls; what a verb does is written in its room."""

import errno
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from leanseek.config import BadInput, Config, parse, read_recipe, recipe_names, to_toml

app = typer.Typer(
    name="leanseek",
    help="DeepSeek-V3 in readable PyTorch: text to tokenizer to training to a model that talks, and the bill.",
    add_completion=False,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# click's own error: typer may carry a copy of click, and exports only the error's children
UsageError: Any = typer.BadParameter.__bases__[0]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Averaged = Annotated[bool, typer.Option("--ema", help="The moving average of the weights, where one was kept.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Flops = Annotated[float | None, typer.Option(metavar="C", help="Grown to so many FLOPs: sizes, rates and tokens.")]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="About how long it may take.")] = 10.0,
    text: Annotated[
        str | None, typer.Option(metavar="FILE|DIR|hf:NAME", help="Your text; else stories that are made here.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Where to put the run.")] = Path("runs/demo"),
) -> None:
    """From nothing to a chat in ten minutes: text, tokenizer, pre-training, instruction, exam, bill."""
    from leanseek.demo import demo as run_demo

    run_demo(minutes, text, out)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one, resolved.")] = None,
    flops: Flops = None,
) -> None:
    """List the shipped recipes, or print one resolved."""
    if name is not None:
        print(to_toml(_recipe(name, [], flops)), end="")
        return
    if flops is not None:
        raise BadInput("--flops: which recipe is to be grown?")
    for each in recipe_names():
        print(f"{each:<8}  {read_recipe(each).description}")


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help=".txt, .jsonl (+.gz, .zst), .parquet, folders, hf:NAME; SOURCE=INPUT names a source.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DATA", help="Where to put the shards.")],
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer trained on the text.")] = 6144,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Reuse this tokenizer instead.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core unless told.")] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT", help="Hold out this text, whole, and nothing else; may be given more than once."),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="NFC, plain line ends, nothing invisible.")] = False,
    language: Annotated[
        list[str] | None, typer.Option(metavar="[SOURCE=]CODE,…", help="Keep only texts in these languages.")
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Texts of this source, or of all, must keep Gopher's rules."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT", help="Drop texts that share thirteen words in a row with this evaluation."),
    ] = None,
    mask_personal: Annotated[
        bool, typer.Option("--mask-personal", help="Replace e-mail addresses, telephone numbers and keys.")
    ] = False,
    good: Annotated[
        list[str] | None, typer.Option(metavar="INPUT", help="What a judge of quality learns to like …")
    ] = None,
    bad: Annotated[list[str] | None, typer.Option(metavar="INPUT", help="… and what not.")] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(metavar="[SOURCE=]SHARE", help="Keep this share of the text, the best by the judge."),
    ] = None,
) -> None:
    """Clean, deduplicate, train or reuse a tokenizer, tokenise into shards.

    Killed, the same command goes on where it was.
    """
    from leanseek.data.prepare import Cleaning
    from leanseek.data.prepare import prepare as run_prepare

    cleaning = Cleaning(
        normalise=normalise,
        languages=language or (),
        quality=quality or (),
        against=against or (),
        personal=mask_personal,
        good=good or (),
        bad=bad or (),
        keep_best=keep_best or (),
    )
    report = run_prepare(inputs, out, vocab_size, tokenizer, workers, sys.stderr.isatty(), validation, cleaning)
    print("\n".join(report.lines()))


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a .toml file.")],
    data: Annotated[Path, typer.Option(metavar="DATA", help="A folder made by prepare.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run folder; the same command again resumes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.tokens=2e6.")
    ] = None,
    flops: Flops = None,
) -> None:
    """Train a model from scratch; the same command again goes on where it stopped."""
    config = _recipe(recipe, overrides or [], flops)
    from leanseek.train.pretrain import pretrain as run_pretrain

    _print_receipt(run_pretrain(config, data, out))


@app.command()
def extend(
    run: Run,
    data: Annotated[Path, typer.Option(metavar="DATA", help="A folder made by prepare, with long documents.")],
    out: Annotated[Path, typer.Option(metavar="RUN2", help="The run that reads more; the same command again resumes.")],
    lengths: Annotated[
        str | None, typer.Option(metavar="N,M", help="Tokens of each stage; 8 and 32 times the context unless told.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.tokens=2e6.")
    ] = None,
) -> None:
    """Stretch a run's context by YaRN; the same command again goes on where it stopped."""
    from leanseek.train.extend import extend as run_extend

    _print_receipt(run_extend(run, data, out, _numbers(lengths, "--lengths"), overrides or []))


@app.command()
def sft(
    run: Run,
    data: Annotated[
        Path,
        typer.Option(
            metavar="CHATS.jsonl", help='Per line {"messages": [{role, content}…]} or {"prompt", "response"}.'
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN2", help="The run that chats; the same command again resumes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.tokens=2e6.")
    ] = None,
) -> None:
    """Teach a run to chat; the same command again goes on where it stopped."""
    from leanseek.post.sft import sft as run_sft

    _print_receipt(run_sft(run, data, out, overrides or []))


@app.command()
def grpo(
    run: Run,
    task: Annotated[
        Path, typer.Option(metavar="TASK.jsonl", help="Questions whose answers can be verified, one on each line.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="RUN2", help="The run that is rewarded; the same command again resumes.")
    ],
    dev: Annotated[
        Path | None, typer.Option(metavar="TASK.jsonl", help="Questions to be answered now and then, not learnt from.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example grpo.steps=100.")
    ] = None,
) -> None:
    """Reward a run for right answers; the same command again goes on where it stopped."""
    from leanseek.post.grpo import grpo as run_grpo

    _print_receipt(run_grpo(run, task, out, overrides or [], dev))


@app.command()
def reward(
    run: Run,
    data: Annotated[
        Path,
        typer.Option(
            metavar="PAIRS.jsonl",
            help='Per line {"chosen", "rejected"}: messages, transcripts, or answers to "prompt".',
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN2", help="The reward model; the same command again resumes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.tokens=2e6.")
    ] = None,
) -> None:
    """Train a reward model from preferences; the same command again goes on where it stopped."""
    from leanseek.post.reward_model import reward as run_reward

    _print_receipt(run_reward(run, data, out, overrides or []))


@app.command()
def distill(
    run: Run,
    task: Annotated[Path, typer.Option(metavar="TASK.jsonl", help="Questions with answers that can be verified.")],
    out: Annotated[Path, typer.Option(metavar="CHATS.jsonl", help="What it is to be taught; for sft.")],
    samples: Annotated[int, typer.Option(help="Replies to each question.")] = 4,
    keep: Annotated[int, typer.Option(help="Most replies kept of one question, the shortest first.")] = 1,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Of a reply.")] = None,
    longest: Annotated[int | None, typer.Option(help="Most tokens of a reply that is kept.")] = None,
    one_language: Annotated[float, typer.Option(help="Least share of its words in the question's script.")] = 0.95,
    thoughts: Annotated[bool, typer.Option("--thoughts", help="Keep replies with <think> thoughts only.")] = False,
    system: Annotated[
        str | None, typer.Option(help="The system message that asks for reflection; '' for none; ours unless told.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many of the questions, chosen by --seed.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Let a run answer a task, and keep the right, well-formed replies as chats; the same command again goes on."""
    from leanseek.eval.ask import Settings
    from leanseek.post.distill import REFLECT, Choice, say
    from leanseek.post.distill import distill as run_distill

    told = REFLECT if system is None else system or None
    settings = Settings(
        samples=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens, limit=limit, seed=seed,
        system=told,
    )  # fmt: skip
    say(out, run_distill(run, task, out, settings, Choice(keep, longest, one_language, thoughts=thoughts)))


@app.command("eval")
def evaluate(
    run: Run,
    tasks: Annotated[
        str | None, typer.Option(help="bpb, positions, needle, with commas between; bpb unless there is a --task.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score this .txt or .jsonl text; else the validation split.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a window, for bpb and positions; as trained unless told.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,M", help="Tokens of needle's haystacks; --limit of each, else 100.")
    ] = None,
    task: Annotated[
        list[Path] | None, typer.Option(metavar="TASK.jsonl", help="A file of questions; may be given more than once.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each question.")] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="TASK.jsonl", help="Where those come from; else the questions' own file.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Replies to each question: pass@k and majority@k.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 for one sample, 0.6 for several, unless told.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 for one sample, 0.95 for several, unless told.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of a reply.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many of the questions, chosen by --seed.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    write: Annotated[
        bool, typer.Option("--write", help="Let the model write its answer where choices would be compared.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Put questions as text to continue, also where a run was taught to chat.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where records and results are kept; else RUN/eval.")
    ] = None,
    ema: Averaged = False,
    as_json: Json = False,
) -> None:
    """Score a run: bits per byte, and files of questions with verified answers."""
    from leanseek.eval.ask import Settings
    from leanseek.eval.harness import evaluate as run_evaluate

    settings = Settings(shots, samples, temperature, top_p, max_tokens, limit, seed, write, raw)
    named = tasks.split(",") if tasks is not None else [] if task else ["bpb"]
    sizes = _numbers(lengths, "--lengths")
    results = run_evaluate(run, named, text, task or (), examples, settings, out, ema, context, sizes)
    if as_json:
        print(json.dumps(results["bpb"] if list(results) == ["bpb"] else results))  # one task: its own object
        return
    for name, result in results.items():
        if name == "bpb":
            print(f"bpb {result['bpb']:.4f} on {result['bytes']:,} bytes, {result['tokens']:,} tokens")
            continue
        if name == "positions":
            for first, after, bpb in zip(result["edges"], result["edges"][1:], result["by_position"], strict=False):
                print(f"tokens {first:,} to {after - 1:,}: bpb {bpb:.4f}")
            continue
        if name == "needle":
            for length, found in zip(result["lengths"], result["found"], strict=True):
                print(f"{length:,} tokens: " + " ".join(f"{share:4.0%}" for share in found))
        beside = [
            f"{key} {result[key]:.4f}"
            for key in result
            if "@" in key or key in ("chance", "score_per_byte", "score_summed")
        ]
        within = f"between {result['low']:.4f} and {result['high']:.4f}"
        print(f"{name} {result['score']:.4f}, {within}, of {result['n']:,} questions", *beside, sep=", ")


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT")],
    max_tokens: Annotated[int, typer.Option()] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.")] = 0,
    min_p: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, also where a run was taught to chat.")
    ] = False,
    as_json: Json = False,
) -> None:
    """One completion of a prompt."""
    import leanseek
    from leanseek.checkpoint import chats, read_run
    from leanseek.parallel.mesh import joined, serving_ranks
    from leanseek.serve.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, max_tokens, tuple(stop or ()), seed)
    with joined(timeout=600):
        ranks = serving_ranks(read_run(run))
        llm = leanseek.load(run, ranks)
        if raw or not chats(run):
            completion, before = llm.generate(prompt, sampling), prompt
        else:
            completion, before = llm.chat([{"role": "user", "content": prompt}], sampling), ""
    if ranks.first:
        print(json.dumps(asdict(completion)) if as_json else before + completion.text)


@app.command()
def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option()] = 400,
    temperature: Annotated[float, typer.Option()] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Talk to a run in the terminal."""
    from leanseek.serve.chat import chat as run_chat
    from leanseek.serve.sampling import Sampling

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # a stray byte must not end the conversation
    run_chat(run, system, Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed))


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network: then set a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name; the run folder's unless told.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients must send the key that stands in this file.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The key itself; others on this machine can see it in `ps`.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests that are answered side by side.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait beside them; more are sent away.")] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of one answer; the model's context unless told.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens the cache holds; all that may run, or a quarter of memory, unless told.")
    ] = None,
    body_mb: Annotated[float, typer.Option(help="Largest request, in millions of bytes.")] = 4.0,
    grace: Annotated[float, typer.Option(help="Seconds that answers may go on after a signal to stop.")] = 30.0,
    speculation: Annotated[
        bool, typer.Option("--speculation/--no-speculation", help="Draft with the MTP module, if there is one.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Serve a run over HTTP: OpenAI's and DeepSeek's API, and a chat page."""
    from leanseek.serve.server import Options
    from leanseek.serve.server import serve as run_server

    options = Options(
        host, port, name, api_key, api_key_file, max_running, max_waiting, max_tokens, cache_tokens, body_mb, grace,
        speculation, device,
    )  # fmt: skip
    run_server(run, options)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A released checkpoint, or what export wrote.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run to be made of it.")],
) -> None:
    """Make a run of released weights: to continue training, to tune, to serve."""
    from leanseek.hub import import_release

    import_release(folder, run)


@app.command()
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp8"] | None, typer.Option(help="Precision of the weights; as they are unless told.")
    ] = None,
    format: Annotated[  # the contract's name for it
        Literal["hf", "gguf"], typer.Option(help="hf: for transformers and vLLM. gguf: for llama.cpp.")
    ] = "hf",
    ema: Averaged = False,
) -> None:
    """Write a run's weights for other tools."""
    if format == "gguf":
        from leanseek.gguf import export_gguf

        export_gguf(run, folder, dtype, ema)
    else:
        from leanseek.hub import export_release

        export_release(run, folder, dtype, ema)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="A shipped recipe or a .toml file.")] = "v3",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example model.n_routed_experts=128.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(metavar="H", help="h800, h100, b200, …, cpu (measured), or a .toml.")
    ] = "h800",
    gpus: Annotated[int | None, typer.Option(help="Devices; the fewest that fit unless told.")] = None,
    tokens: Annotated[float | None, typer.Option(help="As the recipe says unless told.")] = None,
    price: Annotated[float | None, typer.Option(help="US dollars per device and hour.")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp8, or auto: whichever is cheaper.")] = "auto",
    stack: Annotated[
        str | None, typer.Option(help="Whose efficiency: megatron, torchtitan, or leanseek on a CPU.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="pp=…,ep=…", help="This layout instead of a search; also tp, cp, schedule, …")
    ] = None,
    budget: Annotated[float | None, typer.Option(metavar="USD", help="Turned around: what to train for that.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="With --budget: write the best as a recipe.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with drawings.")] = None,
    as_json: Json = False,
) -> None:
    """What a recipe takes on a cluster: memory, time, money. Or, with --budget, what to train for it."""
    from leanseek.plan.planner import Request
    from leanseek.plan.tell import answer

    request = Request(recipe, tuple(overrides or ()), hardware, gpus, tokens, price, precision, stack, mesh)
    answer(request, budget, out, html, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to put it; else the first RUN.")] = None,
) -> None:
    """Runs side by side: quality with intervals, cost, expert balance, MTP acceptance; report.html and report.png."""
    from leanseek.report import report as run_report

    print(run_report(runs, out))


bench_app = typer.Typer(help="Measured speed and cost, peers in turn.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


Rounds = Annotated[int, typer.Option(help="How often each is measured, in turn.")]
Quick = Annotated[bool, typer.Option("--quick", help="Five rounds, without PyTorch's compiler.")]


@bench_app.command("train")
def bench_train(rounds: Rounds = 7, quick: Quick = False, as_json: Json = False) -> None:
    """Tokens per second of a training step, beside transformers'."""
    from leanseek.bench.train import bench_train as run_bench
    from leanseek.bench.turns import report

    report(lambda console: run_bench(5 if quick else rounds, not quick, console), as_json)


@bench_app.command("decode")
def bench_decode(
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="These weights; else random ones in the shapes of bench-20m.")
    ] = None,
    rounds: Rounds = 7,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Tokens per second and time to the first token, beside transformers'; what drafts gain."""
    from leanseek.bench.decode import bench_decode as run_bench
    from leanseek.bench.turns import report

    report(lambda console: run_bench(run, 5 if quick else rounds, not quick, console), as_json)


@bench_app.command("kernels")
def bench_kernels(
    rounds: Rounds = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, and on a CPU small shapes.")] = False,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to store what FP8 gains on a GPU, for train.kernel_table.")
    ] = Path("runs/kernels.json"),
    as_json: Json = False,
) -> None:
    """What this machine can do at best, each kernel's share of it, and which products FP8 makes faster."""
    from leanseek.bench.kernels import bench_kernels as run_bench
    from leanseek.bench.turns import report

    report(lambda console: run_bench(3 if quick else rounds, quick, out, console), as_json)


@bench_app.command()
def ledger(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with train* and val* text; else this machine's Python.")
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Of several in DIR, those files that begin so; without DIR stdlib or storyworld.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where receipts and runs are kept.")] = Path("runs/ledger"),
    rows: Annotated[str | None, typer.Option(metavar="A,B", help="These rows only.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="One more row: a recipe or .toml file.")] = None,
    seeds: Annotated[int, typer.Option(help="Full runs per row.")] = 1,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="ROW=N", help="Another token budget; may be given more than once.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing new after so many.")] = None,
    threads: Annotated[int | None, typer.Option(help="Per process; 1 on a busy machine.")] = None,
    status: Annotated[bool, typer.Option("--status", help="List what is there and what is missing.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page and its plot.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes: nano against the best control; fails when it is 10% worse.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Price every recipe in what it costs to reach one fixed quality, against controls trained beside it."""
    from leanseek.bench.ledger import Request, main

    request = Request(
        data, track, out, rows, recipe, seeds, tuple(tokens or ()), minutes, threads, status, write, quick, as_json
    )
    if not main(request):
        sys.exit(1)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0, or 2 with one clear line on stderr when the input, the disk or the memory is at fault."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments or ["--help"], standalone_mode=False)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "leanseek"
        _refuse(f"{error.format_message().rstrip('.')} (see '{where} --help')", error)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BadInput as error:
        _refuse(str(error), error)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        reason = {errno.ENOSPC: "no space left on the disk"}.get(error.errno or 0, error.strerror or str(error))
        _refuse(f"{error.filename or 'disk'}: {reason}; what was saved before is untouched", error)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        needs = "a smaller train.micro_batch, context or model needs less"
        _refuse(f"out of memory: {needs}; what was saved is untouched", error)
    sys.exit(0)


def _recipe(name: str, overrides: list[str], flops: float | None) -> Config:
    """A recipe, grown if it is to be, with `overrides` laid over it; the ids that it has count among the FLOPs."""
    if flops is None:
        return read_recipe(name, overrides)
    from leanseek.train.grow import grown

    ids = [override for override in overrides if override.partition("=")[0].strip() == "model.vocab_size"]
    return parse(to_toml(grown(read_recipe(name, ids), flops)), f"recipe {name}", overrides)


def _speaks() -> bool:
    """Whether this process tells the outcome: of those that torchrun starts for one command, the first."""
    return os.environ.get("RANK", "0") == "0"


def _numbers(text: str | None, option: str) -> list[int]:
    """Whole numbers with commas between; none where nothing was given. Raises BadInput."""
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise BadInput(f"{option} {text!r}: write whole numbers with commas between, for example 1024,4096") from None


def _print_receipt(receipt: dict[str, Any]) -> None:
    from leanseek.train.receipt import printed

    if not _speaks():
        return
    if receipt["ended"] != "complete":
        how = "the same command" if receipt["ended"] == "interrupted" else f"a larger train.{receipt['ended']}"
        print(f"stopped at step {receipt['steps']} ({receipt['ended']}): {how} goes on", file=sys.stderr)
    print(printed(receipt))


def _out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _refuse(line: str, error: Exception) -> NoReturn:
    told = isinstance(error, (BadInput, UsageError)) or hasattr(error, "__notes__")  # all processes have this error
    if _speaks() or not told:
        where = "" if _speaks() else f"rank {os.environ['RANK']}: "
        print("leanseek: " + where + " ".join(line.split()), file=sys.stderr)
    sys.exit(2)
