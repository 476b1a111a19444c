"""Options that several commands share, and what they mean. Nothing is checked here that `planning` or `glm` checks."""

import argparse
import os
import re
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.errors import UsageError
from coordinator.plan import MAX_NUM_SEQS, PREFILL_CHUNK
from coordinator.plan_file import read_plan_file
from coordinator.plan_request import Option, PlanRequest
from coordinator.plan_wish import stages_from
from coordinator.recovery import DEFAULT_RECOVERY
from glm.dialect import DIALECTS
from protocol.errors import EndpointError, KeyFileError, SecurityError

PLACEMENT = (
    *("layers", "stages", "gpu_precision", "cpu_precision", "embeddings", "final_layernorm", "lm_head"),
    *("ends_precision", "lm_head_precision", "threads", "kv_budget", "kv_budget_tokens"),
    *("max_num_seqs", "max_model_len", "prefill_chunk"),
)
OTHER_HOSTS = ("listen", "keys", "await_worker")
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "max_new_tokens"),
    *("ignore_eos", "greedy"),
)


class ChooseModel(argparse.Action):
    """A model by `--model`, or by a word alone; two different ones are refused."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        chosen = getattr(options, "model", None)
        if chosen is not None and chosen != value:
            parser.error(f"two models are named, {chosen} and {value}; name one")
        if flag is None and not may_be_a_model(value):
            hint = f"; a question goes behind --prompt: --prompt {value!r}" if "prompt" in vars(options) else ""
            parser.error(
                f"nothing can be done here with {value!r}: it is neither a directory nor a hub id such as "
                f"THUDM/chatglm2-6b{hint}"
            )
        options.model = value


def may_be_a_model(word: str) -> bool:
    """Whether a word looks like a hub id or `random:SHAPE`, or is a directory."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+|random:\S+", word) is not None or Path(word).expanduser().is_dir()


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """`--model` or the word MODEL, `--revision`, the cache, `-v` and `-q`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR|ID",
        action=ChooseModel,
        help="a model directory or hub id (default: the demo model inside)",
    )
    if positional:
        group.add_argument(
            "model", metavar="MODEL", nargs="?", action=ChooseModel, default=SUPPRESS, help="the same, without --model"
        )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--chat-format",
        choices=DIALECTS,
        help="how a conversation is written for the model, where its files do not say, or say it wrongly",
    )
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where quantised layers are kept (default ~/.cache/glmpipe; see glmpipe cache)",
    )
    group.add_argument("--no-cache", action="store_true", help="keep no quantised layers, and look for none")
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument(
        "-v", "--verbose", action="store_true", help="every layer's place, and the workers' own lines"
    )
    loudness.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but warnings and errors")


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Which device holds what, at which precision."""
    group = parser.add_argument_group(
        "placement",
        "Devices are cpu and cuda:N; precisions fp32, bf16, fp16 (not on a CPU), int8, int4;\n"
        "layers count from 1. By default all layers go to one CPU stage in fp32.",
    )
    group.add_argument(
        "--layers",
        metavar="[HOST/]DEVICE=LAYERS",
        action="append",
        help="one stage, such as cuda:1=1-12, cpu=5, cuda:0=13- (to the last), cpu=all, "
        "or lab2/cuda:0=13-28 on another host; repeat",
    )
    group.add_argument("--stages", metavar="N", type=int, help="split all layers evenly over N stages on the CPU")
    group.add_argument("--gpu-precision", metavar="P", help="of the layers on GPUs (default fp16)")
    group.add_argument("--cpu-precision", metavar="P", help="of the layers on CPUs (default fp32)")
    group.add_argument("--embeddings", metavar="DEVICE", help="where the word embeddings are (default cpu)")
    group.add_argument("--lm-head", metavar="DEVICE", help="where lm_head is (default: beside the embeddings)")
    group.add_argument(
        "--final-layernorm", metavar="DEVICE", help="where the final layernorm is (default: beside lm_head)"
    )
    group.add_argument(
        "--ends-precision",
        metavar="P",
        help="of embeddings and lm_head (default: as the layers on their device; where those are quantised, "
        "fp32 on a CPU and fp16 on a GPU, but see --lm-head-precision)",
    )
    group.add_argument(
        "--lm-head-precision",
        metavar="P",
        help="of lm_head alone (default: int8 where all layers are int8 or int4, unless published so)",
    )
    group.add_argument(
        "--threads", metavar="N", type=int, help="per stage (default: all usable cores, as stages take turns)"
    )
    group.add_argument(
        "--kv-budget-tokens",
        metavar="N",
        type=int,
        help="most tokens a stage's KV cache holds (default: four full contexts, or what memory allows)",
    )
    group.add_argument("--kv-budget", metavar="SIZE", help="the same in bytes, such as 2GiB or 800MB, for each stage")
    _add_limit_options(group)
    _add_scheduling_options(parser)
    _add_other_hosts_options(parser)
    group.add_argument("--no-memory-check", action="store_true", help="load even what does not seem to fit into memory")
    group.add_argument("--plan", metavar="FILE", help="a plan file (TOML) in place of the options above")


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-num-seqs",
        metavar="N",
        type=int,
        help=f"sequences that run at once (default {MAX_NUM_SEQS}); others wait",
    )
    group.add_argument(
        "--max-model-len",
        metavar="N",
        type=int,
        help="tokens of a prompt and its answer (default: the model's context)",
    )
    group.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=int,
        help=f"prompt tokens in one step (default {PREFILL_CHUNK}); prompts of ChatGLM-6B stay whole",
    )


