"""lm-eval's interface to a model → an artifact, or its checkpoint: `--model mistral-trt`.

lm-eval finds no models in other packages, so its own command is started here, with ours registered:

    python -m mistral_trt.validate.tasks.lm_eval_adapter run --model mistral-trt --model_args folder=DIR …
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mistral_trt.errors import GenerationError, ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import manifest_sha256, read_manifest
from mistral_trt.progress import track
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.opening import openable
from mistral_trt.validate.reference.hugging_face import load_model, require_same_checkpoint
from mistral_trt.validate.tasks.sides import ArtifactSide, ReferenceSide, Side


@register_model("mistral-trt")
class MistralTrtLM(TemplateLM):  # type: ignore[misc]
    """An artifact as lm-eval asks it; requests run one after the other, in lm-eval's order.

    folder: the artifact.  reference: its checkpoint, which then answers instead, with the artifact's
    tokenizer and window.  threads: of ONNX Runtime.  batch_size, max_batch_size, device: lm-eval passes its
    defaults for them ("cuda:0") to every model; they change nothing, as the artifact says where it runs.
    """

    def __init__(
        self,
        folder: str,
        *,
        reference: str | None = None,
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        path = Path(folder)
        self._manifest = read_manifest(path)
        self._text = Tokenizer.from_folder(path)
        self._prefix = self._text.encode("")
        generation = self._manifest.details.get("generation", {})
        self._begin: int | None = self._prefix[0] if self._prefix else generation.get("bos_token_id")
        self._ends: tuple[int, ...] = tuple(generation.get("eos_token_ids", ()))
        self._name = manifest_sha256(path)
        self._side = self._open(path, reference, threads)

    def _open(self, folder: Path, reference: str | None, threads: int | None) -> Side:
        if reference is None:
            self._open_files = ExitStack()  # a float32 twin is removed with it
            opening = openable(folder, self._manifest, threads=threads)
            return ArtifactSide(self._open_files.enter_context(opening)())
        source = Checkpoint.open(Path(reference))
        require_same_checkpoint(self._manifest, source)
        return ReferenceSide(load_model(source, sliding_window=self._manifest.contract.ring.sliding_window))

    @property
    def eot_token_id(self) -> int:
        if not self._ends:
            raise ValidationError("this artifact's manifest names no token that ends a text; export it again")
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text, or the one that ends one where the model has no other."""
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's request cache knows the tokenizer by."""
        return self._name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not add_generation_prompt:
            raise GenerationError("an answer begun by the task cannot be continued; leave gen_prefix out")
        return self._text.render_chat(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; as with transformers, the text of a special token is that token.

        add_special_tokens: None adds the beginning of a text where the text has none, False never does.
        """
        ids, size = self._text.encode(string, special_tokens=True), len(self._prefix)
        again = ids[: 2 * size] == 2 * self._prefix and add_special_tokens is None
        return ids[size:] if add_special_tokens is False or again else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Requests of one context that follow each other share its run."""
        found: list[tuple[float, bool]] = []
        with track("lm-eval: log-likelihoods", len(requests), unit="requests") as advance:
            for context, group in groupby(requests, key=lambda request: request[1]):
                asked = list(group)
                scores = self._scores(context, [tokens for _, _, tokens in asked])
                for (words, _, _), answer in zip(asked, scores, strict=True):
                    self.cache_hook.add_partial("loglikelihood", words, answer)
                found += scores
                advance(len(asked))
        return found

    def _scores(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        self._require_room(len(context) + max(map(len, continuations)) - 1)
        if not all(continuations):
            raise GenerationError("a continuation has no token of its own: it melts into its context's last")
        scores = self._side.scores(context, continuations)
        return [(score.loglikelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; without a sliding window, in pieces of max_context."""
        found = []
        with track("lm-eval: texts", len(requests), unit="texts") as advance:
            for (text,) in (request.args for request in requests):
                tokens = self.tok_encode(text, add_special_tokens=False)
                size = self._manifest.contract.max_context or len(tokens)
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, max(size, 1), 1)
                total = sum(self._scores(*_parted(window))[0][0] for window in windows)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
                found.append(total)
                advance(1)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy completions up to a stop string or the end. Raises GenerationError where it is to sample."""
        found = []
        with track("lm-eval: completions", len(requests), unit="texts") as advance:
            for context, settings in (request.args for request in requests):
                text = self._complete(context, settings)
                self.cache_hook.add_partial("generate_until", (context, settings), text)
                found.append(text)
                advance(1)
        return found

    def _complete(self, context: str, settings: Mapping[str, Any]) -> str:
        wish: Mapping[str, Any] = normalize_gen_kwargs(dict(settings))
        if wish["do_sample"]:
            raise GenerationError("this model answers greedily; pass --gen_kwargs do_sample=False")
        prompt, stops = self.tok_encode(context) or [self.prefix_token_id], [s for s in wish["until"] if s]
        self._require_room(len(prompt) + wish["max_gen_toks"] - 1)

        def ended(tokens: Sequence[int]) -> bool:
            return tokens[-1] in self._ends or any(stop in self._text.decode(tokens) for stop in stops)

        tokens = self._side.complete(prompt, wish["max_gen_toks"], ended=ended).tokens
        text = self._text.decode(tokens)
        return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]

    def _require_room(self, tokens: int) -> None:
        """Nothing is cut off in silence. Raises GenerationError."""
        if reason := self._manifest.contract.check_position(tokens - 1):
            raise GenerationError(reason)


def _parted(window: tuple[list[int], list[int]]) -> tuple[list[int], list[list[int]]]:
    context, continuation = make_disjoint_window(window)
    return context, [continuation]


if __name__ == "__main__":
    cli_evaluate()
