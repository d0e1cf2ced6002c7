"""Independence of subproblems: 1 minus the mean cosine similarity of their sentence embeddings.

The embeddings come from sentence-transformers (Sentence-BERT, arXiv:1908.10084).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Encoder = Callable[[list[str]], "np.ndarray"]  # n texts → (n, d) vectors

NEUTRAL_INDEPENDENCE = 0.5  # for a plan with fewer than two subproblems: there is nothing to compare


class SentenceEncoder:
    """all-MiniLM or another sentence-transformers model, loaded at its first use.

    It runs on the CPU: it is small, and a GPU's memory is needed for the language model.

    Args:
        model: Hub id or folder of the sentence-transformers model.
    """

    def __init__(self, model: str) -> None:
        self._name = model
        self._model: Any = None

    def load(self) -> None:
        """Load the model now, so that a missing model is noticed before a long run.

        Raises:
            UserError: if it is found neither on disk nor on the Hub.
        """
        if self._model is None:
            from common.models import load_sentence_encoder

            self._model = load_sentence_encoder(self._name)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Encode n texts; returns vectors (n, d)."""
        self.load()
        # Small batches of texts of similar length save padding: 31 subproblems and questions take 0.35 s instead of
        # 1.02 s in one batch (docs/performance.md).
        return self._model.encode(texts, batch_size=8, show_progress_bar=False, convert_to_numpy=True)


class Embeddings:
    """Unit vectors of texts. Each distinct text is encoded once; the most recently used vectors are kept.

    Args:
        encoder: turns n texts into vectors (n, d).
        cache_size: number of vectors that are kept.
    """

    def __init__(self, encoder: Encoder, cache_size: int = 20000) -> None:
        self._encoder = encoder
        self._cache_size = cache_size
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Seconds spent in the encoder since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def vectors(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The unit vector (d,) of each distinct text; a zero vector stays zero."""
        import numpy as np

        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if text not in self._cache]
        fresh: dict[str, np.ndarray] = {}
        if missing:
            started = time.perf_counter()
            encoded = np.asarray(self._encoder(missing), dtype=np.float64)  # (n, d)
            norms = np.linalg.norm(encoded, axis=1, keepdims=True)
            self._seconds += time.perf_counter() - started
            fresh = dict(zip(missing, encoded / np.where(norms > 0, norms, 1.0), strict=True))
        found = {text: fresh[text] if text in fresh else self._cache[text] for text in distinct}
        self._cache.update(found)
        for text in distinct:
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found


def independence_score(subproblems: Sequence[str], vectors: dict[str, np.ndarray]) -> float:
    """1 − mean pairwise cosine similarity of the subproblems, clamped to [0, 1].

    0 means that all subproblems say the same, 1 that they have nothing in common. Fewer than two subproblems give
    `NEUTRAL_INDEPENDENCE`. For k unit vectors v, the mean over their k(k−1)/2 pairs follows from their sum:
    (|Σ v|² − Σ |v|²) / (k(k−1)).

    Args:
        subproblems: k texts.
        vectors: unit vector (d,) of each of them, from `Embeddings.vectors`.
    """
    import numpy as np

    count = len(subproblems)
    if count < 2:
        return NEUTRAL_INDEPENDENCE
    stacked = np.stack([vectors[text] for text in subproblems])  # (k, d)
    total = stacked.sum(axis=0)
    mean_cosine = (total @ total - (stacked * stacked).sum()) / (count * (count - 1))
    return float(np.clip(1 - mean_cosine, 0.0, 1.0))


def relevance(subproblems: Sequence[str], question: str, vectors: dict[str, np.ndarray]) -> float:
    """Mean cosine similarity of the subproblems with the question, in [−1, 1]; 0 without subproblems.

    Args:
        subproblems: texts.
        question: the text they are compared with.
        vectors: unit vector (d,) of each text, from `Embeddings.vectors`.
    """
    if not subproblems:
        return 0.0
    return float(sum(vectors[text] @ vectors[question] for text in subproblems) / len(subproblems))
