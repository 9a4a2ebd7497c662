"""`mistral-trt COMMAND …` → the stage that does it.

Stages are imported only when their command is called, so each runs without the other stages' packages.
Exit status: 0 done, 1 a validation gate failed (or got worse, or the doctor found something missing), 2
anything that stopped the command.
"""

import logging
import os
import sys
from importlib import import_module

from mistral_trt import __version__
from mistral_trt.errors import MissingDependencyError, MistralTrtError

COMMANDS = {
    "export": ("mistral_trt.export.__main__", "export", "checkpoint → ONNX folder"),
    "build": ("mistral_trt.engines.__main__", "build", "ONNX folder → TensorRT engine folder for a GPU"),
    "refit": ("mistral_trt.engines.__main__", "refit", "engine folder → the same for another fine-tune"),
    "validate": ("mistral_trt.validate.__main__", "validate", "artifact and checkpoint → numeric report"),
    "compare": ("mistral_trt.validate.report.compare", "compare", "two reports → what changed between them"),
    "eval": (
        "mistral_trt.validate.tasks.__main__",
        "evaluate",
        "artifact and checkpoint → do they answer alike",
    ),
    "generate": ("mistral_trt.runtime.__main__", "generate", "artifact and prompt → text, streamed"),
    "chat": ("mistral_trt.runtime.__main__", "chat", "artifact → a conversation in the terminal"),
    "inspect": ("mistral_trt.inspect", "inspect", "artifact → what is in it"),
    "gpus": ("mistral_trt.engines.__main__", "gpus", "the GPUs an engine can be built for"),
    "doctor": ("mistral_trt.doctor", "doctor", "this machine → what works here, and what to do for the rest"),
    "identify": ("mistral_trt.export.__main__", "identify", "checkpoint → its name and hash"),
    "demo-model": ("mistral_trt.export.demo_model", "demo_model", "fetch the demo checkpoint"),
    "synth": (
        "mistral_trt.export.synth",
        "synth",
        "named configuration → a full-size checkpoint of random weights",
    ),
}
_MODULE_EXTRAS = {"demo_model": "demo", "synth": "synth"}
_STAGE_EXTRAS = {"export": "export", "engines": "engines", "validate": "validate", "runtime": "onnxruntime"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mistral-trt {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"mistral-trt: {arguments[0]!r} is not a command\n\n{usage()}", file=sys.stderr)
        return 2
    return run(arguments[0], arguments[1:])


def run(command: str, arguments: list[str]) -> int:
    """Call a command's function; turn our errors into one line on stderr."""
    log_to_stderr()
    module, function, _ = COMMANDS[command]
    try:
        status: int = getattr(load(module), function)(arguments)
        sys.stdout.flush()
        return status
    except MistralTrtError as error:
        print(f"mistral-trt {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmistral-trt {command}: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; what Python still holds goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path that is too long, may not be read, is a folder, …
        print(f"mistral-trt {command}: {error}", file=sys.stderr)
        return 2


def load(module: str) -> object:
    """Import a stage. Raises MissingDependencyError naming the extra that brings what is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("mistral_trt"):
            raise
        parts = module.split(".")
        extra = _MODULE_EXTRAS.get(parts[-1]) or _STAGE_EXTRAS.get(parts[1], "all")
        raise MissingDependencyError(
            f"this command needs the package {missing!r}, which is not installed; "
            f"run: pip install 'mistral-trt[{extra}]'"
        ) from error


def log_to_stderr() -> None:
    """Send this package's log to stderr, message only."""
    log = logging.getLogger("mistral_trt")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def usage() -> str:
    lines = [f"  {name:<12}{purpose}" for name, (_, _, purpose) in COMMANDS.items()]
    return "\n".join(
        ["usage: mistral-trt COMMAND …", "", *lines, "", "mistral-trt COMMAND --help describes each."]
    )


if __name__ == "__main__":
    sys.exit(main())
