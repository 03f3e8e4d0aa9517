"""Points for short answers, by the rules that benchmarks were published with: fractions, 0 … 1."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# ----------------------------------------------------------------------------------------- yes or no


def yes_or_no(answer: str) -> str | None:
    """``Yes`` or ``No``, whichever of the two words stands in an answer; None for both and for neither.

    VLMEvalKit reads POPE's in this way (vlmeval/dataset/utils/yorn.py).
    """
    words = set(re.findall(r"[a-z]+", answer.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


_BEGINNING = 4


def yes_or_no_at_first(answer: str) -> str | None:
    """``Yes`` or ``No``, as the first four characters of an answer have it; None if they have neither.

    Letters alone decide, not words: ``Not at all`` is a no, and so is ``None``.

    Source: MME (arXiv 2306.13394), its evaluation tool (BradyFU/Awesome-Multimodal-Large-Language-Models,
    eval_tool/calculation.py).
    """
    beginning = answer.strip().lower()[:_BEGINNING]
    return "Yes" if "yes" in beginning else "No" if "no" in beginning else None


# --------------------------------------------------------------------------------------- VQA accuracy

_NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        ("0", *map(str, range(11))),
        strict=True,
    )
)
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll let's ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_AT_NO_DECIMAL = re.compile(r"\.(?!\d)")
_AGREEING = 3


def normalised_for_vqa(answer: str) -> str:
    """An answer as VQA compares it.

    Lower case, without articles and periods (but decimal points), number words as digits, contractions with
    their apostrophes, other punctuation as blanks; it is left out where, in the answer as it was given, a
    blank is beside it or a number has a comma.

    Source: VQA (arXiv 1505.00468), evaluation code as described at https://visualqa.org/evaluation.html.
    """
    text = " ".join(answer.split())
    given, comma_in_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_blank or comma_in_number else " ")
    text = _PERIOD_AT_NO_DECIMAL.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """How many people gave this answer, as a fraction of three, at most 1; averaged with each left out.

    Where there is only one gold answer: whether it is this one. Source: VQA (arXiv 1505.00468) and
    https://visualqa.org/evaluation.html; TextVQA (arXiv 1904.08920) uses it.
    """
    said = normalised_for_vqa(answer)
    same = [normalised_for_vqa(gold) == said for gold in golds]
    if len(same) == 1:
        return float(same[0])
    points = [min((sum(same) - left_out) / _AGREEING, 1.0) for left_out in same]
    return sum(points) / len(points)


# ---------------------------------------------------------------------------------------------- ANLS

_ANLS_THRESHOLD = 0.5


def anls(answer: str, golds: Sequence[str]) -> float:
    """Similarity to the nearest gold answer: 1 − normalised edit distance, and 0 where that is 0.5 or more.

    Case and the kind of blanks do not count. Source: ANLS in "Scene Text Visual Question Answering" (arXiv
    1905.13648), equation 1; DocVQA (arXiv 2007.00398) uses it.
    """
    said = _plain(answer)
    distances = [_relative_distance(said, _plain(gold)) for gold in golds]
    nearest = min(distances)
    return 1 - nearest if nearest < _ANLS_THRESHOLD else 0.0


def _relative_distance(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return edit_distance(one, other) / longest if longest else 0.0


def edit_distance(one: str, other: str) -> int:
    """Fewest characters to insert, delete or replace that make one text of the other."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


# ------------------------------------------------------------------------------------------- exact

_TOLERANCE = 0.05


def relaxed_accuracy(answer: str, golds: Sequence[str]) -> float:
    """1 for a number within 5 % of a gold number, or the same text but for case.

    ``7%`` is the number 0.07. Source: ChartQA (arXiv 2203.10244), section 5.1 "Evaluation metric".
    """
    return float(any(_within_tolerance(answer.strip(), gold.strip()) for gold in golds))


def _within_tolerance(said: str, gold: str) -> bool:
    number, wanted = _number(said), _number(gold)
    if number is None or not wanted:
        return said.lower() == gold.lower()
    return abs(number - wanted) <= _TOLERANCE * abs(wanted)


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def exact(answer: str, golds: Sequence[str]) -> float:
    """1 for the same text but for case, blanks and a full stop at the end.

    Source: GQA (arXiv 1902.09506), "accuracy"; LLaVA-1.5 (arXiv 2310.03744) takes the full stop off
    before it is compared.
    """
    said = _plain(answer).removesuffix(".")
    return float(any(said == _plain(gold).removesuffix(".") for gold in golds))


def contains(answer: str, golds: Sequence[str]) -> float:
    """1 if a gold answer occurs in the answer; case does not count.

    Source: OCRBench (arXiv 2305.07895), "Evaluation metric".
    """
    said = answer.lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in said for gold in golds))


def contains_formula(answer: str, golds: Sequence[str]) -> float:
    """1 if a gold formula occurs in the answer; blanks do not count, case does.

    Source: OCRBench (arXiv 2305.07895), its category of handwritten mathematical expressions.
    """
    said = "".join(answer.split())
    return float(any("".join(gold.split()) in said for gold in golds))


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()