def _add_other_hosts_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other hosts", "Needs a key: `glmpipe keys new`.")
    group.add_argument(
        "--listen",
        metavar="ENDPOINT",
        help="let workers of other hosts join at tcp://ADDR[:PORT] (default port 7410; hidden states come back to the "
        "ports after it)",
    )
    group.add_argument("--keys", metavar="DIR", type=Path, help="where keys are (default ~/.config/glmpipe/keys)")
    group.add_argument(
        "--await-worker",
        metavar="SECONDS",
        type=_seconds,
        help="how long a lost worker of another host is awaited; then a spare one takes its place, or answers fail "
        "(default 60)",
    )


def _add_scheduling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "speed",
        "None of these changes a token of a greedy or seeded answer on a CPU, at any precision. (On a GPU, and where "
        "the native kernels were not built, the last bits of sums depend on what is computed together.) The report of "
        "--stats says what they gave.",
    )
    group.add_argument(
        "--no-speculation",
        action="store_true",
        help="one token a step: do not guess what the text has said before and verify it",
    )
    group.add_argument(
        "--no-prefix-reuse", action="store_true", help="compute every prompt anew, even where it begins as one before"
    )
    group.add_argument(
        "--steps-in-flight",
        metavar="N",
        type=int,
        help="deal the sequences that decode out to N steps under way at once (default: what measures fastest)",
    )
    group.add_argument(
        "--recovery-attempts",
        metavar="N",
        type=int,
        default=DEFAULT_RECOVERY.max_attempts,
        help="how often to start a lost worker again before answers fail (default %(default)s; 0: the command ends)",
    )
    group.add_argument(
        "--replan",
        action="store_true",
        help="when a stage does not come back, let the others have its layers, if they have room, and go on",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen and when an answer ends."""
    group = parser.add_argument_group("sampling", "What is not given here is as the model's publisher set it.")
    group.add_argument("--greedy", action="store_true", default=None, help="always the most likely token")
    group.add_argument("--temperature", metavar="T", type=float, help="0 is greedy, above 1 is more varied")
    group.add_argument("--top-k", metavar="K", type=int, help="only the K most likely tokens; 0 for all")
    group.add_argument("--top-p", metavar="P", type=float, help="only the most likely tokens that reach P together")
    group.add_argument("--min-p", metavar="P", type=float, help="only tokens at least P times as likely as the first")
    group.add_argument("--repetition-penalty", metavar="R", type=float, help="above 1: fewer repetitions")
    group.add_argument("--seed", metavar="N", type=int, help="same seed, same plan: same text")
    group.add_argument("--stop", metavar="TEXT", action="append", help="end the answer before this text; repeat")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="end the answer after N tokens")
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on after the model's end (needs --max-new-tokens)"
    )


def add_watching_options(parser: argparse.ArgumentParser, *, can_watch: str | None = None) -> None:
    """`--trace`, and `--watch` where there is something to watch, which `can_watch` says."""
    group = parser.add_argument_group("seeing it")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline of every step through every process, for ui.perfetto.dev or chrome://tracing",
    )
    if can_watch is not None:
        group.add_argument(
            "--watch",
            action="store_true",
            help=f"a live panel{can_watch}: how busy each stage is, what waits, KV tokens, tokens/s",
        )


def add_system_option(parser: argparse._ActionsContainer) -> None:
    """`--system TEXT|@FILE`."""
    parser.add_argument("--system", metavar="TEXT|@FILE", help="what the model is told before everything else")


def chosen_system(options: argparse.Namespace) -> str:
    """The system prompt that `--system` means, empty without it. Raises UsageError."""
    from coordinator.system_prompt import read_system

    return "" if options.system is None else read_system(options.system)


def add_tools_option(parser: argparse._ActionsContainer) -> None:
    """`--tools FILE`."""
    parser.add_argument(
        "--tools",
        metavar="FILE",
        type=Path,
        help="a JSON list of tools that the model is told of (ChatGLM3, GLM-4, chat templates that know tools)",
    )


def chosen_tools(options: argparse.Namespace) -> str:
    """What `--tools` holds, empty without it. Raises UsageError."""
    from coordinator.tools import read_tools

    return "" if options.tools is None else read_tools(options.tools)


def add_connect_option(parser: argparse.ArgumentParser) -> None:
    """`--connect [ENDPOINT]`."""
    parser.add_argument(
        "--connect",
        metavar="ENDPOINT|PID",
        nargs="?",
        const="",
        help="use a running `glmpipe launch`; which one, if several serve",
    )


def token_ids(text: str) -> tuple[int, ...]:
    """For argparse: `5,64286`, spaces allowed."""
    try:
        ids = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids; write 5,64286") from None
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must hold at least one token id, none below 0")
    return ids


def sampling_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling params that were given, by their names in `SamplingParams`. Raises UsageError for contradictions."""
    given = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    useless = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in given]
    if given.get("greedy") and useless:
        names = ", ".join(map(_flag, useless))
        raise UsageError(f"--greedy always takes the most likely token, so {names} would do nothing; drop one of them")
    if given.get("ignore_eos") and "max_new_tokens" not in given:
        raise UsageError("--ignore-eos needs --max-new-tokens: nothing else would end the answer")
    return given


