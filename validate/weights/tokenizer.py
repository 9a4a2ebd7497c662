"""The artifact's tokenizer + the checkpoint's, over a text → the first place where they part.

Special tokens are left out of it: the checkpoint's own file is read as it lies there, and who adds which
special token is the runtime's business.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.tokenizer_files import TOKENIZER, read_text_files
from mistral_trt.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerFindings:
    """differ: tokens of the text that are not the checkpoint's, of `tokens`.  where: at the first of them."""

    tokens: int
    differ: int
    where: str


def compare_tokenizers(folder: Path, source: Checkpoint, text: str) -> TokenizerFindings | None:
    """Encode a text with both.  None where the artifact has no tokenizer.

    Raises ManifestError for one that cannot be read, with all that belongs to it.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    Tokenizer.from_folder(folder)
    ours = FastTokenizer.from_file(str(folder / TOKENIZER))
    folders = [source.folder, *(adapter.folder for adapter in source.adapters)]
    theirs = read_text_files(folders, vocab_size=source.config.vocab_size).files[TOKENIZER]
    found = ours.encode(text, add_special_tokens=False).ids
    expected = FastTokenizer.from_str(theirs.decode()).encode(text, add_special_tokens=False).ids
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
    differ = len(wrong) + abs(len(found) - len(expected))
    first = wrong[0] if wrong else min(len(found), len(expected))
    return TokenizerFindings(len(expected), differ, f"at token {first}" if differ else "")
