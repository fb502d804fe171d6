"""WordPiece: divide a text into words and parts of words that a vocabulary has.

Source: Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers"; its tokenizer of lower-case text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from fastdiff.checks import text as check_text
from fastdiff.errors import InvalidArgument

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
MOST_CHARACTERS = 100  # of a word; longer ones are unknown, as in the original
CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """Numbers of the pieces of a text.

    Args:
        vocabulary: The pieces, in the order of their numbers; those that continue a word begin with "##".

    Raises:
        InvalidArgument: If the vocabulary has a piece twice, or lacks one of "[PAD]", "[UNK]", "[CLS]" and "[SEP]".
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.numbers = {piece: number for number, piece in enumerate(vocabulary)}
        missing = [piece for piece in (PAD, UNKNOWN, BEGIN, END) if piece not in self.numbers]
        if missing or len(self.numbers) != len(vocabulary):
            raise InvalidArgument(f"the vocabulary lacks {', '.join(missing) or 'nothing, but has a piece twice'}")

    def encode(self, text: str, length: int) -> list[int]:
        """Return the numbers of a text's pieces between "[CLS]" and "[SEP]", padded to ``length``.

        Args:
            text: The text.
            length: How many numbers to return, at least 2.

        Raises:
            InvalidArgument: If the text has more pieces than fit.
        """
        pieces = [number for word in words(check_text("text", text)) for number in self._pieces(word)]
        if len(pieces) > length - 2:
            raise InvalidArgument(f"the text has {len(pieces)} pieces of words; at most {length - 2} fit: shorten it")
        found = [self.numbers[BEGIN], *pieces, self.numbers[END]]
        return found + [self.numbers[PAD]] * (length - len(found))

    def _pieces(self, word: str) -> list[int]:
        """Divide a word into the longest pieces from its left; the whole word is unknown if one is missing."""
        unknown, found, start = [self.numbers[UNKNOWN]], [], 0
        if len(word) > MOST_CHARACTERS:
            return unknown
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                number = self.numbers.get(prefix + word[start:end])
                if number is not None:
                    found.append(number)
                    start = end
                    break
            else:
                return unknown
        return found


def words(text: str) -> Iterable[str]:
    """Yield the words and punctuation marks of a text in lower case, without accents."""
    for word in "".join(_cleaned(text)).split():
        lower = unicodedata.normalize("NFD", word.lower())
        current = ""
        for c in lower:
            if unicodedata.category(c) == "Mn":
                continue
            if _is_punctuation(c):
                if current:
                    yield current
                yield c
                current = ""
            else:
                current += c
        if current:
            yield current


def _cleaned(text: str) -> Iterable[str]:
    for c in text:
        code, category = ord(c), unicodedata.category(c)
        if c in " \t\n\r" or category == "Zs":
            yield " "
        elif code in (0, 0xFFFD) or category in ("Cc", "Cf", "Cs", "Co", "Cn"):
            continue
        elif any(low <= code <= high for low, high in CJK):
            yield f" {c} "
        else:
            yield c


def _is_punctuation(c: str) -> bool:
    """Return whether a character is punctuation; all signs of ASCII that are no letters and digits are."""
    return (c.isascii() and not c.isalnum() and not c.isspace()) or unicodedata.category(c).startswith("P")