def plan_request(options: argparse.Namespace) -> PlanRequest:
    """What the placement options, or the plan file, ask for. Faults of form are inside; raises PlanError as a whole."""
    given = [name for name in PLACEMENT if getattr(options, name) is not None]
    if options.plan is not None:
        request = read_plan_file(Path(options.plan))
        if not given:
            return request
        names = ", ".join(map(_flag, given))
        fault = f"the plan file {options.plan} and {names} are both given; write the placement in one place"
        return replace(request, faults=(fault, *request.faults))
    stages, faults = stages_from(options.layers or [], "--layers")
    return PlanRequest(
        stages=stages,
        num_stages=options.stages,
        num_threads=options.threads,
        kv_budget_tokens=options.kv_budget_tokens,
        kv_budget=options.kv_budget,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        prefill_chunk=options.prefill_chunk,
        gpu_precision=_option(options, "gpu_precision"),
        cpu_precision=_option(options, "cpu_precision"),
        embeddings=_option(options, "embeddings"),
        final_layernorm=_option(options, "final_layernorm"),
        lm_head=_option(options, "lm_head"),
        ends_precision=_option(options, "ends_precision"),
        lm_head_precision=_option(options, "lm_head_precision"),
        faults=tuple(faults),
        is_complete=not faults,
    )


@contextmanager
def wrong_use() -> Iterator[None]:
    """Around what only looks at options: an address or a key that cannot be is a mistake of whoever wrote it."""
    try:
        yield
    except KeyFileError:
        raise
    except (EndpointError, SecurityError) as error:
        raise UsageError(str(error)) from None


def check_scheduling(options: argparse.Namespace) -> None:
    """Raises UsageError for an impossible number of steps or attempts."""
    if options.steps_in_flight is not None and options.steps_in_flight < 1:
        raise UsageError(f"--steps-in-flight {options.steps_in_flight} must be 1 or more")
    if options.recovery_attempts < 0:
        raise UsageError(f"--recovery-attempts {options.recovery_attempts} must be 0 or more")


def choose_cache(options: argparse.Namespace) -> None:
    """Let the cache options hold for this process and the workers that it starts. Raises UsageError."""
    if options.cache_dir is not None and options.no_cache:
        raise UsageError(f"--cache-dir {options.cache_dir} and --no-cache are both given; drop one of them")
    if options.cache_dir is not None:
        os.environ |= {"GLMPIPE_CACHE_DIR": options.cache_dir, "GLMPIPE_CACHE": "on"}
    if options.no_cache:
        os.environ["GLMPIPE_CACHE"] = "off"


def refuse_with_connect(options: argparse.Namespace) -> None:
    """A running launch has its model and placement already. Raises UsageError if any was given beside `--connect`."""
    seeing = [f"--{name}" for name in ("trace", "watch") if getattr(options, name, None)]
    if seeing:
        names = " and ".join(seeing)
        raise UsageError(f"{names} would look into the launch that --connect uses: give it to `glmpipe launch` instead")
    given = [
        name
        for name in (
            *PLACEMENT,
            *OTHER_HOSTS,
            "plan",
            "model",
            "revision",
            "chat_format",
            "cache_dir",
            "steps_in_flight",
        )
        if getattr(options, name) is not None
    ]
    given += [name for name in ("no_speculation", "no_prefix_reuse", "replan") if getattr(options, name)]
    if given:
        names = ", ".join(map(_flag, given))
        raise UsageError(f"--connect uses a launch with a model and a placement of its own; drop {names}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 1000000")
    return seconds


def _option(options: argparse.Namespace, name: str) -> Option | None:
    text = getattr(options, name)
    return None if text is None else Option(_flag(name), text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
