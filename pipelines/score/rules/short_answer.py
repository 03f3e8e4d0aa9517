"""Short answers: the published rules of several benchmarks. Points are fractions, 0 … 1."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

# ----------------------------------------------------------------------------------------- yes or no


def yes_or_no(answer: str) -> str | None:
    """Return ``Yes`` or ``No`` if exactly one of these words occurs in the answer, else None.

    VLMEvalKit reads the answers to POPE in this way (vlmeval/dataset/utils/yorn.py).
    """
    words = set(re.findall(r"[a-z]+", answer.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


_FIRST_CHARACTERS = 4


def yes_or_no_at_first(answer: str) -> str | None:
    """Return ``Yes`` or ``No`` if the first four characters of the answer contain it, else None.

    Parts of words count: ``Not at all`` is a no, and so is ``None``.

    Source: MME (arXiv 2306.13394), its evaluation tool (BradyFU/Awesome-Multimodal-Large-Language-Models,
    eval_tool/calculation.py).
    """
    first = answer.strip().lower()[:_FIRST_CHARACTERS]
    return "Yes" if "yes" in first else "No" if "no" in first else None


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
_PERIOD_WITHOUT_DECIMAL = re.compile(r"\.(?!\d)")
_PEOPLE_FOR_FULL_POINTS = 3


def normalised_for_vqa(answer: str) -> str:
    """Normalise an answer for comparison by VQA accuracy.

    The result is in lower case, without articles and periods except decimal points. Number words become
    digits, and contractions get their apostrophes. Any other punctuation mark becomes a blank; it is removed
    instead if the original answer has a blank next to such a mark, or a comma within a number.

    Source: VQA (arXiv 1505.00468), evaluation code as described at https://visualqa.org/evaluation.html.
    """
    text = " ".join(answer.split())
    original, comma_in_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        next_to_blank = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if next_to_blank or comma_in_number else " ")
    text = _PERIOD_WITHOUT_DECIMAL.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Return a third of a point for each person who gave this answer, at most 1.

    It is averaged over all choices of one person to leave out. With a single gold answer, a match is 1.
    Source: VQA (arXiv 1505.00468) and https://visualqa.org/evaluation.html; TextVQA (arXiv 1904.08920) uses
    it.
    """
    normal = normalised_for_vqa(answer)
    same = [normalised_for_vqa(gold) == normal for gold in golds]
    if len(same) == 1:
        return float(same[0])
    points = [min((sum(same) - left_out) / _PEOPLE_FOR_FULL_POINTS, 1.0) for left_out in same]
    return sum(points) / len(points)


# ---------------------------------------------------------------------------------------------- ANLS

_ANLS_THRESHOLD = 0.5


def anls(answer: str, golds: Sequence[str]) -> float:
    """Return 1 − d for the smallest normalised edit distance d to a gold answer; 0 if d is 0.5 or more.

    Case and the kind of blanks are ignored. Source: ANLS in "Scene Text Visual Question Answering" (arXiv
    1905.13648), equation 1; DocVQA (arXiv 2007.00398) uses it.
    """
    plain = _plain(answer)
    distance = min(Levenshtein.normalized_distance(plain, _plain(gold)) for gold in golds)
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


# --------------------------------------------------------------------------------- numbers and texts

_TOLERANCE = 0.05


def relaxed_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Return 1 for a number within 5 % of a gold number, or for a gold text in any case; else 0.

    ``7%`` is the number 0.07. Source: ChartQA (arXiv 2203.10244), section 5.1 "Evaluation metric".
    """
    return float(any(_within_tolerance(answer.strip(), gold.strip()) for gold in golds))


def _within_tolerance(answer: str, gold: str) -> bool:
    number, wanted = _number(answer), _number(gold)
    if number is None or not wanted:
        return answer.lower() == gold.lower()
    return abs(number - wanted) <= _TOLERANCE * abs(wanted)


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def exact(answer: str, golds: Sequence[str]) -> float:
    """Return 1 for a gold text, up to case, blanks and a full stop at the end; else 0.

    Source: GQA (arXiv 1902.09506), "accuracy"; LLaVA-1.5 (arXiv 2310.03744) removes the full stop before
    the comparison.
    """
    plain = _plain(answer).removesuffix(".")
    return float(any(plain == _plain(gold).removesuffix(".") for gold in golds))


def contains(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if a gold answer occurs in the answer, in any case; else 0.

    Source: OCRBench (arXiv 2305.07895), "Evaluation metric".
    """
    plain = answer.lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in plain for gold in golds))


def contains_formula(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if a gold formula occurs in the answer, in the same case but with any blanks; else 0.

    Source: OCRBench (arXiv 2305.07895), its category of handwritten mathematical expressions.
    """
    formula = "".join(answer.split())
    return float(any("".join(gold.split()) in formula for gold in golds))


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()
